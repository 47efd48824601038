"""The training loop."""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from occult_train import beginning
from occult_train import config as configs
from occult_train.checkpoint import placing
from occult_train.checkpoint import state as checkpoint_state
from occult_train.checkpoint.store import WeightsAlone, write_durably
from occult_train.config import Config
from occult_train.data.loader import Batches, build_datasets, open_corpora, resolve_vocab
from occult_train.data.samples import NOT_COUNTED
from occult_train.data.tokenizer import load_tokenizer
from occult_train.distributed import LOCAL_SIZE_VARIABLES, first_number
from occult_train.engine import build_engine, check_deepspeed, learning_rate, set_learning_rate
from occult_train.errors import TrainingDiverged, writing
from occult_train.faults import StopSignal, set_step
from occult_train.hub.source import HubModel
from occult_train.meter import StepMeter, StepRecord, peak_flops
from occult_train.moe.similarity import FILE_NAME
from occult_train.monitor import Monitor
from occult_train.parallel import zero
from occult_train.parallel.grid import Grid
from occult_train.replacing import Replacer
from occult_train.saver import Saver
from occult_train.similarity_tables import find_tables
from occult_train.statistics_window import StatisticsWindow
from occult_train.stopvote import StopVote

_ROW_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def run(config: Config) -> int:
    """Train to the end, or until asked to stop. torch.distributed must be initialised. Returns the exit code."""
    trainer = Trainer(config)
    with writing(f"output={config.output}"):
        trainer.train()
    return 0


class Trainer:
    """One run of training: data, engine, and the state that a checkpoint carries."""

    def __init__(self, config: Config) -> None:
        check_deepspeed(config)
        config.validate_ranks(dist.get_world_size())
        cuda = torch.cuda.is_available()
        self.config = config
        self.output = Path(config.output)
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        config.model.vocab_size = resolve_vocab(config.data, config.model.vocab_size)
        self.grid = Grid.create(config.parallel.expert, first_number(LOCAL_SIZE_VARIABLES, 0))
        vocab = config.model.vocab_size
        self.train_data, self.valid_data = build_datasets(config.data, config.train.seed, vocab_size=vocab)
        for index in range(self._held_out()):
            self.valid_data[index]  # text that does not fit the vocabulary is refused now, not when it is evaluated
        self.start = beginning.find(config)  # what is wrong with it shows before anything is built
        self.similarity = find_tables(config, self.start) if config.moe.prune.policy == "similarity" else None
        """What pruning by similarity goes by."""
        torch.manual_seed(config.train.seed + self.grid.rank)
        self.engine = build_engine(config, self.grid, tensorboard=self.output / "tensorboard")
        self.model = self.engine.module
        if self.similarity is not None:
            self.model.set_similarity(self.similarity)
        self.accumulation = config.accumulation_steps(self.grid.world_size)
        self.step, self.consumed = 0, 0
        self.norm: float | None = None
        """Gradient norm of the last step at stage 0; at other stages DeepSpeed knows it."""
        resolved = configs.to_yaml(config)
        self.monitor = Monitor(self.output, self.engine.monitor, self.grid.rank, config.train.steps, resolved)
        row_bytes = config.model.hidden_size * _ROW_BYTES[config.train.precision]
        self.meter = StepMeter(self.model.moe_layers(), row_bytes, self.device)
        self.window = StatisticsWindow(config, self.model.moe_layers(), self.device, self.monitor)
        self.given = {i: layer.placement for i, layer in self.model.moe_layers().items()}
        """What moe.placement means without a checkpoint."""
        self.replacer = Replacer(config, self.engine, self.grid, self.monitor)
        self.saver = Saver(config, self.engine, self.grid, self.monitor, self.checkpoints)
        for line in self.train_data.remarks + self.valid_data.remarks:
            self.monitor.say(line)
        self._resume()
        self.model.set_step(self.step)
        if self.grid.rank == 0:
            with writing(f"output={config.output}"):
                write_durably(self.output / "config.yaml", resolved)
                self._keep_tokenizer()

    def _keep_tokenizer(self) -> None:
        """Copy the corpus's tokenizer beside the run, for generation and export."""
        tokenizer = open_corpora(self.config.data)[0][0].tokenizer
        if tokenizer is not None:
            load_tokenizer(tokenizer).save(self.output)

    # ---------------------------------------------------------------- resuming and saving

    @property
    def checkpoints(self) -> Path:
        """Folder of this run's checkpoints."""
        return self.output / "checkpoints"

    def _resume(self) -> None:
        start = self.start
        if self.grid.rank == 0:
            with writing(f"output={self.config.output}"):
                beginning.keep_files(start, self.output)
        if start is None:
            return
        placed = ""
        if isinstance(start, HubModel):
            self.monitor.say(f"reading weights of {start.folder}")
        else:
            placed = placing.place(self.model.moe_layers(), self.config.moe.placement, self.given, start)
        checkpoint_state.load(self.engine, self.grid, start)
        self.step, self.consumed = start.step, int(start.state["consumed_samples"])
        if not isinstance(start, WeightsAlone):
            self.window.resume(start.folder)
            self.replacer.resume(start.folder, self.step)
        self.engine.global_samples = self.consumed  # DeepSpeed's own curves are over samples
        for line in beginning.describe(start, placed):
            self.monitor.say(line)

    def save(self) -> None:
        """Begin to write a checkpoint of this moment, and wait until it is written if so configured. Collective.

        Raises:
            TrainingDiverged: on every rank if the last step's gradients were not numbers, as then the weights are not.
        """
        self._check_finite()
        state = {"consumed_samples": self.consumed, "seed": self.config.train.seed}
        state |= placing.given(self.config.moe.placement, self.given)
        files = self.window.files() | self.replacer.files() | self._similarity_file()
        self.saver.save(self.step, state, files)

    def _similarity_file(self) -> dict[str, bytes]:
        """The tables, for a checkpoint; rank 0 writes them."""
        return {FILE_NAME: self.similarity.to_bytes()} if self.similarity is not None and self.monitor.main else {}

    def _check_finite(self) -> None:
        norm = self.engine.get_global_grad_norm() if self.norm is None else self.norm
        if self.config.train.precision == "fp16" or norm is None:  # fp16 steps that overflow are skipped
            return
        if not math.isfinite(float(norm)):
            text = f"the gradient norm is {float(norm)} at step {self.step}, which is not saved"
            raise TrainingDiverged(f"{text}; the last checkpoint is untouched")

    # ---------------------------------------------------------------- the loop

    def train(self) -> None:
        """Train until train.steps, saving and evaluating on the way; stop early, saved, when asked to."""
        stop = StopVote(StopSignal(), self.device)
        saved_at = self.step if self.step else -1
        self.monitor.start(self.step)
        try:
            evaluated_at = -1
            batches = Batches(
                self.train_data,
                consumed_samples=self.consumed,
                micro_batch_size=self.config.train.micro_batch_size,
                rank=self.grid.rank,
                world_size=self.grid.world_size,
            )
            self._clock = (time.perf_counter(), self.consumed)
            while self.step < self.config.train.steps:
                with self.window.counting(self.step), self.replacer.counting(self.step):
                    self._train_step(batches)
                self.window.finish_step(self.step)
                self.replacer.finish_step(self.step)
                if _due(self.step, self.config.eval.interval):
                    self.evaluate()
                    evaluated_at = self.step
                if _due(self.step, self.config.checkpoint.interval):
                    self.save()
                    saved_at = self.step
                self.saver.look()
                if stop.agreed():
                    if saved_at != self.step:
                        self.save()
                    self.saver.finish()
                    self.monitor.say(f"stopped at step {self.step}; the same command continues there")
                    return
            self.window.close(self.step)
            if saved_at != self.step:
                self.save()
            if evaluated_at != self.step:
                self.evaluate()
            self.saver.finish()
        except TrainingDiverged:  # on all ranks; what was saved before is still worth having
            self.saver.finish()
            raise
        finally:
            self.monitor.stop()

    def _train_step(self, batches: Batches) -> None:
        """One optimizer step: all its micro-batches, clipping, AdamW, balancing, log."""
        logged = _due(self.step + 1, self.config.monitor.interval) or self.step in (0, self.config.train.steps - 1)
        if logged:
            self.meter.start()
        rate = learning_rate(self.config, self.step)
        set_learning_rate(self.engine, rate)
        self.model.train()
        for batch in self._micro_batches(batches):
            loss = self.engine(**batch)
            if logged:
                self.meter.add(self.model.last_losses)
            self.engine.backward(loss)
            self.norm = self._clip_at_stage_0()
            self.engine.step()
        self.step += 1
        set_step(self.step)
        self.model.set_step(self.step)
        self.consumed += self.config.train.global_batch_size
        loads = self.model.finish_step()
        while self.model.news:
            self.monitor.say(f"step {self.step}: {self.model.news.pop(0)}")
        self.monitor.advance(self.step)
        if logged:
            self._log(rate, loads)
        if _due(self.step, self.config.monitor.histogram_interval):
            self.monitor.histograms(self.step, list(self.model.moe_layers()), loads)

    def _micro_batches(self, batches: Batches) -> Iterator[dict[str, Tensor]]:
        """Those of a step, on the device.

        Where not all labels count, the loss is the mean over those that do in the global batch, however it is divided:
        each micro-batch is told how many they are. Collective then.
        """
        if not self.train_data.has_examples:
            for _ in range(self.accumulation):
                yield {name: tensor.to(self.device) for name, tensor in next(batches).items()}
            return
        micro = [next(batches) for _ in range(self.accumulation)]
        labels = sum(int((batch["labels"] != NOT_COUNTED).sum()) for batch in micro)
        counted = torch.tensor([labels, len(micro)], device=self.device)
        dist.all_reduce(counted)
        for batch in micro:
            yield {name: tensor.to(self.device) for name, tensor in batch.items()} | {"counted": counted}

    def _clip_at_stage_0(self) -> float | None:
        if self.config.zero.stage or not self.engine.is_gradient_accumulation_boundary():
            return None
        return zero.clip_stage_0(self.engine, self.grid, self.config.train.gradient_clipping)

    def _log(self, rate: float, loads: Tensor) -> None:
        loss, layers = self.meter.finish(loads)
        now, (since, consumed) = time.perf_counter(), self._clock
        self._clock = (now, self.consumed)
        length = self.config.data.sequence_length
        speed = (self.consumed - consumed) * length / max(now - since, 1e-9)
        peak = peak_flops()
        flops = 3 * self.config.model.flops_per_token(length) * speed / self.grid.world_size
        grad_norm = float(self.engine.get_global_grad_norm()) if self.norm is None else self.norm
        self.monitor.step(
            StepRecord(
                step=self.step,
                loss=loss,
                balance_loss=sum(layer.balance_loss for layer in layers) / len(layers),
                z_loss=sum(layer.z_loss for layer in layers) / len(layers),
                grad_norm=grad_norm,
                lr=rate,
                tokens=self.consumed * length,
                tokens_per_second=speed,
                mfu=flops / peak if peak else None,
                layers=layers,
            )
        )
        if not math.isfinite(loss):
            raise TrainingDiverged(f"the loss is {loss} at step {self.step}; the last checkpoint is untouched")

    # ---------------------------------------------------------------- held-out loss

    def _held_out(self) -> int:
        """How many sequences are evaluated."""
        return min(self.config.eval.sequences or len(self.valid_data), len(self.valid_data))

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """Mean cross-entropy in nats over the first eval.sequences held-out sequences; None without any. Collective.

        Sequence i goes to rank i mod ranks; ranks with fewer compute padding that does not count, so that all take
        part in every exchange.
        """
        data, micro, world = self.valid_data, self.config.train.micro_batch_size, self.grid.world_size
        total = self._held_out()
        if total == 0:
            self.monitor.say("no held-out text (data.valid_path is empty), so no held-out loss")
            return None
        started = time.perf_counter()
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for start in range(0, total, micro * world):
            indices = [start + row * world + self.grid.rank for row in range(micro)]
            samples = [data[i if i < total else 0] for i in indices]
            batch = {name: torch.stack([s[name] for s in samples]).to(self.device) for name in samples[0]}
            for row, index in enumerate(indices):
                if index >= total:
                    batch["labels"][row] = NOT_COUNTED
            counted = (batch["labels"] != NOT_COUNTED).sum()
            loss = self.engine(**batch)
            sums += torch.stack((torch.where(counted > 0, loss.double() * counted, 0.0), counted.double()))
        dist.all_reduce(sums)
        loss = float(sums[0] / sums[1])
        self.monitor.evaluation(self.step, loss, total)
        if hasattr(self, "_clock"):  # evaluation is not training time
            since, consumed = self._clock
            self._clock = (since + time.perf_counter() - started, consumed)
        return loss


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
