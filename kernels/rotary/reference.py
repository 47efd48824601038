"""Rotary position embedding (RoFormer, arXiv 2104.09864) in the half-split layout, in plain torch.

B batch, N heads, S sequence, D width of a head.
"""

import torch
from torch import Tensor


def rotate(x_BNSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin.

    Args:
        x_BNSD: [B, N, S, D].
        cos, sin: [B or 1, 1, S, D], their second half along D equal to the first.
    """
    first, second = x_BNSD.chunk(2, dim=-1)
    return x_BNSD * cos.to(x_BNSD.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x_BNSD.dtype)
