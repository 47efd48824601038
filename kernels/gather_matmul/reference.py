"""Gate and up projection of each expert's rows, read through an index, and SwiGLU, in plain torch.

R rows of width H, X rows grouped by expert, L experts of width F.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from occult_train.kernels.grouped_matmul import reference


def gather_swiglu(
    rows_RH: Tensor, index_X: Tensor | None, w1_LFH: Tensor, w3_LFH: Tensor, ends_L: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """a = x w1[l]^T, b = x w3[l]^T and h = silu(a) * b for x = rows[index], or rows without an index: each [X, F].

    h is computed from a and b as they are returned, rounded to their type, so backward can repeat it exactly.
    """
    x_XH = rows_RH if index_X is None else rows_RH[index_X.long()]
    a_XF, b_XF = reference.nt(x_XH, w1_LFH, ends_L), reference.nt(x_XH, w3_LFH, ends_L)
    wide = torch.promote_types(a_XF.dtype, torch.float32)
    return a_XF, b_XF, (F.silu(a_XF.to(wide)) * b_XF.to(wide)).to(a_XF.dtype)
