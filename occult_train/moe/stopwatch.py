"""When the steps of a forward pass, and of its backward, were done: on the GPU's clock or the host's."""

import time
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def _now() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _milliseconds(start: Any, end: Any) -> float:
    return (end - start) * 1e3 if isinstance(start, float) else float(start.elapsed_time(end))


class Stopwatch:
    """Of one pass: a list of what was done and when, for each direction. Durations are those since the line before."""

    def __init__(self) -> None:
        self._forward: list[tuple[str, Any]] = []
        self._backward: list[tuple[str, Any]] = []

    def stamp(self, name: str) -> None:
        """`name` is done in forward, as far as the current stream goes."""
        self._forward.append((name, _now()))

    def stamp_backward(self, name: str) -> None:
        """The same in backward."""
        self._backward.append((name, _now()))

    def node(self, x: Tensor, name: str) -> Tensor:
        """x; when its gradient is there, `name` is done in backward."""
        return _Node.apply(x, self, name)

    def forward(self) -> dict[str, float]:
        """Milliseconds by name, without the first's. The device must be done."""
        return _durations(self._forward)

    def backward(self) -> dict[str, float]:
        """As `forward`; empty if there was none."""
        return _durations(self._backward)


def _durations(stamps: list[tuple[str, Any]]) -> dict[str, float]:
    return {name: _milliseconds(before, now) for (_, before), (name, now) in pairwise(stamps)}


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, watch: Stopwatch, name: str) -> Tensor:
        ctx.watch, ctx.name = watch, name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.watch.stamp_backward(ctx.name)
        return grad, None, None  # watch, name
