"""SwiGLU, forward and backward, in plain torch. X rows, F width."""

import torch
from torch import Tensor
from torch.nn import functional as F


def forward(gate_XF: Tensor, up_XF: Tensor) -> Tensor:
    """silu(gate) * up, computed in fp32, in the type of the inputs."""
    wide = torch.promote_types(gate_XF.dtype, torch.float32)
    return (F.silu(gate_XF.to(wide)) * up_XF.to(wide)).to(gate_XF.dtype)


def gradients(gate_XF: Tensor, up_XF: Tensor, grad_XF: Tensor) -> tuple[Tensor, Tensor]:
    """Of gate and of up through `forward`, given its output's."""
    both, _, _ = backward(gate_XF, up_XF, grad_XF, torch.ones_like(gate_XF[:, 0]))
    d_gate, d_up = both.chunk(2, dim=1)
    return d_gate, d_up


def backward(gate_XF: Tensor, up_XF: Tensor, grad_XF: Tensor, weight_X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients through weight * (silu(gate) * up) @ w2, given grad = dy @ w2.

    With h = silu(gate) * up: the gradient of the weight is <grad, h> (Occult leaves backward open; it needs no expert
    output), that of h is weight * grad, and w2's gradient needs weight * h.

    Returns:
        [X, 2F], the gradients of gate and of up side by side; [X, F] weight * h; and [X] fp32 <grad, h>.
    """
    wide = torch.promote_types(gate_XF.dtype, torch.float32)
    gate, up, grad, weight = gate_XF.to(wide), up_XF.to(wide), grad_XF.to(wide), weight_X.to(wide)[:, None]
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    h, dh = silu * up, weight * grad
    d_gate = dh * up * (sigmoid + silu * (1 - sigmoid))
    both = torch.cat((d_gate, dh * silu), dim=1).to(gate_XF.dtype)
    return both, (weight * h).to(gate_XF.dtype), (grad * h).sum(1).float()
