"""SwiGLU of a dense layer with its gradient; it keeps gate and up alone for backward."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from occult_train.kernels.launching import INTERPRETED
from occult_train.kernels.swiglu import kernel


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return kernel.forward(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return kernel.gradients(gate, up, grad.contiguous())


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [..., F]: on a GPU in one pass each way, in fp32, else in plain torch."""
    if gate.is_cuda and not INTERPRETED and not torch.compiler.is_compiling():
        width = gate.shape[-1]
        return _SwiGLU.apply(gate.reshape(-1, width), up.reshape(-1, width)).view_as(gate)
    return F.silu(gate) * up
