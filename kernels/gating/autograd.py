"""Rows times the sigmoid of a number each, with its gradient."""

from typing import Any

import torch
from torch import Tensor

from occult_train.kernels.gating import kernel
from occult_train.kernels.launching import INTERPRETED


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, logit: Tensor) -> Tensor:
        ctx.save_for_backward(x, logit)
        return kernel.forward(x, logit)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, logit = ctx.saved_tensors
        return kernel.backward(x, logit, grad.contiguous())


def gated(x: Tensor, logit: Tensor) -> Tensor:
    """sigmoid(logit) * x: on a GPU in one pass each way, in fp32, else in plain torch.

    Args:
        x: [..., H].
        logit: [..., 1].
    """
    if x.is_cuda and not INTERPRETED and not torch.compiler.is_compiling():
        rows = x.contiguous().view(-1, x.shape[-1])
        return _Gated.apply(rows, logit.contiguous().view(-1)).view_as(x)
    return logit.sigmoid() * x
