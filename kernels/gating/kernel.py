"""Rows times the sigmoid of a number each, in Triton; one program a row. See `reference.py` for the formulas."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from occult_train.kernels.launching import power_of_2, quick

MOST_COLUMNS = 2048
"""Of a step."""


@quick
@triton.jit
def _forward_kernel(x, logit, beside, out, H, BH: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    gate = tl.sigmoid(tl.load(logit + n).to(tl.float32))
    for first in range(0, H, BH):
        h = first + tl.arange(0, BH)
        row = gate * tl.load(x + n * H + h, mask=h < H, other=0).to(tl.float32)
        if beside is not None:
            row += tl.load(beside + n * H + h, mask=h < H, other=0).to(tl.float32)
        tl.store(out + n * H + h, row.to(out.dtype.element_ty), mask=h < H)


@quick
@triton.jit
def _backward_kernel(x, logit, grad, d_x, d_logit, H, BH: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    value = tl.load(logit + n).to(tl.float32)
    gate = tl.sigmoid(value)
    total = tl.zeros([BH], tl.float32)
    for first in range(0, H, BH):
        h = first + tl.arange(0, BH)
        row = tl.load(x + n * H + h, mask=h < H, other=0).to(tl.float32)
        g = tl.load(grad + n * H + h, mask=h < H, other=0).to(tl.float32)
        total += g * row
        tl.store(d_x + n * H + h, (gate * g).to(d_x.dtype.element_ty), mask=h < H)
    tl.store(d_logit + n, (gate * tl.sigmoid(-value) * tl.sum(total, 0)).to(d_logit.dtype.element_ty))


def forward(x_NH: Tensor, logit_N: Tensor, beside_NH: Tensor | None = None) -> Tensor:
    """As the reference's; contiguous inputs."""
    _check(x_NH, logit_N, *(() if beside_NH is None else (beside_NH,)))
    out = torch.empty_like(x_NH)
    if out.numel():
        block = _columns(x_NH)
        _forward_kernel[(len(x_NH),)](
            x_NH, logit_N, beside_NH, out, x_NH.shape[1], BH=block, num_warps=max(1, block // 512)
        )
    return out


def backward(x_NH: Tensor, logit_N: Tensor, grad_NH: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference's, in one pass; contiguous inputs."""
    _check(x_NH, logit_N, grad_NH)
    d_x, d_logit = torch.empty_like(x_NH), torch.empty_like(logit_N)
    if len(x_NH):
        block = _columns(x_NH)
        _backward_kernel[(len(x_NH),)](
            x_NH, logit_N, grad_NH, d_x, d_logit, x_NH.shape[1], BH=block, num_warps=max(1, block // 512)
        )
    return d_x, d_logit


def _columns(x_NH: Tensor) -> int:
    return min(MOST_COLUMNS, power_of_2(x_NH.shape[1]))


def _check(x_NH: Tensor, logit_N: Tensor, *grads: Tensor) -> None:
    tensors = x_NH, logit_N, *grads
    if x_NH.dim() != 2 or logit_N.shape != x_NH.shape[:1] or any(grad.shape != x_NH.shape for grad in grads):
        raise ValueError(f"rows [N, H] and logits [N] are needed, got {[tuple(t.shape) for t in tensors]}")
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError(f"contiguous rows and logits are needed, got strides {[t.stride() for t in tensors]}")
