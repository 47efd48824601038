"""The fused layer in three nodes of the graph: rows out, experts, rows back. Symbols as in `fused.py`.

What is computed between them hides the way, in backward too: it meets the nodes in the opposite order, sends dy in the
last, computes in the middle one and waits for dx in the first. Results are those of the one node of `fused.py`.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from occult_train.moe.fused_backward import Backward
from occult_train.moe.fused_forward import Forward
from occult_train.moe.fused_steps import Steps
from occult_train.moe.lane import BesideLane
from occult_train.moe.routes import find_routes

if TYPE_CHECKING:
    from occult_train.moe.fused import FusedExperts


class Stages:
    """One pass of a layer, forth and back, as its nodes share it. It holds no tensor of the graph.

    Backward runs the nodes' second halves: `send_gradient`, `compute_gradients`, `input_gradients`.
    """

    steps: Steps
    kept: list[Tensor] | None
    _inputs: tuple[Tensor, ...]

    def __init__(
        self, layer: "FusedExperts", keep: bool, chunks: int, stamp: Callable[[str], None] | None = None
    ) -> None:
        """stamp: told when dy has `landed`, the gradients are `computed`, and dx is `combined`; it makes the first two
        wait for all rows."""
        self.layer, self.keep, self.chunks, self.stamp = layer, keep, chunks, stamp
        self.lane = BesideLane()
        self.forward: Forward | None = None
        self.backward: Backward | None = None

    def begin(self, x: Tensor, weights: Tensor, slots: Tensor) -> None:
        """Say what is to be dispatched; `send` does it, so that the device has other work before the host has."""
        self._inputs, self._start = (x, weights, slots), self.lane.mark()

    def send(self) -> None:
        """Dispatch, after what came before `begin` and beside what came since; the host waits as in `Forward.send`."""
        (x, weights, slots), self._inputs = self._inputs, ()
        layer, transport = self.layer, self.layer.transport
        with self.lane.aside(slots, after=self._start):
            room = layer.room if transport.one_sided else None
            routes = find_routes(
                slots, layer.grid, layer.num_experts, self.chunks, room, transport.gather, layer.to_host
            )
            self.forward = Forward(layer, routes, x, weights, (), self.keep, self.lane)
            self.forward.begin()
            self.forward.send()

    def land(self) -> None:
        """Wait for all rows, of forward or of its backward."""
        under_way = self.forward or self.backward
        assert under_way is not None
        self.lane.join()
        for segment in under_way.steps.segments:
            if segment.chunk is not None:
                under_way.exchange.arrived(segment.chunk)

    def compute(self, experts: tuple[Tensor, ...]) -> None:
        """The experts on each chunk as it arrives, and its way back."""
        assert self.forward is not None
        self.lane.join()
        self.forward.experts = experts
        self.forward.compute()
        self.forward.settle()
        self.forward.experts = ()

    def finish(self) -> Tensor:
        """Combine, [T, H]."""
        assert self.forward is not None
        self.lane.join()
        y = self.forward.combine()
        self.steps, self.kept, self.forward = self.forward.steps, self.forward.kept, None
        return y

    def send_gradient(self, dy: Tensor, x: Tensor, weights: Tensor) -> None:
        """As `begin` and `send`, of dy."""
        if self.kept is None:
            raise RuntimeError("the fused layer frees what it keeps as backward uses it, so backward runs only once")
        kept, self.kept = self.kept, None
        self.backward = Backward(self.steps, (x, weights), kept, dy.contiguous(), self.lane)
        with self.lane.aside():
            self.backward.begin()

    def compute_gradients(self, experts: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """As `compute`, of dx; the gradients of w1, w2 and w3 are computed while it travels."""
        assert self.backward is not None
        self.lane.join()
        if self.stamp is not None:
            self.land()
            self.stamp("landed")
        self.backward.inputs(experts, needs)
        gradients = self.backward.weight_gradients()
        if self.stamp is not None:
            self.stamp("computed")
        return gradients

    def input_gradients(self) -> tuple[Tensor, Tensor | None]:
        """As `finish`, of dx and the weights' gradient."""
        assert self.backward is not None
        self.lane.join()
        gradients = self.backward.combine()
        self.backward = None
        if self.stamp is not None:
            self.stamp("combined")
        return gradients


class Begin(torch.autograd.Function):
    """What this and `Compute` return holds no values: it leads gradients here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, slots: Tensor, stages: Stages) -> Tensor:
        ctx.stages = stages
        stages.begin(x, weights, slots)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.stages.input_gradients(), None, None)  # slots, stages


class Compute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, begun: Tensor, stages: Stages, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        ctx.stages = stages
        ctx.save_for_backward(w1, w2, w3)
        stages.compute((w1, w2, w3))
        return begun.new_empty(0)

    @staticmethod
    def backward(ctx: Any, nothing: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.stages.compute_gradients(ctx.saved_tensors, ctx.needs_input_grad[2:])
        if not ctx.needs_input_grad[0]:  # nobody else will wait for dx, which was sent all the same
            ctx.stages.input_gradients()
        return nothing, None, *gradients  # stages


class Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, computed: Tensor, x: Tensor, weights: Tensor, stages: Stages) -> Tensor:
        ctx.stages = stages
        ctx.save_for_backward(x, weights)
        return stages.finish()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ctx.stages.send_gradient(dy, *ctx.saved_tensors)
        return dy.new_empty(0), None, None, None  # x and weights, whose gradients `Begin` gives; stages
