"""Rotary position embedding with its gradient, which turns back by the same angles."""

from typing import Any

import torch
from torch import Tensor

from occult_train.kernels.launching import INTERPRETED
from occult_train.kernels.rotary import kernel, reference


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return kernel.rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        return kernel.rotate(grad, cos, sin, sign=-1), None, None  # cos, sin


def rotate(x_BNSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, N, S, D] turned by its positions' angles: on a GPU in one pass, else in plain torch."""
    if x_BNSD.is_cuda and not INTERPRETED and not torch.compiler.is_compiling():
        return _Rotate.apply(x_BNSD, cos.contiguous(), sin.contiguous())
    return reference.rotate(x_BNSD, cos, sin)
