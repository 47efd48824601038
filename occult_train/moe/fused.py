"""Dispatch, experts and combine in one differentiable function: Occult's data flow on Triton kernels.

T tokens, H width, K experts a token, L experts here, F expert width, X expanded rows (token, expert) on this device,
R rows that arrived, D devices, G segments (kernels/positions).

Kept for backward, beside the inputs: the R rows that arrived, each H values and 2K words; the pre-activations, 2·X·F
values; and (2K + D)·T integers of 4 bytes. No expanded copy of rows, no expert output. With `recompute` the
pre-activations are not kept either. Each is freed as soon as backward has used it, so backward runs only once. Where
memory is made before the counts are known (`Room`), it may be for some more rows, at most half as many again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from occult_train.kernels.gather_matmul.kernel import gather_swiglu
from occult_train.kernels.grouped_matmul import kernel as triton_matmul
from occult_train.kernels.grouped_matmul import library as library_matmul
from occult_train.moe.fused_backward import Backward
from occult_train.moe.fused_forward import Forward
from occult_train.moe.routes import HostCopy, Room, find_routes
from occult_train.moe.transport import CollectiveTransport, HostTransport, SymmetricTransport, Transport
from occult_train.parallel.grid import Grid
from occult_train.parallel.traffic import Traffic

MATMULS: dict[str, Any] = {
    "triton": triton_matmul,
    "joint": SimpleNamespace(
        nt=triton_matmul.nt, nn=triton_matmul.nn, tn=triton_matmul.tn, gather_swiglu=gather_swiglu
    ),
    "mixed": SimpleNamespace(nt=triton_matmul.nt, nn=triton_matmul.nn, tn=library_matmul.tn),
    "library": library_matmul,
}
TRANSPORTS: dict[str, Callable[[Grid, Traffic], Transport]] = {
    "collective": CollectiveTransport,
    "symmetric": SymmetricTransport,
    "host": HostTransport,
}


@dataclass(frozen=True)
class Way:
    """One of several ways to compute the same."""

    matmul: str = "library"
    """library (torch's grouped product), triton, joint (triton, with gate, up and SwiGLU in one kernel), or mixed: the
    library's for weight gradients alone."""
    transport: str = "collective"
    """collective (all-to-all), symmetric (kernels write into the peers' memory) or host (copy engines, through pinned
    memory)."""
    chunks: int = 0
    """0 exchanges, then computes; n cuts the tokens in n chunks whose exchange and computing overlap."""


class FusedExperts:
    """The experts of one layer as a function; what it keeps for backward is in the head of this file."""

    def __init__(self, grid: Grid, num_experts: int, traffic: Traffic, way: Way, recompute: bool = False) -> None:
        if way.chunks and way.transport == "symmetric":
            raise ValueError(f"the symmetric transport moves all rows at once, but chunks={way.chunks}")
        self.grid, self.num_experts, self.way, self.recompute = grid, num_experts, way, recompute
        self.matmul = MATMULS[way.matmul]
        self.room: Room | None = None
        """For the next forward."""
        self.to_host = HostCopy()
        self.transport: Transport = TRANSPORTS[way.transport](grid, traffic)

    def __call__(
        self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor, w1: Tensor, w2: Tensor, w3: Tensor
    ) -> Tensor:
        """y[t] = sum over k of weights[t, k] * FFN_slots[t, k](x[t]), with FFN(x) = w2 (silu(w1 x) * w3 x).

        Args:
            x_TH: [T, H]; T may differ between ranks and be 0.
            slots_TK: [T, K] int64, K distinct slots a token, over all devices.
            weights_TK: [T, K].
            w1, w3: [L, F, H]; w2: [L, H, F]: the slots of this device.

        Returns:
            [T, H] in the type of x. Collective over the expert-parallel group, in backward too.

        Raises:
            ValueError: shapes or types that do not belong together.
        """
        if torch.compiler.is_compiling():  # nothing to be compiled in here
            return self._apart(x_TH, slots_TK, weights_TK, w1, w2, w3)
        self._check(x_TH, slots_TK, weights_TK, w1, w2, w3)
        inputs = (x_TH.contiguous(), weights_TK.float().contiguous(), w1, w2, w3)
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        return _Fused.apply(*inputs, slots_TK.contiguous(), self, keep)

    @torch.compiler.disable
    def _apart(self, *args: Tensor) -> Tensor:
        return self(*args)

    def _check(self, x: Tensor, slots: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> None:
        local, width, hidden = w1.shape
        if local * self.grid.expert_size != self.num_experts:
            raise ValueError(f"{local} experts here, {self.num_experts} on {self.grid.expert_size} devices")
        if w3.shape != w1.shape or tuple(w2.shape) != (local, hidden, width):
            raise ValueError(f"w1 {tuple(w1.shape)}, w2 {tuple(w2.shape)} and w3 {tuple(w3.shape)} do not fit together")
        if x.dim() != 2 or x.shape[1] != hidden or x.dtype != w1.dtype:
            raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, the experts take {w1.dtype} of width {hidden}")
        if slots.shape != weights.shape or slots.shape[0] != x.shape[0]:
            raise ValueError(f"{x.shape[0]} tokens, slots {tuple(slots.shape)}, weights {tuple(weights.shape)}")


class _Fused(torch.autograd.Function):
    """See `Forward` and `Backward`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        w1: Tensor,
        w2: Tensor,
        w3: Tensor,
        slots: Tensor,
        layer: FusedExperts,
        keep: bool,
    ) -> Tensor:
        transport, grid = layer.transport, layer.grid
        room = layer.room if transport.one_sided else None
        routes = find_routes(slots, grid, layer.num_experts, layer.way.chunks, room, transport.gather, layer.to_host)
        forward = Forward(layer, routes, x, weights, (w1, w2, w3), keep)
        y = forward.run()
        ctx.save_for_backward(x, weights, w1, w2, w3)
        ctx.steps, ctx.kept = forward.steps, forward.kept
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.kept is None:
            raise RuntimeError("the fused layer frees what it keeps as backward uses it, so backward runs only once")
        kept, ctx.kept = ctx.kept, None
        x, weights, *experts = ctx.saved_tensors
        backward = Backward(ctx.steps, (x, weights), kept, dy.contiguous())
        return (*backward.run(experts, ctx.needs_input_grad[2:5]), None, None, None)  # slots, layer, keep
