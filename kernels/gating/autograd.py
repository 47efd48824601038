"""Rows times the sigmoid of a number each, with its gradient."""

from typing import Any

import torch
from torch import Tensor

from occult_train.kernels.gating import kernel
from occult_train.kernels.launching import INTERPRETED


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, logit: Tensor, beside: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, logit)
        ctx.added = beside is not None
        return kernel.forward(x, logit, beside)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, logit = ctx.saved_tensors
        return *kernel.backward(x, logit, grad.contiguous()), grad if ctx.added else None


def gated(x: Tensor, logit: Tensor, beside: Tensor | None = None) -> Tensor:
    """sigmoid(logit) * x, or that plus `beside`: on a GPU in one pass each way, in fp32, else in plain torch.

    Args:
        x: [..., H].
        logit: [..., 1].
        beside: as x.
    """
    if x.is_cuda and not INTERPRETED and not torch.compiler.is_compiling():
        rows, added = (None if t is None else t.contiguous().view(-1, x.shape[-1]) for t in (x, beside))
        return _Gated.apply(rows, logit.contiguous().view(-1), added).view_as(x)
    product = logit.sigmoid() * x
    return product if beside is None else beside + product
