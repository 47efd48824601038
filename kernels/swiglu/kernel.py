"""SwiGLU in Triton; a program takes a row or a part of it. See `reference.py` for the formulas."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from occult_train.kernels.launching import quick


@quick
@triton.jit
def _forward_kernel(gate, up, out, F, BF: tl.constexpr):
    x = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    a = tl.load(gate + x * F + f, mask=f < F, other=0).to(tl.float32)
    b = tl.load(up + x * F + f, mask=f < F, other=0).to(tl.float32)
    tl.store(out + x * F + f, (a * tl.sigmoid(a) * b).to(out.dtype.element_ty), mask=f < F)


@quick
@triton.jit
def _backward_kernel(gate, up, grad, weight, both, weighted, scalar, F, BF: tl.constexpr):
    x = tl.program_id(0).to(tl.int64)
    w = tl.load(weight + x)
    total = tl.zeros([BF], tl.float32)
    for first in range(0, F, BF):
        f = first + tl.arange(0, BF)
        at = x * F + f
        a = tl.load(gate + at, mask=f < F, other=0).to(tl.float32)
        b = tl.load(up + at, mask=f < F, other=0).to(tl.float32)
        g = tl.load(grad + at, mask=f < F, other=0).to(tl.float32)
        sigmoid = tl.sigmoid(a)
        silu = a * sigmoid
        h = silu * b
        dh = w * g
        total += g * h
        d_gate = dh * b * (sigmoid + silu * (1 - sigmoid))
        kind = both.dtype.element_ty
        tl.store(both + 2 * x * F + f, d_gate.to(kind), mask=f < F)
        tl.store(both + 2 * x * F + F + f, (dh * silu).to(kind), mask=f < F)
        tl.store(weighted + at, (w * h).to(kind), mask=f < F)
    tl.store(scalar + x, tl.sum(total, 0))


@quick
@triton.jit
def _gradients_kernel(gate, up, grad, d_gate, d_up, F, BF: tl.constexpr):
    x = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    at = x * F + f
    a = tl.load(gate + at, mask=f < F, other=0).to(tl.float32)
    b = tl.load(up + at, mask=f < F, other=0).to(tl.float32)
    g = tl.load(grad + at, mask=f < F, other=0).to(tl.float32)
    sigmoid = tl.sigmoid(a)
    silu = a * sigmoid
    kind = d_gate.dtype.element_ty
    tl.store(d_gate + at, (g * b * (sigmoid + silu * (1 - sigmoid))).to(kind), mask=f < F)
    tl.store(d_up + at, (g * silu).to(kind), mask=f < F)


def _columns(width: int) -> int:
    """Columns of a step: the power of two up to 2048 that wastes the fewest lanes, the larger of equals."""
    sizes = [size for size in (2048, 1024, 512, 256) if size < 2 * width] or [256]
    return min(sizes, key=lambda size: -(-width // size) * size)


def forward(gate_XF: Tensor, up_XF: Tensor) -> Tensor:
    """As the reference's; contiguous inputs."""
    _check(gate_XF, up_XF)
    rows, width = gate_XF.shape
    out = torch.empty_like(gate_XF)
    if rows:
        block = _columns(width)
        _forward_kernel[(rows, -(-width // block))](
            gate_XF, up_XF, out, width, BF=block, num_warps=max(1, block // 512)
        )
    return out


def backward(
    gate_XF: Tensor, up_XF: Tensor, grad_XF: Tensor, weight_X: Tensor,
    both_X2F: Tensor, weighted_XF: Tensor, scalar_X: Tensor,
) -> None:  # fmt: skip
    """As the reference's, in one pass, into the given memory (contiguous); weighted_XF may be grad_XF itself."""
    _check(gate_XF, up_XF, grad_XF, weighted_XF)
    rows, width = gate_XF.shape
    if tuple(both_X2F.shape) != (rows, 2 * width) or not both_X2F.is_contiguous():
        raise ValueError(f"gradients side by side must be contiguous {(rows, 2 * width)}, got {tuple(both_X2F.shape)}")
    if rows:
        block = _columns(width)
        _backward_kernel[(rows,)](
            gate_XF, up_XF, grad_XF, weight_X, both_X2F, weighted_XF, scalar_X, width,
            BF=block, num_warps=max(1, block // 512),
        )  # fmt: skip


def gradients(gate_XF: Tensor, up_XF: Tensor, grad_XF: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference's; contiguous inputs."""
    _check(gate_XF, up_XF, grad_XF)
    rows, width = gate_XF.shape
    d_gate, d_up = torch.empty_like(gate_XF), torch.empty_like(up_XF)
    if rows:
        block = _columns(width)
        _gradients_kernel[(rows, -(-width // block))](
            gate_XF, up_XF, grad_XF, d_gate, d_up, width, BF=block, num_warps=max(1, block // 512)
        )
    return d_gate, d_up


def _check(*tensors: Tensor) -> None:
    first = tensors[0]
    for tensor in tensors:
        if tensor.shape != first.shape or tensor.dtype != first.dtype or not tensor.is_contiguous():
            raise ValueError(f"contiguous [X, F] alike are needed, got {[(tuple(t.shape), t.dtype) for t in tensors]}")
