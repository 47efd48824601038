"""RMSNorm of rows, forward and backward, in plain torch. N rows, H width."""

import torch
from torch import Tensor


def forward(x_NH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) * weight, rounded once, in the wider of both types; and 1 / rms(x) [N] in fp32 or wider."""
    wide = x_NH.to(torch.promote_types(x_NH.dtype, torch.float32))
    scale_N = torch.rsqrt(wide.square().mean(1) + eps)
    kind = torch.promote_types(x_NH.dtype, weight_H.dtype)
    return (wide * scale_N[:, None] * weight_H.to(wide.dtype)).to(kind), scale_N


def backward(
    x_NH: Tensor, weight_H: Tensor, scale_N: Tensor, grad_NH: Tensor, beside_NH: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of x [N, H] and of the weight [H], given the output's.

    Args:
        scale_N: as `forward` returned it.
        beside_NH: gradient of x from elsewhere, which is added.
    """
    wide, grad = x_NH.to(scale_N.dtype), grad_NH.to(scale_N.dtype)
    unit = wide * scale_N[:, None]
    weighted = grad * weight_H.to(scale_N.dtype)
    d_x = scale_N[:, None] * (weighted - unit * (weighted * unit).mean(1, keepdim=True))
    if beside_NH is not None:
        d_x = d_x + beside_NH.to(scale_N.dtype)
    return d_x.to(x_NH.dtype), (grad * unit).sum(0).to(weight_H.dtype)
