"""RMSNorm with its gradient, and as what begins a residual branch."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from occult_train.kernels.launching import INTERPRETED
from occult_train.kernels.norm import kernel


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out, scale = kernel.forward(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.set_materialize_grads(False)
        return x, out

    @staticmethod
    def backward(ctx: Any, beside: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        if grad is None:
            return beside, None, None  # eps
        x, weight, scale = ctx.saved_tensors
        beside = None if beside is None else beside.contiguous()
        return *kernel.backward(x, weight, scale, grad.contiguous(), beside), None  # eps


def branch(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, and x / rms(x) * weight over the last dimension [..., H]; rounded once, after the weight.

    On a GPU in one pass each way; the gradients that meet at x are added in backward's if what is returned for x is
    used in its place.
    """
    ours = x.is_cuda and x.dtype != torch.float64 and x.shape[-1] <= kernel.MOST_COLUMNS
    if ours and not INTERPRETED and not torch.compiler.is_compiling():
        same, out = _Branch.apply(x.contiguous().view(-1, x.shape[-1]), weight, eps)
        return same.view(x.shape), out.view(x.shape)
    return x, F.rms_norm(x, weight.shape, weight, eps)
