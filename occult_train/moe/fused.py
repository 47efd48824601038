"""Dispatch, experts and combine in one differentiable function: Occult's data flow on Triton kernels.

T tokens, H width, K experts a token, L experts here, F expert width, X expanded rows (token, expert) on this device,
R rows that arrived, D devices, G segments (kernels/positions).

Kept for backward, beside the inputs: the R rows that arrived, each H values and 2K words; the pre-activations, 2·X·F
values; and (2K + D)·T integers of 4 bytes. No expanded copy of rows, no expert output. With `recompute` the
pre-activations are not kept either.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from occult_train.kernels.grouped_matmul import kernel as triton_matmul
from occult_train.kernels.grouped_matmul import library as library_matmul
from occult_train.kernels.movers import kernel as movers
from occult_train.kernels.movers.reference import Wire
from occult_train.kernels.swiglu import kernel as swiglu
from occult_train.moe.routes import Routes, Segment, find_routes
from occult_train.moe.transport import Back, CollectiveTransport, SymmetricTransport, Transport
from occult_train.parallel.grid import Grid
from occult_train.parallel.traffic import Traffic

MATMULS: dict[str, ModuleType] = {"library": library_matmul, "triton": triton_matmul}
TRANSPORTS: dict[str, Callable[[Grid, Traffic], Transport]] = {
    "collective": CollectiveTransport,
    "symmetric": SymmetricTransport,
}


@dataclass(frozen=True)
class Way:
    """One of several ways to compute the same."""

    matmul: str = "library"
    """library (torch's grouped product) or triton."""
    transport: str = "collective"
    """collective (all-to-all) or symmetric (kernels write into the peers' memory)."""
    chunks: int = 0
    """0 exchanges, then computes; n cuts the tokens in n chunks whose exchange and computing overlap."""


class FusedExperts:
    """The experts of one layer as a function; what it keeps for backward is in the head of this file."""

    def __init__(self, grid: Grid, num_experts: int, traffic: Traffic, way: Way, recompute: bool = False) -> None:
        if way.chunks and way.transport == "symmetric":
            raise ValueError(f"the symmetric transport moves all rows at once, but chunks={way.chunks}")
        self.grid, self.num_experts, self.way, self.recompute = grid, num_experts, way, recompute
        self.matmul = MATMULS[way.matmul]
        self.transport: Transport = TRANSPORTS[way.transport](grid, traffic)

    @torch.compiler.disable
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
        self._check(x_TH, slots_TK, weights_TK, w1, w2, w3)
        return _Fused.apply(x_TH.contiguous(), weights_TK.float().contiguous(), w1, w2, w3, slots_TK.contiguous(), self)

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


@dataclass(frozen=True)
class _Saved:
    """What backward reads, but for the tensors that autograd keeps."""

    layer: FusedExperts
    routes: Routes
    segments: list[Segment]


class _Fused(torch.autograd.Function):
    """Forward: 1 routes, 2 dispatch; for each segment 3 expand, 4 gate and up, 5 SwiGLU, 6 down, 7 merge and give back;
    8 combine at home. Backward: dy goes the way of x and dx that of y; weight gradients while dx travels."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, slots: Tensor, layer: FusedExperts
    ) -> Tensor:
        routes = find_routes(slots, layer.grid, layer.num_experts, layer.way.chunks)
        out, back = (Wire(x.shape[1], slots.shape[1], x.dtype, extras) for extras in (2, 0))
        exchange, counts = layer.transport.send(x, routes, out, ("dispatch", "combine"), weights)
        keep = any(ctx.needs_input_grad)
        kept: list[Tensor] = []
        own_y: list[Tensor] = []
        for g, segment in enumerate(counts.segments):
            ends = routes.layout.relative_GL[g]
            arrived = None if segment.chunk is None else exchange.arrived(segment.chunk)
            if keep and arrived is not None:  # before giving back: then a peer may overwrite shared memory
                kept += [arrived.clone() if exchange.shared else arrived]
            x_XH = x.new_empty(segment.rows, x.shape[1])
            for rows, position, _ in _sources(segment, x, weights, routes, arrived, out):
                movers.expand(rows, position, x_XH, start=segment.start)
            gate, up = _gate_up(layer, x_XH, w1, w3, ends)
            del x_XH
            y_XH = layer.matmul.nt(swiglu.forward(gate, up), w2, ends)
            if segment.own:
                own_y = [y_XH]
            if arrived is not None and segment.chunk is not None:
                position, weight = out.extra(arrived, 0, torch.int32), out.extra(arrived, 1, torch.float32)
                exchange.give_back(segment.chunk, Back([y_XH], position, segment.start, weight), back)
            if keep and not layer.recompute:
                kept += [gate, up]
            del gate, up, y_XH
        ctx.save_for_backward(x, weights, w1, w2, w3, *kept)
        ctx.saved = _Saved(layer, routes, counts.segments)
        return movers.combine(own_y, routes.own_TK, exchange.returned(), routes.send_TD, back, weights)[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, w1, w2, w3, *kept = ctx.saved_tensors
        layer, routes, segments = ctx.saved.layer, ctx.saved.routes, ctx.saved.segments
        k, width, local, total = weights.shape[1], w1.shape[1], routes.geometry.local, segments[-1].end
        dy = dy.contiguous()
        out, back, first = (Wire(x.shape[1], k, x.dtype, extras) for extras in (0, 1, 2))
        exchange, _ = layer.transport.send(dy, routes, out, ("combine_backward", "dispatch_backward"), None)
        rows_XH, both_X2F = dy.new_empty(total, x.shape[1]), dy.new_empty(total, 2 * width)
        weighted_XF = dy.new_empty(total, width)
        arrivals: list[Tensor | None] = []
        own_dx: list[Tensor] = []
        own_scalar = None
        waiting = iter(kept)
        for g, segment in enumerate(segments):
            here, ends = slice(segment.start, segment.end), routes.layout.relative_GL[g]
            arrived = None if segment.chunk is None else next(waiting)
            arrivals.append(arrived)
            arrived_dy = None if segment.chunk is None else out.values(exchange.arrived(segment.chunk))
            weight_X = torch.empty(segment.rows, dtype=torch.float32, device=dy.device)
            x_sources = _sources(segment, x, weights, routes, arrived, first)
            dy_sources = [dy] * segment.own + ([arrived_dy] if arrived_dy is not None else [])
            for rows, (_, position, weight) in zip(dy_sources, x_sources, strict=True):
                movers.expand(rows, position, rows_XH[here], weight, weight_X, segment.start)
            if layer.recompute:
                x_XH = x.new_empty(segment.rows, x.shape[1])
                for rows, position, _ in x_sources:
                    movers.expand(rows, position, x_XH, start=segment.start)
                gate, up = _gate_up(layer, x_XH, w1, w3, ends)
                del x_XH
            else:
                gate, up = next(waiting), next(waiting)
            grad = layer.matmul.nn(rows_XH[here], w2, ends)
            scalar = torch.empty(segment.rows, dtype=torch.float32, device=dy.device)
            swiglu.backward(gate, up, grad, weight_X, both_X2F[here], weighted_XF[here], scalar)
            del gate, up, grad
            dx_rows = _input_gradient(layer, both_X2F[here], w1, w3, ends)
            if arrived is not None and segment.chunk is not None:
                position = first.extra(arrived, 0, torch.int32)
                exchange.give_back(segment.chunk, Back(dx_rows, position, segment.start, scalar_X=scalar), back)
            if segment.own:
                own_dx, own_scalar = dx_rows, scalar
            del dx_rows
        dw1, dw2, dw3 = None, None, None
        ends_GL = routes.layout.ends_GL
        if ctx.needs_input_grad[3]:
            dw2 = _weight_gradient(layer, rows_XH, weighted_XF, ends_GL)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[4]:
            for segment, arrived in zip(segments, arrivals, strict=True):
                for rows, position, _ in _sources(segment, x, weights, routes, arrived, first):
                    movers.expand(rows, position, rows_XH[segment.start : segment.end], start=segment.start)
            dw1 = _weight_gradient(layer, both_X2F[:, :width], rows_XH, ends_GL)
            dw3 = _weight_gradient(layer, both_X2F[:, width:], rows_XH, ends_GL)
        dx, dweights = movers.combine(
            own_dx, routes.own_TK, exchange.returned(), routes.send_TD, back,
            scalar_X=own_scalar, slots_TK=routes.slots_TK, local=local,
        )  # fmt: skip
        return dx, dweights, dw1, dw2, dw3, None, None  # slots, layer


def _sources(
    segment: Segment, x: Tensor, weights: Tensor, routes: Routes, arrived: Tensor | None, wire: Wire
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Where a segment's expanded rows come from: rows [N, H], their positions [N, K] and weights [N, K]."""
    found = [(x, routes.own_TK, weights)] if segment.own else []
    if arrived is not None:
        extras = wire.extra(arrived, 0, torch.int32), wire.extra(arrived, 1, torch.float32)
        found.append((wire.values(arrived), *extras))
    return found


def _gate_up(layer: FusedExperts, x_XH: Tensor, w1: Tensor, w3: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return layer.matmul.nt(x_XH, w1, ends), layer.matmul.nt(x_XH, w3, ends)


def _input_gradient(layer: FusedExperts, both_X2F: Tensor, w1: Tensor, w3: Tensor, ends: Tensor) -> list[Tensor]:
    """Terms [X, H] whose sum is the gradient of the expanded rows: two of the library's, which merging adds in fp32,
    or one of ours."""
    gate, up = both_X2F.chunk(2, dim=1)
    if layer.matmul is library_matmul:
        return [layer.matmul.nn(gate, w1, ends), layer.matmul.nn(up, w3, ends)]
    return [layer.matmul.nn(gate, w1, ends, up, w3)]


def _weight_gradient(layer: FusedExperts, a_XM: Tensor, b_XN: Tensor, ends_GL: Tensor) -> Tensor:
    """[L, M, N]: a^T b over the rows of each expert in all segments."""
    segments, local = ends_GL.shape
    parts = layer.matmul.tn(a_XM, b_XN, ends_GL.view(-1))
    return parts if segments == 1 else parts.view(segments, local, *parts.shape[1:]).sum(0)
