"""RMSNorm as the Llama family computes it."""

import torch
from torch import Tensor, nn

from occult_train.kernels.norm.autograd import branch


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in fp32 and cast back before the weight; on a GPU, after it."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return self.norm(x)[1]

    def norm(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x and its norm."""
        if x.is_cuda:
            return branch(x, self.weight, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return x, self.weight * wide.to(x.dtype)


class BranchNorm(RMSNorm):
    """What a residual branch begins with, as in `h, x = norm(h); return h + f(x)`: both gradients of h are then added
    where the norm's is computed."""

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """h [..., size] itself, and its norm."""
        return self.norm(h)
