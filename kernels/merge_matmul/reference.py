"""Down projection of each expert's rows, weighted and summed into the rows they came from, in plain torch.

X rows grouped by expert, L experts of width F, R rows of width H.
"""

import torch
from torch import Tensor

from occult_train.kernels.grouped_matmul import reference


def merge_matmul(h_XF: Tensor, w2_LHF: Tensor, ends_L: Tensor, row_X: Tensor, weight_X: Tensor, rows: int) -> Tensor:
    """out[r] = sum over the x with row[x] = r of weight[x] * (h[x] w2[l]^T), l the expert of x: [R, H]; 0 without any.

    Products, weights and sums in fp32 (fp64 for fp64), rounded once to the type of h.
    """
    wide = torch.promote_types(h_XF.dtype, torch.float32)
    y_XH = reference.nt(h_XF.to(wide), w2_LHF.to(wide), ends_L) * weight_X.to(wide)[:, None]
    out_RH = y_XH.new_zeros(rows, w2_LHF.shape[1])
    return out_RH.index_add_(0, row_X.long(), y_XH).to(h_XF.dtype)
