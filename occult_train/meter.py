"""What one optimizer step did, summed over ranks: losses, and each MoE layer's traffic, collaboration and load."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from occult_train.models.gpt import Losses
from occult_train.moe.collaboration import CollaborationCounts, CollaborationMeter
from occult_train.moe.layer import MoELayer
from occult_train.parallel.traffic import PASSES

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "4090": 165e12}
"""Datasheet bf16 rate without sparsity, by a part of the device's name."""


@dataclass
class LayerRecord:
    """One MoE layer over one optimizer step, summed over ranks; the losses are means over micro-batches and ranks."""

    layer: int
    balance_loss: float
    """Unweighted, as is z_loss."""
    z_loss: float
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
    """Mean cross-entropy in nats."""
    balance_loss: float
    """Mean over layers, as is z_loss."""
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


class StepMeter:
    """Measures the micro-batches of one step. Lm MoE layers.

    Everything stays on the device until `finish`, which takes one collective and one copy to the host.

    Args:
        layers: the MoE layers by index.
        row_bytes: bytes of one token row on the wire.
    """

    def __init__(self, layers: dict[int, MoELayer], row_bytes: int, device: torch.device) -> None:
        self.layers, self.row_bytes, self.device = layers, row_bytes, device
        self._losses: list[Tensor] = []

    def start(self) -> None:
        """Count from here, from zero."""
        self._losses = []
        for layer in self.layers.values():
            layer.meter.enabled = True
            layer.meter.drain(self.device)
            layer.dispatcher.traffic.drain()

    def add(self, losses: Losses) -> None:
        """Take in the losses of a micro-batch."""
        self._losses.append(torch.cat((losses.cross_entropy[None], losses.balance_Lm, losses.z_Lm)).double())

    def finish(self, loads: Tensor) -> tuple[float, list[LayerRecord]]:
        """Stop counting and sum over ranks. Collective.

        Args:
            loads: [Lm, E] tokens per expert over the global batch, all ranks.

        Returns:
            the mean cross-entropy in nats, and the layers.
        """
        losses = torch.stack(self._losses).mean(dim=0) / dist.get_world_size()
        layers = torch.cat((losses[1:].view(2, -1).T, self._collaboration(), self._sent()), dim=1)
        sums = torch.cat((losses[:1], layers.flatten()))
        dist.all_reduce(sums)
        ratios = loads.amax(dim=1) / loads.double().mean(dim=1)
        table = torch.cat((sums[1:].view_as(layers), ratios[:, None]), dim=1)
        loss, *values = torch.cat((sums[:1], table.flatten())).tolist()
        width = table.shape[1]
        return loss, [self._record(index, values[i * width :][:width]) for i, index in enumerate(self.layers)]

    def _collaboration(self) -> Tensor:
        """[Lm, 6] of this rank."""
        for layer in self.layers.values():
            layer.meter.enabled = False
        return torch.stack([layer.meter.drain(self.device) for layer in self.layers.values()])

    def _sent(self) -> Tensor:
        """[Lm, 5] rows of each pass and all bytes, of this rank; the counts are on the host already."""
        drained = [layer.dispatcher.traffic.drain() for layer in self.layers.values()]
        sent = [[*(t.rows_sent[name] for name in PASSES), sum(t.bytes_sent.values())] for t in drained]
        return torch.tensor(sent, dtype=torch.float64, device=self.device)

    def _record(self, index: int, values: list[float]) -> LayerRecord:
        balance, z, *counted, ratio = values
        counts = CollaborationCounts(*counted[: CollaborationMeter.FIELDS])
        sent = [int(value) for value in counted[CollaborationMeter.FIELDS :]]
        copies = int(counts.remote_experts)
        return LayerRecord(
            layer=index,
            balance_loss=balance,
            z_loss=z,
            c_t=counts.c_t,
            intra_share=counts.intra_share,
            load_max_over_mean=ratio,
            rows_sent=dict(zip(PASSES, sent[:4], strict=True)),
            bytes_sent=sent[4],
            copies_rows=4 * copies,
            # beside its row, a copy carries an expert id and a weight out, and the weight's gradient back
            copies_bytes=copies * (4 * self.row_bytes + 12),
        )
