"""Fine-tune one base model with and without pruning, again and again in one process, a CSV line for each run.

python -m occult_train.tools.bench.pruning_tune BASE CORPUS OUTPUT.csv [--groups 8] [--seconds 540] [--share 1/2]
    [path=value ...]

BASE is a run or a checkpoint, CORPUS its fine-tuning text; settings change those of configs/finetune_pruned.yaml. The
base is read once. Its experts are then placed for so many devices by how CORPUS uses them (the paper's greedy way), and
its similarity tables are made of the same tokens; all runs share both, by a file beside OUTPUT. What the CSV has is not
run again, nothing is begun that would not end within --seconds, and the same command goes on. --share I/N makes every
N-th run from the I-th on, for as many processes, each with its GPU and its CSV in the same folder.
"""

import argparse
import hashlib
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from occult_train import beginning, distributed
from occult_train.checkpoint import state
from occult_train.checkpoint.store import MANIFEST, WeightsAlone
from occult_train.config import Config, load
from occult_train.data.loader import build_datasets, resolve_vocab
from occult_train.data.samples import HeldOut
from occult_train.engine import build_engine
from occult_train.errors import UserError
from occult_train.moe.collecting import RoutingCollector
from occult_train.moe.costs import rows_moved
from occult_train.moe.pruning import PruneConfig, Pruner
from occult_train.moe.similarity import SimilarityTables
from occult_train.moe.solver import device_of, solve
from occult_train.moe.statistics import RoutingStatistics
from occult_train.parallel import zero
from occult_train.parallel.grid import Grid
from occult_train.tools.bench.study import device_name, held_out_loss, make_runs, parse_share, read_rows, train

RECIPE = "configs/finetune_pruned.yaml"
LIMITS = (1, 2, 4)
"""m of the pruned runs."""
PASSES = 4
"""Exchanges of a training step that move a row of a token and device: dispatch, combine, and their ways back."""
CALIBRATION = 256
"""Sequences of the training text that placement and similarity are made of."""
CALIBRATION_WAIT = 300
"""Seconds until it must be there."""


@dataclass(frozen=True)
class Row:
    """A run."""

    base: str
    """Digest of the base model's checkpoint."""
    policy: str
    devices: int
    """m; as many as there are for the run without pruning."""
    groups: int
    seed: int
    """Of the order of the text; the base is the same for all."""
    steps: int
    tokens: int
    loss_before: float
    """Held-out loss with this routing before fine-tuning."""
    loss: float
    c_t: float
    """Devices a token uses, mean over layers and held-out tokens."""
    bytes_token: float
    """That a token moves between devices in a layer and training step, spread evenly over them, in half precision."""
    step_ms: float
    device: str


@dataclass(frozen=True)
class Variant:
    """How tokens are routed."""

    policy: str
    devices: int


def variants(groups: int) -> list[Variant]:
    """Without pruning, then the cheapest first."""
    return [Variant("none", groups), *(Variant(p, m) for m in LIMITS if m < groups for p in ("router", "similarity"))]


class DeviceCounter:
    """How many devices tokens use, over all layers; it makes the host wait for nothing."""

    def __init__(self, device_E: Tensor, groups: int) -> None:
        self.device_E, self.groups = device_E, groups
        self.used, self.tokens = torch.zeros((), dtype=torch.int64, device=device_E.device), 0

    def add(self, experts_TK: Tensor) -> None:
        """Take in a layer's choices."""
        used_TG = torch.zeros(len(experts_TK), self.groups, dtype=torch.bool, device=experts_TK.device)
        self.used += used_TG.scatter_(1, self.device_E[experts_TK], True).sum()
        self.tokens += len(experts_TK)


class Study:
    """The base model, and runs from it."""

    def __init__(self, config: Config, groups: int, shared: Path, first: bool = True) -> None:
        """shared: folder for the routing of the base on the training text, which the first of all processes counts."""
        self.config, self.groups, self.grid = config, groups, Grid.create(1)
        config.model.vocab_size = resolve_vocab(config.data, config.model.vocab_size)
        start = beginning.find(config)
        if not isinstance(start, WeightsAlone):
            raise UserError(f"{config.model.from_pretrained} is no run or checkpoint of ours")
        wanted = load([str(start.folder / "config.yaml")]).train.steps
        if start.taken_at < wanted:
            raise UserError(f"{start.folder} is not trained to the end, which is train.steps={wanted}")
        self.base = hashlib.sha256((start.folder / MANIFEST).read_bytes()).hexdigest()[:12]
        self.engine = build_engine(config, self.grid)
        self.model = self.engine.module
        self.device = self.model.lm_head.weight.device
        _, self.valid = self._data(0)
        state.load(self.engine, self.grid, start)
        found = self._calibration(shared / f"calibration-{self.base}.safetensors", first)
        self.tables = SimilarityTables.of(found, "of the base")
        for index, layer in self.model.moe_layers().items():
            layer.place(solve("greedy", found.layers[index], groups))
        state.load(self.engine, self.grid, start)  # weights by where experts are now
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.weights = {name: zero.get_full(self.engine, p, "param").clone() for name, p in trained.items()}

    def run(self, variant: Variant, seed: int) -> Row:
        """Fine-tune, with the held-out loss before and after."""
        config = self.config
        self._restore()
        self._route(variant)
        before, _ = self.evaluate()
        seconds = train(self.engine, config, self._data(seed)[0])
        after, c_t = self.evaluate()
        tokens = config.train.steps * config.train.global_batch_size * config.data.sequence_length
        row_bytes = 2 * config.model.hidden_size
        moved = PASSES * rows_moved(c_t, self.groups) * row_bytes
        how = (self.base, variant.policy, variant.devices, self.groups, seed, config.train.steps, tokens)
        return Row(*how, before, after, c_t, moved, 1000 * seconds, device_name())

    def _calibration(self, path: Path, first: bool) -> RoutingStatistics:
        if first and not path.exists():
            self._calibrate().save(path)
        for _ in range(CALIBRATION_WAIT):
            if path.exists():
                return RoutingStatistics.load(path)
            time.sleep(1)
        raise UserError(f"{path} is not there after {CALIBRATION_WAIT} s; --share 1/N makes it")

    def _calibrate(self) -> RoutingStatistics:
        """Routing of the base on the training text, with similarity."""
        collector = RoutingCollector(self.model.moe_layers(), 50_000, 0, self.device, similarity=True)
        data, _ = self._data(0)
        self.model.eval()
        with collector.counting(), torch.no_grad():
            for first in range(0, CALIBRATION, self._micro):
                rows = [data[i]["input_ids"] for i in range(first, min(first + self._micro, CALIBRATION))]
                self.model(torch.stack(rows).to(self.device))
        return collector.gather({})

    def _restore(self) -> None:
        """The base's weights, and an optimizer that has taken no step."""
        parameters = dict(self.model.named_parameters())
        zero.make_states(self.engine)
        for name, value in self.weights.items():
            zero.set_full(self.engine, parameters[name], "param", value)
            zero.push_weights(self.engine, parameters[name], value)
            for kind in zero.STATES:
                zero.set_full(self.engine, parameters[name], kind, torch.zeros_like(value))
        zero.set_adam_step(self.engine, 0)

    def _route(self, variant: Variant) -> None:
        model = self.config.model
        for index, layer in self.model.moe_layers().items():
            layer.pruner = None
            if variant.policy != "none":
                prune = PruneConfig(variant.policy, variant.devices, self.groups)
                prune.validate(model.num_experts, model.num_experts_per_tok, model.moe_layers, 1)
                layer.pruner = Pruner(prune, index, model.num_experts)
        self.model.set_similarity(self.tables)

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Held-out loss, and devices a token."""
        layers = self.model.moe_layers().values()
        homes = [device_of(layer.placement, self.groups).to(self.device) for layer in layers]
        counters = [DeviceCounter(device_E, self.groups) for device_E in homes]
        for layer, counter in zip(layers, counters, strict=True):
            layer.counters.append(counter)
        loss = held_out_loss(self.model, self.config, self.valid)
        for layer in layers:
            layer.counters.pop()
        return loss, statistics.mean(float(counter.used) / counter.tokens for counter in counters)

    @property
    def _micro(self) -> int:
        return self.config.train.micro_batch_size

    def _data(self, seed: int) -> tuple[Any, HeldOut]:
        return build_datasets(self.config.data, seed, vocab_size=self.config.model.vocab_size)


def left(
    done: list[Row], groups: int, seeds: int, base: str, path: Path, share: tuple[int, int] = (1, 1)
) -> list[tuple[Variant, int]]:
    """The runs to make: all ways with one seed before the next; of these every N-th from the I-th on.

    Raises:
        UserError: the CSV is of another base.
    """
    others = {row.base for row in done} - {base}
    if others:
        raise UserError(f"{path} has runs of the base {others.pop()}, this one is {base}; name another file")
    made = {(Variant(row.policy, row.devices), row.seed) for row in done}
    wanted = [(variant, seed) for seed in range(1, seeds + 1) for variant in variants(groups)]
    return [run for run in wanted[share[0] - 1 :: share[1]] if run not in made]


def main() -> None:
    """Make the runs that are left and that there is time for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("corpus")
    parser.add_argument("output", type=Path)
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--share", type=parse_share, default=(1, 1))
    given = parser.parse_intermixed_args()
    begun = time.perf_counter()
    unpruned = ["moe.prune.policy=none", "moe.prune.devices=0", "data.mask_documents=false"]
    places = [f"model.from_pretrained={given.base}", f"data.path={given.corpus}", "checkpoint.resume=none"]
    config = load([RECIPE, *places, *unpruned, *given.settings])
    distributed.prepare_environment()
    distributed.initialize()
    distributed.set_deepspeed_log(False)
    study = Study(config, given.groups, given.output.parent, first=given.share[0] == 1)
    done = read_rows(Row, given.output)
    runs = left(done, given.groups, given.seeds, study.base, given.output, given.share)
    print(f"base {study.base}, {len(runs)} runs to make; set up in {time.perf_counter() - begun:.0f} s", flush=True)
    for (_, seed), row, seconds in make_runs(runs, study.run, given.output, begun + given.seconds):
        losses = f"loss {row.loss_before:.4f} -> {row.loss:.4f}, C_T {row.c_t:.3f}"
        run = f"{row.policy} m={row.devices} seed {seed}"
        print(f"{run}: {losses}, {row.step_ms:.1f} ms a step, {seconds:.0f} s", flush=True)
    distributed.shutdown()


if __name__ == "__main__":
    main()
