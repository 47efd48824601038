"""RMSNorm in Triton; a program takes whole rows. See `reference.py` for the formulas.

Backward reads each row once: it sums the weight's gradient over the rows of a program, then torch over programs.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from occult_train.kernels.launching import power_of_2, quick

TILE = 2048
"""Values of a tile: rows of less are taken several at a time."""
MOST_COLUMNS = 16384
"""Of a row, which has to fit into registers."""
PROGRAMS = 2
"""For each multiprocessor, in backward."""
STAGES = 3
"""Tiles whose rows are loaded at once by a program, in backward."""


@quick
@triton.jit
def _forward_kernel(x, weight, out, scale, N, H, EPS: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    h = tl.arange(0, BH)
    known = (n < N)[:, None] & (h < H)[None, :]
    at = n[:, None] * H + h[None, :]
    row = tl.load(x + at, mask=known, other=0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(row * row, 1) / H + EPS)
    tl.store(scale + n, factor, mask=n < N)
    w = tl.load(weight + h, mask=h < H, other=0).to(tl.float32)
    tl.store(out + at, (row * factor[:, None] * w[None, :]).to(out.dtype.element_ty), mask=known)


@quick
@triton.jit
def _backward_kernel(
    x, weight, scale, grad, beside, d_x, d_weight, N, H, TILES, PROGRAMS,
    BN: tl.constexpr, BH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    h = tl.arange(0, BH)
    w = tl.load(weight + h, mask=h < H, other=0).to(tl.float32)
    total = tl.zeros([BN, BH], tl.float32)
    for tile in tl.range(tl.program_id(0), TILES, PROGRAMS, num_stages=STAGES):
        n = tile * BN + tl.arange(0, BN).to(tl.int64)
        known = (n < N)[:, None] & (h < H)[None, :]
        at = n[:, None] * H + h[None, :]
        factor = tl.load(scale + n, mask=n < N, other=0)
        unit = tl.load(x + at, mask=known, other=0).to(tl.float32) * factor[:, None]
        g = tl.load(grad + at, mask=known, other=0).to(tl.float32)
        total += g * unit
        g = g * w[None, :]
        row = factor[:, None] * (g - unit * (tl.sum(g * unit, 1) / H)[:, None])
        if beside is not None:
            row += tl.load(beside + at, mask=known, other=0).to(tl.float32)
        tl.store(d_x + at, row.to(d_x.dtype.element_ty), mask=known)
    tl.store(d_weight + tl.program_id(0).to(tl.int64) * H + h, tl.sum(total, 0), mask=h < H)


def forward(x_NH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As the reference's, computed in fp32; contiguous inputs."""
    _check(x_NH, weight_H)
    rows, width = x_NH.shape
    out = torch.empty_like(x_NH, dtype=torch.promote_types(x_NH.dtype, weight_H.dtype))
    scale_N = torch.empty(rows, dtype=torch.float32, device=x_NH.device)
    if rows:
        bn, bh = _tile(width)
        _forward_kernel[(-(-rows // bn),)](
            x_NH, weight_H, out, scale_N, rows, width, EPS=eps, BN=bn, BH=bh, num_warps=_warps(bn * bh)
        )
    return out, scale_N


def backward(
    x_NH: Tensor, weight_H: Tensor, scale_N: Tensor, grad_NH: Tensor, beside_NH: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As the reference's, computed in fp32; contiguous inputs."""
    _check(x_NH, weight_H, grad_NH, *(() if beside_NH is None else (beside_NH,)))
    rows, width = x_NH.shape
    d_x = torch.empty_like(x_NH)
    if not rows:
        return d_x, torch.zeros_like(weight_H)
    bn, bh = _tile(width)
    tiles = -(-rows // bn)
    programs = min(tiles, PROGRAMS * _multiprocessors(x_NH.device))
    d_weight = torch.empty(programs, width, dtype=torch.float32, device=x_NH.device)
    _backward_kernel[(programs,)](
        x_NH, weight_H, scale_N, grad_NH, beside_NH, d_x, d_weight, rows, width, tiles, programs,
        BN=bn, BH=bh, STAGES=STAGES, num_warps=_warps(bn * bh),
    )  # fmt: skip
    return d_x, d_weight.sum(0).to(weight_H.dtype)


def _tile(width: int) -> tuple[int, int]:
    """Rows and columns."""
    columns = power_of_2(width)
    return max(1, TILE // columns), columns


def _warps(values: int) -> int:
    """So that a thread has 16, or more in the longest rows."""
    return min(16, max(1, values // 512))


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _check(x_NH: Tensor, weight_H: Tensor, *grads: Tensor) -> None:
    tensors = x_NH, weight_H, *grads
    if x_NH.dim() != 2 or weight_H.shape != x_NH.shape[1:] or any(grad.shape != x_NH.shape for grad in grads):
        raise ValueError(f"rows [N, H] and a weight [H] are needed, got {[tuple(t.shape) for t in tensors]}")
    if x_NH.shape[1] > MOST_COLUMNS:
        raise ValueError(f"rows of up to {MOST_COLUMNS} are normed, got {x_NH.shape[1]}")
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError(f"contiguous rows are needed, got strides {[t.stride() for t in tensors]}")
