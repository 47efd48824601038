"""Rows times the sigmoid of a number each, forward and backward, in plain torch. N rows, H width."""

import torch
from torch import Tensor


def forward(x_NH: Tensor, logit_N: Tensor, beside_NH: Tensor | None = None) -> Tensor:
    """sigmoid(logit) * x, plus what is given beside it; computed in fp32, in the type of x."""
    wide = torch.promote_types(x_NH.dtype, torch.float32)
    product = logit_N.to(wide).sigmoid()[:, None] * x_NH.to(wide)
    return (product if beside_NH is None else product + beside_NH.to(wide)).to(x_NH.dtype)


def backward(x_NH: Tensor, logit_N: Tensor, grad_NH: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x [N, H] and of the logits [N], given the output's."""
    wide = torch.promote_types(x_NH.dtype, torch.float32)
    gate_N, grad = logit_N.to(wide).sigmoid(), grad_NH.to(wide)
    d_logit_N = gate_N * (-logit_N.to(wide)).sigmoid() * (grad * x_NH.to(wide)).sum(1)
    return (gate_N[:, None] * grad).to(x_NH.dtype), d_logit_N.to(logit_N.dtype)
