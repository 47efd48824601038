"""What a run writes down: TensorBoard and what else DeepSpeed's monitor writes to, `log.jsonl`, and a progress bar."""

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor

from occult_train import runlog
from occult_train.meter import StepRecord
from occult_train.moe.statistics import RoutingStatistics

IMAGE_PIXELS = 384
"""Width of images, if there are not more experts."""


@dataclass
class Replacement:
    """The experts were placed anew, or could have been."""

    step: int
    method: str
    layers: list[dict[str, Any]]
    """Of each MoE layer: layer, whether its experts moved, and of the window C_T and the largest device's load over
    the mean, under the old placement (c_t, load_max_over_mean) and the new (c_t_expected, load_expected); with the
    hierarchical dispatch also the nodes a token needs (nodes, nodes_expected), else 0."""
    experts_moved: int
    bytes_moved: int
    """Sent by all ranks."""
    solve_seconds: float
    move_seconds: float


class Monitor:
    """Writes records on rank 0; on other ranks it does nothing.

    Args:
        output: the run's folder.
        boards: DeepSpeed's `engine.monitor`: its TensorBoard writer, and those of W&B, Comet and CSV if they are on.
        rank: this process's.
        steps: of the whole run, for the progress bar.
        resolved: the whole configuration as YAML.
    """

    def __init__(self, output: Path, boards: Any, rank: int, steps: int, resolved: str) -> None:
        self.main, self.path = rank == 0, output / "log.jsonl"
        self.summary = boards.tb_monitor.summary_writer if self.main else None
        others = (boards.wandb_monitor, boards.comet_monitor, boards.csv_monitor) if self.main else ()
        self._others = [board for board in others if board is not None]
        self.console = Console(stderr=True, quiet=not self.main)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (self.main and self.console.is_terminal),
        )
        self._task = self._bar.add_task("training", total=steps, status="")
        if self.summary is not None:
            threading.excepthook = _without_writer(threading.excepthook)
            self.summary.add_text("config", "```yaml\n" + resolved + "```")

    def start(self, step: int) -> None:
        """Begin or continue at `step`: later lines of the log, of a run that went further, are dropped."""
        if not self.main:
            return
        runlog.rewind(self.path, step)
        self._bar.start()
        self._bar.update(self._task, completed=step)

    def stop(self) -> None:
        """Take the progress bar away."""
        self._bar.stop()

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self.main:
            self._bar.update(self._task, completed=step)

    def say(self, text: str) -> None:
        """One line to the user, above the progress bar."""
        if self.main:
            self._bar.console.print(text, highlight=False, soft_wrap=True)

    def step(self, record: StepRecord) -> None:
        """Write down one logged step."""
        if not self.main:
            return
        runlog.append(self.path, {"kind": "step", "time": time.time(), **asdict(record)})
        mfu = f", {record.mfu:.1%} MFU" if record.mfu is not None else ""
        status = f"loss {record.loss:.3f}, {record.tokens_per_second:,.0f} tokens/s{mfu}"
        self._bar.update(self._task, completed=record.step, status=status)
        if self._bar.disable:
            self.say(f"step {record.step}: {status}, grad norm {record.grad_norm:.2f}, lr {record.lr:.2e}")
        self._scalars(record.step, _step_scalars(record))

    def evaluation(self, step: int, loss: float, sequences: int) -> None:
        """Write down a held-out loss."""
        if not self.main:
            return
        record = {"kind": "evaluation", "time": time.time(), "step": step, "loss": loss, "sequences": sequences}
        runlog.append(self.path, record)
        self.say(f"step {step}: held-out loss {loss:.4f} over {sequences} sequences")
        self._scalars(step, {"evaluation/loss": loss})

    def replacement(self, record: Replacement) -> None:
        """Write down where experts were placed anew."""
        if not self.main:
            return
        runlog.append(self.path, {"kind": "replacement", "time": time.time(), **asdict(record)})
        layers = record.layers
        moved = [layer for layer in layers if layer["moved"]]
        before = sum(layer["c_t"] for layer in layers) / len(layers)
        after = sum(layer["c_t_expected" if layer["moved"] else "c_t"] for layer in layers) / len(layers)
        text = f"C_T {before:.3f}; no layer has a placement that is better by moe.replace.min_gain"
        if moved:
            text = f"C_T {before:.3f}, {after:.3f} expected; {record.experts_moved} experts of {len(moved)} layers "
            text += f"moved ({record.bytes_moved / 1e6:,.1f} MB in {record.move_seconds:.1f} s, "
            text += f"solved in {record.solve_seconds:.1f} s)"
        self.say(f"step {record.step}: placed anew by {record.method}: {text}")
        self._scalars(record.step, {"moe/experts_moved": record.experts_moved})

    def histograms(self, step: int, layers: list[int], loads: Tensor) -> None:
        """Expert loads [Lm, E] as one histogram a layer: how many experts got how many tokens."""
        if self.summary is None:
            return
        for layer, counts in zip(layers, loads.cpu(), strict=True):
            self.summary.add_histogram(f"moe/layer_{layer:02d}/tokens_per_expert", counts, step)

    def collaboration(self, step: int, statistics: RoutingStatistics) -> None:
        """Each layer's collaboration matrix as an image, expert by expert, black for the pair most often chosen."""
        if self.summary is None:
            return
        for index, layer in statistics.layers.items():
            share_EE = layer.pairs_EE / max(int(layer.pairs_EE.max()), 1)
            pixels = max(1, IMAGE_PIXELS // statistics.num_experts)
            image = ((1 - share_EE) * 255).to(torch.uint8).repeat_interleave(pixels, 0).repeat_interleave(pixels, 1)
            self.summary.add_image(f"moe/layer_{index:02d}/collaboration", image[None], step)

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        if self.summary is not None:  # one event for all values; one each would cost ten times as much
            event = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
            self.summary.file_writer.add_summary(event, step)
            self.summary.flush()
        for board in self._others:
            board.write_events([(tag, value, step) for tag, value in values.items()])


def _without_writer(hook: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A `threading.excepthook` that leaves out TensorBoard's writer: it raises again in whoever writes next."""

    def hook_without_writer(arguments: Any) -> None:
        if type(arguments.thread).__name__ != "_AsyncWriterThread":
            hook(arguments)

    return hook_without_writer


def _step_scalars(record: StepRecord) -> dict[str, float]:
    values = {
        "train/loss": record.loss,
        "train/balance_loss": record.balance_loss,
        "train/z_loss": record.z_loss,
        "train/grad_norm": record.grad_norm,
        "train/lr": record.lr,
        "train/tokens_per_second": record.tokens_per_second,
    }
    if record.mfu is not None:
        values["train/mfu"] = record.mfu
    for layer in record.layers:
        tag = f"moe/layer_{layer.layer:02d}"
        values |= {
            f"{tag}/balance_loss": layer.balance_loss,
            f"{tag}/z_loss": layer.z_loss,
            f"{tag}/c_t": layer.c_t,
            f"{tag}/intra_collaboration": layer.intra_share,
            f"{tag}/load_max_over_mean": layer.load_max_over_mean,
            f"{tag}/bytes_sent": layer.bytes_sent,
        }
        values |= {f"{tag}/rows_sent/{name}": rows for name, rows in layer.rows_sent.items()}
    if record.layers:
        values["moe/c_t"] = sum(layer.c_t for layer in record.layers) / len(record.layers)
        values["moe/bytes_sent"] = sum(layer.bytes_sent for layer in record.layers)
    return values
