"""The steps that the fused layer's forward and backward share. Symbols as in `fused.py`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from occult_train.kernels.grouped_matmul import library
from occult_train.kernels.movers import kernel as movers
from occult_train.kernels.movers.reference import Wire
from occult_train.kernels.swiglu import kernel as swiglu
from occult_train.moe.routes import Counts, Routes, Segment
from occult_train.moe.transport import Transport

EXTRAS = 2
"""Of a row on its way out in forward: expanded positions and weights."""
Source = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Rows [N, H], the expanded rows that each goes to [N, K], weights [N, K]; and, if only the device knows how many of
the rows there are, numbers of which the last tells."""


@dataclass(frozen=True)
class Steps:
    """One forward's plan, and the steps that backward takes again."""

    matmul: Any
    """Has nt, nn and tn of kernels/grouped_matmul, and perhaps gather_swiglu of kernels/gather_matmul."""
    transport: Transport
    routes: Routes
    counts: Counts
    recompute: bool

    @property
    def segments(self) -> list[Segment]:
        """In the order in which they are computed."""
        return self.counts.segments

    def sources(self, segment: Segment, x: Tensor, weights: Tensor, arrived: Tensor | None) -> list[Source]:
        """Where a segment's expanded rows come from: this rank's tokens, rows that arrived, or both."""
        found: list[Source] = [(x, self.routes.own_TK, weights, None)] if segment.own else []
        if arrived is not None:
            wire = Wire(x.shape[1], weights.shape[1], x.dtype, EXTRAS)
            extras = wire.extra(arrived, 0, torch.int32), wire.extra(arrived, 1, torch.float32)
            found.append((wire.values(arrived), *extras, self.routes.layout.arrive_D if self.counts.guessed else None))
        return found

    def expand(self, sources: list[Source], segment: Segment, out: Tensor, weight_X: Tensor | None = None) -> Tensor:
        """Write the segment's expanded rows [X, H], grouped by expert, into out, which is returned; and their weights
        into weight_X."""
        for rows, position, weight, arrive_D in sources:
            movers.expand(rows, position, out, weight, weight_X, segment.start, arrive_D)
        return out

    def gate_up(self, x_XH: Tensor, w1: Tensor, w3: Tensor, g: int) -> tuple[Tensor, Tensor]:
        """Pre-activations [X, F] of segment g."""
        ends = self.routes.layout.relative_GL[g]
        return self.matmul.nt(x_XH, w1, ends), self.matmul.nt(x_XH, w3, ends)

    def activations(self, x_XH: Tensor, w1: Tensor, w3: Tensor, g: int, keep: bool) -> tuple[list[Tensor], Tensor]:
        """Pre-activations [X, F] of segment g if they are to be kept, and what goes into the down projection."""
        if hasattr(self.matmul, "gather_swiglu"):
            found = self.matmul.gather_swiglu(x_XH, None, w1, w3, self.routes.layout.relative_GL[g], keep)
            return ([*found[:2]], found[2]) if keep else ([], found)
        gate, up = self.gate_up(x_XH, w1, w3, g)
        return [gate, up] if keep else [], swiglu.forward(gate, up)

    def input_gradient(self, both_X2F: Tensor, w1: Tensor, w3: Tensor, g: int) -> list[Tensor]:
        """Terms [X, H] whose sum is the gradient of the expanded rows: two of the library's, which merging adds in
        fp32, or one of ours."""
        ends, (gate, up) = self.routes.layout.relative_GL[g], both_X2F.chunk(2, dim=1)
        if self.matmul is library:
            return [self.matmul.nn(gate, w1, ends), self.matmul.nn(up, w3, ends)]
        return [self.matmul.nn(gate, w1, ends, up, w3)]

    def weight_gradient(self, a_XM: Tensor, b_XN: Tensor) -> Tensor:
        """[L, M, N]: a^T b over the rows of each expert in all segments."""
        ends_GL = self.routes.layout.ends_GL
        segments = len(ends_GL)
        if segments == 1 or self.matmul.tn is not library.tn:
            return self.matmul.tn(a_XM, b_XN, ends_GL.view(-1), **({} if segments == 1 else {"segments": segments}))
        # the library knows no segments: a group each, then their sum
        parts = library.tn(a_XM, b_XN, ends_GL.view(-1))
        return parts.view(*ends_GL.shape, *parts.shape[1:]).sum(0)
