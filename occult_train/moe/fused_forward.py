"""The fused layer's forward. Symbols as in `fused.py`."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from occult_train.kernels.movers import kernel as movers
from occult_train.kernels.movers.reference import Wire
from occult_train.kernels.swiglu import kernel as swiglu
from occult_train.moe.fused_steps import EXTRAS, Steps
from occult_train.moe.routes import Routes, Segment
from occult_train.moe.transport import Back

if TYPE_CHECKING:
    from occult_train.moe.fused import FusedExperts


class Forward:
    """1 dispatch; for each segment 2 expand, 3 gate and up, SwiGLU, down, 4 merge and give back; 5 combine at home.

    The host knows the numbers of rows only once the routing has come back from the device, the one time it waits in a
    layer. By then dispatch and the expansion of own rows are under way: into memory for as many rows as there were at
    most so far, and again if that was too little.
    """

    def __init__(
        self, layer: "FusedExperts", routes: Routes, x: Tensor, weights: Tensor, experts: tuple[Tensor, ...], keep: bool
    ) -> None:
        self.layer, self.routes, self.x, self.weights, self.keep = layer, routes, x, weights, keep
        self.w1, self.w2, self.w3 = experts
        self.out, self.back = (Wire(x.shape[1], weights.shape[1], x.dtype, extras) for extras in (EXTRAS, 0))
        self.kept: list[Tensor] = []
        """For backward: of each segment the pre-activations, unless recomputed, then the rows that arrived."""
        self.own_y: list[Tensor] = []

    def run(self) -> Tensor:
        """[T, H]."""
        self._dispatch()
        for g, segment in enumerate(self.steps.segments):
            arrived = None if segment.chunk is None else self.exchange.arrived(segment.chunk)
            y_XH = self._experts(g, self._expand(g, segment, arrived))
            if arrived is not None:
                self._give_back(segment, arrived, y_XH)
            if segment.own:
                self.own_y = [y_XH]
            del y_XH
        routes = self.routes
        returned = self.exchange.returned()
        return movers.combine(self.own_y, routes.own_TK, returned, routes.send_TD, self.back, self.weights)[0]

    def _dispatch(self) -> None:
        """Step 1, and what of step 2 can begin."""
        layer, routes, x = self.layer, self.routes, self.x
        self.exchange = layer.transport.begin(x, routes, self.out, ("dispatch", "combine"), self.weights)
        self.early_XH: Tensor | None = x.new_empty(layer.expected_rows, x.shape[1])
        movers.expand(x, routes.own_TK, self.early_XH)
        counts = routes.counts()
        self.exchange.go(counts)
        self.steps = Steps(layer.matmul, layer.transport, routes, counts, layer.recompute)
        layer.expected_rows = max(layer.expected_rows, counts.segments[0].rows)

    def _expand(self, g: int, segment: Segment, arrived: Tensor | None) -> Tensor:
        """Step 2."""
        sources = self.steps.sources(segment, self.x, self.weights, arrived)
        early_XH, self.early_XH = self.early_XH, None
        if g == 0 and early_XH is not None and len(early_XH) >= segment.rows:
            return self.steps.expand(sources[1:], segment, early_XH[: segment.rows])
        return self.steps.expand(sources, segment, self.x.new_empty(segment.rows, self.x.shape[1]))

    def _experts(self, g: int, x_XH: Tensor) -> Tensor:
        """Step 3: [X, H] -> [X, H]."""
        gate, up = self.steps.gate_up(x_XH, self.w1, self.w3, g)
        if self.keep and not self.layer.recompute:
            self.kept += [gate, up]
        return self.layer.matmul.nt(swiglu.forward(gate, up), self.w2, self.routes.layout.relative_GL[g])

    def _give_back(self, segment: Segment, arrived: Tensor, y_XH: Tensor) -> None:
        """Step 4."""
        if self.keep:  # first: once all have given back, peers may overwrite shared memory
            self.kept.append(arrived.clone() if self.exchange.shared else arrived)
        assert segment.chunk is not None
        position, weight = self.out.extra(arrived, 0, torch.int32), self.out.extra(arrived, 1, torch.float32)
        self.exchange.give_back(segment.chunk, Back([y_XH], position, segment.start, weight), self.back)
