"""Matmuls over rows grouped by expert, one expert at a time in plain torch.

X rows grouped by expert, L experts, `ends_L` int32 the end of each expert's rows, in order; ends_L[-1] is X.
K, M and N are widths. Products are summed in fp32 (fp64 for fp64) and returned in the inputs' type.
"""

from itertools import pairwise

import torch
from torch import Tensor


def nt(x_XK: Tensor, w_LNK: Tensor, ends_L: Tensor) -> Tensor:
    """Rows of expert l times w[l] transposed: [X, N], as in a linear layer for each expert."""
    return nn(x_XK, w_LNK.transpose(1, 2), ends_L)


def nn(
    g_XK: Tensor, w_LKN: Tensor, ends_L: Tensor, g2_XK: Tensor | None = None, w2_LKN: Tensor | None = None
) -> Tensor:
    """Rows of expert l times w[l], plus rows of g2 times w2[l] if given: [X, N]."""
    out = g_XK.new_zeros(g_XK.shape[0], w_LKN.shape[2])
    for expert, rows in enumerate(_groups(ends_L)):
        total = _wide(g_XK[rows]) @ _wide(w_LKN[expert])
        if g2_XK is not None and w2_LKN is not None:
            total += _wide(g2_XK[rows]) @ _wide(w2_LKN[expert])
        out[rows] = total.to(out.dtype)
    return out


def tn(a_XM: Tensor, b_XN: Tensor, ends_L: Tensor, segments: int = 1) -> Tensor:
    """Transposed rows of a times rows of b for each expert: [L, M, N], zeros for an expert without rows.

    With several segments ends are [G * L], and an expert's rows are those of its group in each segment.
    """
    products = torch.stack([_wide(a_XM[rows]).T @ _wide(b_XN[rows]) for rows in _groups(ends_L)])
    return products.view(segments, -1, *products.shape[1:]).sum(0).to(a_XM.dtype)


def _groups(ends_L: Tensor) -> list[slice]:
    return [slice(start, end) for start, end in pairwise([0, *ends_L.tolist()])]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
