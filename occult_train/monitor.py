"""What a run writes down: TensorBoard through DeepSpeed's monitor, `log.jsonl`, and a progress bar."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from occult_train.moe.collaboration import CollaborationCounts, CollaborationMeter
from occult_train.moe.layer import MoELayer
from occult_train.parallel.traffic import PASSES

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "4090": 165e12}
"""Datasheet bf16 rate without sparsity, by a part of the device's name."""


@dataclass
class LayerRecord:
    """One MoE layer over one optimizer step, summed over ranks."""

    layer: int
    c_t: float
    intra_share: float
    load_max_over_mean: float
    rows_sent: dict[str, int]
    bytes_sent: int
    copies_rows: int
    """Rows that K copies would have sent in the same four passes."""
    copies_bytes: int


@dataclass
class StepRecord:
    """One logged optimizer step."""

    step: int
    loss: float
    balance_loss: float
    z_loss: float
    grad_norm: float
    lr: float
    tokens: int
    """Consumed so far."""
    tokens_per_second: float
    mfu: float | None
    layers: list[LayerRecord] = field(default_factory=list)


def peak_flops() -> float | None:
    """Datasheet FLOP/s of this rank's device in bf16, or None where it is not known (CPUs)."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((rate for part, rate in PEAK_FLOPS.items() if part in name), None)


class RoutingMeter:
    """Traffic and collaboration of all MoE layers over the micro-batches of one logged step."""

    def __init__(self, layers: dict[int, MoELayer], device: torch.device) -> None:
        self.layers, self.device = layers, device

    def start(self) -> None:
        """Count from here, from zero."""
        for layer in self.layers.values():
            layer.meter.enabled = True
            layer.meter.drain(self.device)
            layer.dispatcher.traffic.drain()

    def finish(self, loads: Tensor, row_bytes: int) -> list[LayerRecord]:
        """Stop counting and sum over ranks. Collective.

        Args:
            loads: [Lm, E] tokens per expert over the global batch.
            row_bytes: bytes of one token row on the wire.
        """
        rows = []
        for layer in self.layers.values():
            layer.meter.enabled = False
            traffic = layer.dispatcher.traffic.drain()
            sent = [traffic.rows_sent[p] for p in PASSES] + [sum(traffic.bytes_sent.values())]
            counted = torch.tensor(sent, dtype=torch.float64, device=self.device)
            rows.append(torch.cat((layer.meter.drain(self.device), counted)))
        table = torch.stack(rows)
        dist.all_reduce(table)
        ratios = (loads.amax(dim=1) / loads.double().mean(dim=1)).tolist()
        return [
            _layer_record(index, values, ratio, row_bytes)
            for index, values, ratio in zip(self.layers, table.tolist(), ratios, strict=True)
        ]


def _layer_record(index: int, values: list[float], load_ratio: float, row_bytes: int) -> LayerRecord:
    counts = CollaborationCounts(*values[: CollaborationMeter.FIELDS])
    sent = [int(v) for v in values[CollaborationMeter.FIELDS :]]
    copies = int(counts.remote_experts)
    return LayerRecord(
        layer=index,
        c_t=counts.c_t,
        intra_share=counts.intra_share,
        load_max_over_mean=load_ratio,
        rows_sent=dict(zip(PASSES, sent[:4], strict=True)),
        bytes_sent=sent[4],
        copies_rows=4 * copies,
        # beside its row, a copy carries an expert id and a weight out, and the weight's gradient back
        copies_bytes=copies * (4 * row_bytes + 12),
    )


class Monitor:
    """Writes records on rank 0; on other ranks it does nothing.

    Args:
        output: the run's folder.
        summary: DeepSpeed's TensorBoard SummaryWriter on rank 0, else None.
        steps: of the whole run, for the progress bar.
    """

    def __init__(self, output: Path, summary: Any, rank: int, steps: int, resolved: str) -> None:
        self.main, self.path, self.summary = rank == 0, output / "log.jsonl", summary
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
            self.summary.add_text("config", "```yaml\n" + resolved + "```")

    def start(self, step: int) -> None:
        """Begin or continue at `step`: later lines of the log, of a run that went further, are dropped."""
        if not self.main:
            return
        kept = []
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if json.loads(line)["step"] <= step]
        self.path.write_text("".join(line + "\n" for line in kept))
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
        self._append({"kind": "step", "time": time.time(), **asdict(record)})
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
        self._append({"kind": "evaluation", "time": time.time(), "step": step, "loss": loss, "sequences": sequences})
        self.say(f"step {step}: held-out loss {loss:.4f} over {sequences} sequences")
        self._scalars(step, {"evaluation/loss": loss})

    def histograms(self, step: int, layers: list[int], loads: Tensor) -> None:
        """Expert loads [Lm, E] as one histogram a layer: how many experts got how many tokens."""
        if self.summary is None:
            return
        for layer, counts in zip(layers, loads.cpu(), strict=True):
            self.summary.add_histogram(f"moe/layer_{layer:02d}/tokens_per_expert", counts, step)

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        if self.summary is not None:
            for tag, value in values.items():
                self.summary.add_scalar(tag, value, step)
            self.summary.flush()

    def _append(self, record: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


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
