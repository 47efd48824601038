"""The fused layer's backward. Symbols as in `fused.py`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from occult_train.kernels.movers import kernel as movers
from occult_train.kernels.movers.reference import Wire
from occult_train.kernels.swiglu import kernel as swiglu
from occult_train.moe.fused_steps import EXTRAS, Steps
from occult_train.moe.lane import HERE, Lane
from occult_train.moe.routes import Segment
from occult_train.moe.transport import Back


class Backward:
    """dy goes the way of x, dx that of y: 1 dispatch dy; for each segment 2 expand dy, 3 back through w2 and SwiGLU,
    4 back through w1 and w3, merge and give back; 5 weight gradients; 6 combine at home.

    With several segments, or with rows on a lane of their own, the weight gradients come last, computed while dx
    travels. Else w2's comes before step 4, so that the expanded dy need not live beside the expanded dx; and where
    nothing travels by then, step 6 comes before the gradients of w1 and w3, so that the expanded dx need not live
    beside the expanded x.

    Args:
        saved: x, weights.
        kept: the forward's, which is emptied.
    """

    def __init__(
        self, steps: Steps, saved: Sequence[Tensor], kept: list[Tensor], dy: Tensor, lane: Lane = HERE
    ) -> None:
        self.x, self.weights = saved
        self.steps, self.dy, self.lane = steps, dy, lane
        self.kept = kept
        self.single = len(steps.segments) == 1
        hidden = dy.shape[1]
        self.rows_XH: Tensor | None = dy.new_empty(steps.segments[-1].end, hidden)
        self.out, self.back = (Wire(hidden, self.weights.shape[1], dy.dtype, extras) for extras in (0, 1))
        self.arrived: list[Tensor | None] = []
        self.own_dx: list[Tensor] = []
        self.own_scalar: Tensor | None = None
        self.early: movers.Own | None = None
        """Own rows of dy, expanded while dy is sent."""
        self.dw2: Tensor | None = None

    def run(self, experts: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """Gradients of x, weights, w1, w2 and w3.

        Args:
            experts: w1, w2, w3.
            needs: of which of them a gradient is wanted.
        """
        self.begin()
        self.inputs(experts, needs)
        arrived = self.single and (self.exchange.shared or self.steps.segments[0].chunk is None)
        gradients = self.combine() if arrived else None
        dw1, dw2, dw3 = self.weight_gradients()
        dx, dweights = gradients or self.combine()
        return dx, dweights, dw1, dw2, dw3

    def begin(self) -> None:
        """Step 1."""
        steps = self.steps
        passes, own = ("combine_backward", "dispatch_backward"), None
        if not steps.recompute:  # else their room is needed for x first
            assert self.rows_XH is not None
            rows = steps.segments[0].rows
            weight_X = torch.empty(rows, dtype=torch.float32, device=self.dy.device)
            own = movers.Own(steps.routes.own_TK, self.rows_XH[:rows], self.weights, weight_X)
        self.early = own
        self.exchange = steps.transport.begin(self.dy, steps.routes, (self.out, self.back), passes, None, own)
        self.exchange.go(steps.counts)

    def inputs(self, experts: Sequence[Tensor], needs: Sequence[bool]) -> None:
        """Steps 2 to 4. Arguments as of `run`."""
        self.w1, self.w2, self.w3 = experts
        self.needs = needs
        rows, width = self.steps.segments[-1].end, self.w1.shape[1]
        self.both_X2F = self.dy.new_empty(rows, 2 * width)
        self.weighted_XF: Tensor | None = None if self.single else self.dy.new_empty(rows, width)
        for g, segment in enumerate(self.steps.segments):
            scalar_X = self._activations(g, segment)
            if self.single and not self.lane.apart:
                self._down_gradient()
            self._give_back(g, segment, scalar_X)

    def weight_gradients(self) -> tuple[Tensor | None, ...]:
        """Step 5: of w1, w2 and w3."""
        if self.rows_XH is not None:
            self._down_gradient()
        dw1, dw3 = self._gate_up_gradients()
        self.arrived.clear()
        del self.both_X2F, self.dy, self.w1, self.w2, self.w3  # step 6 needs none of it, and may be far off
        return dw1, self.dw2, dw3

    def _activations(self, g: int, segment: Segment) -> Tensor:
        """Steps 2 and 3. Returns the gradients [X] of the segment's weights."""
        steps, here = self.steps, slice(segment.start, segment.end)
        assert self.rows_XH is not None
        activations = None if steps.recompute else (self.kept.pop(0), self.kept.pop(0))
        arrived = None if segment.chunk is None else self.kept.pop(0)
        self.arrived.append(arrived)
        sources = steps.sources(segment, self.x, self.weights, arrived)
        rows_XH = self.rows_XH[here]
        if activations is None:
            activations = steps.gate_up(steps.expand(sources, segment, rows_XH), self.w1, self.w3, g)
        dy_rows = [self.dy] if segment.own else []
        if segment.chunk is not None:
            dy_rows.append(self.out.values(self.exchange.arrived(segment.chunk)))
        weight_X, scalar_X = (torch.empty(segment.rows, dtype=torch.float32, device=self.dy.device) for _ in range(2))
        dy_sources = [(rows, *rest) for rows, (_, *rest) in zip(dy_rows, sources, strict=True)]
        if segment.own and self.early is not None:
            assert self.early.weight_X is not None
            dy_sources, weight_X = dy_sources[1:], self.early.weight_X
            self.early = None  # it holds the rows' memory
        steps.expand(dy_sources, segment, rows_XH, weight_X)
        grad = steps.matmul.nn(rows_XH, self.w2, steps.routes.layout.relative_GL[g])
        weighted = grad if self.weighted_XF is None else self.weighted_XF[here]
        swiglu.backward(*activations, grad, weight_X, self.both_X2F[here], weighted, scalar_X)
        if self.single:
            self.weighted_XF = weighted
        return scalar_X

    def _down_gradient(self) -> None:
        """Step 5 for w2, after which the expanded dy is not needed."""
        assert self.rows_XH is not None
        assert self.weighted_XF is not None
        if self.needs[1]:
            self.dw2 = self.steps.weight_gradient(self.rows_XH, self.weighted_XF)
        self.rows_XH = self.weighted_XF = None

    def _give_back(self, g: int, segment: Segment, scalar_X: Tensor) -> None:
        """Step 4."""
        here, arrived = slice(segment.start, segment.end), self.arrived[g]
        dx_rows = self.steps.input_gradient(self.both_X2F[here], self.w1, self.w3, g)
        if arrived is not None and segment.chunk is not None:
            wire = Wire(self.x.shape[1], self.weights.shape[1], self.x.dtype, EXTRAS)
            position = wire.extra(arrived, 0, torch.int32)
            back = Back(dx_rows, position, segment.start, scalar_X=scalar_X)
            with self.lane.aside(*dx_rows, scalar_X):
                self.exchange.give_back(segment.chunk, back)
        if segment.own:
            self.own_dx, self.own_scalar = dx_rows, scalar_X

    def combine(self) -> tuple[Tensor, Tensor | None]:
        """Step 6: the gradients of x and of the weights."""
        own_dx, self.own_dx = self.own_dx, []
        routes = self.steps.routes
        return movers.combine(
            own_dx, routes.own_TK, self.exchange.returned(), routes.send_TD, self.back,
            scalar_X=self.own_scalar, slots_TK=routes.slots_TK, local=routes.geometry.local,
        )  # fmt: skip

    def _gate_up_gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Step 5 for w1 and w3, from x expanded anew."""
        if not (self.needs[0] or self.needs[2]):
            return None, None
        x_XH = self.x.new_empty(len(self.both_X2F), self.x.shape[1])
        for segment, arrived in zip(self.steps.segments, self.arrived, strict=True):
            here = slice(segment.start, segment.end)
            self.steps.expand(self.steps.sources(segment, self.x, self.weights, arrived), segment, x_XH[here])
        gate, up = self.both_X2F.chunk(2, dim=1)
        return self.steps.weight_gradient(gate, x_XH), self.steps.weight_gradient(up, x_XH)
