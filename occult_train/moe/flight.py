"""Dispatch, experts and combine in stages, so that other things can be computed while rows are under way."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from occult_train.moe.dispatch import Dispatched, Dispatcher
from occult_train.moe.experts import Experts
from occult_train.moe.fused import FusedExperts
from occult_train.moe.fused_staged import Begin, Compute, Finish, Stages
from occult_train.moe.stopwatch import Stopwatch

Inputs = tuple[Tensor, Tensor, Tensor]
"""x [T, H], slots [T, K], weights [T, K]."""


class Flight(Protocol):
    """Tokens on their way through the experts. Making one begins it; then `send`, `compute`, `finish`, once each, all
    collective. Backward runs through the same stages from behind."""

    def send(self) -> None:
        """What dispatch leaves undone for the host's sake, which waits here until it knows how many rows there are:
        something else should have been launched since the beginning."""
        ...

    def compute(self) -> None:
        """The experts, as rows arrive; then their results are under way."""
        ...

    def finish(self) -> Tensor:
        """The sums [T, H] at home."""
        ...


class PlainFlight:
    """By a dispatcher."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        experts: Callable[[Dispatched], Tensor],
        inputs: Inputs,
        watch: Stopwatch | None = None,
    ) -> None:
        self.dispatcher, self.experts, self.watch = dispatcher, experts, watch
        x, slots, weights = inputs
        self._land = dispatcher.send(x if watch is None else watch.node(x, "combined"), slots, weights)

    def send(self) -> None:
        """All is sent."""

    def compute(self) -> None:
        """As `Flight.compute`."""
        dispatched, watch = self._land(), self.watch
        if watch is None:
            self._end = self.dispatcher.send_back(self.experts(dispatched), dispatched)
            return
        watch.stamp("landed")
        rows = watch.node(dispatched.rows_RH, "computed")
        dispatched = Dispatched(rows, dispatched.ids_RM, dispatched.weights_RM, dispatched.hops)
        rows = watch.node(self.experts(dispatched), "landed")
        watch.stamp("computed")
        self._end = self.dispatcher.send_back(rows, dispatched)

    def finish(self) -> Tensor:
        """As `Flight.finish`."""
        y = self._end()
        if self.watch is not None:
            self.watch.stamp("combined")
        return y


class FusedFlight:
    """By the fused layer."""

    def __init__(
        self, fused: FusedExperts, experts: Experts, inputs: Inputs, chunks: int, watch: Stopwatch | None = None
    ) -> None:
        x, slots, weights = inputs
        self.experts, self.watch = experts, watch
        self.x, self.weights = x.contiguous(), weights.float().contiguous()
        learning = any(t.requires_grad for t in (x, weights, *experts.parameters()))
        keep = torch.is_grad_enabled() and learning
        self.stages = Stages(fused, keep, chunks, None if watch is None else watch.stamp_backward)
        self._begun = Begin.apply(self.x, self.weights, slots.contiguous(), self.stages)

    def send(self) -> None:
        """As `Flight.send`."""
        self.stages.send()

    def compute(self) -> None:
        """As `Flight.compute`."""
        stages = self.stages
        if self.watch is not None:
            stages.land()
            self.watch.stamp("landed")

        def function(begun: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
            return Compute.apply(begun, stages, w1, w2, w3)

        self._computed = self.experts(self._begun, function=function)
        if self.watch is not None:
            self.watch.stamp("computed")

    def finish(self) -> Tensor:
        """As `Flight.finish`."""
        y = Finish.apply(self._computed, self.x, self.weights, self.stages)
        if self.watch is not None:
            self.watch.stamp("combined")
        return y
