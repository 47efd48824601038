"""The experts of one device on received rows: SwiGLU per expert, weighted, merged back into the rows.

R received rows, M experts a row, L local experts, X expanded rows, H model width, F expert width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from occult_train.kernels.reindex.reference import RowIndex, expert_rows
from occult_train.kernels.rows.autograd import gather, gather_sum


def experts(rows_RH: Tensor, ids_RM: Tensor, weights_RM: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """y[r] = sum over m of weights[r, m] * FFN_ids[r, m](rows[r]), with FFN(x) = w2 (silu(w1 x) * w3 x).

    Every expert takes part, with no rows if need be, so each has a gradient (zeros then). The weight is applied after
    the activation (Occult, merge matmul), products and sums over m in fp32.

    Args:
        rows_RH: [R, H].
        ids_RM: [R, M] int64 local expert ids, -1 for none.
        weights_RM: [R, M] routing weights; those of -1 entries are not read.
        w1, w3: [L, F, H]; w2: [L, H, F].

    Returns:
        [R, H] in the type of the rows.

    Raises:
        ValueError: shapes that do not belong together.
    """
    _check(rows_RH, ids_RM, weights_RM, w1, w2, w3)
    index, entry_X, counts_L = expert_rows(ids_RM, w1.shape[0])
    matrices = list(zip(w1.unbind(), w2.unbind(), w3.unbind(), strict=True))
    return apply_grouped(rows_RH, weights_RM, index, entry_X, counts_L.tolist(), matrices)


def apply_grouped(
    rows_RH: Tensor,
    weights_RM: Tensor,
    index: RowIndex,
    entry_X: Tensor,
    counts: list[int],
    matrices: Sequence[tuple[Tensor, Tensor, Tensor]],
) -> Tensor:
    """As `experts`, of rows in the order that `expert_rows` gives.

    Args:
        counts: expanded rows of each expert.
        matrices: w1, w2 and w3 of each expert.
    """
    out = [
        F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
        for x, (gate, down, up) in zip(gather(rows_RH, index).split(counts), matrices, strict=True)
    ]
    wide = torch.promote_types(rows_RH.dtype, weights_RM.dtype)
    weight_X = weights_RM.reshape(-1)[entry_X]
    weighted_XH = torch.cat(out).to(wide) * weight_X.to(wide)[:, None]
    return gather_sum(weighted_XH, index).to(rows_RH.dtype)


def _check(rows: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> None:
    local, ffn, hidden = w1.shape
    if rows.dim() != 2 or rows.shape[1] != hidden:
        raise ValueError(f"rows have shape {tuple(rows.shape)}, w1 takes width {hidden}")
    if w3.shape != w1.shape or tuple(w2.shape) != (local, hidden, ffn):
        raise ValueError(f"w1 {tuple(w1.shape)}, w2 {tuple(w2.shape)} and w3 {tuple(w3.shape)} do not fit together")
    if rows.dtype != w1.dtype:
        raise ValueError(f"rows are {rows.dtype}, the experts {w1.dtype}")
    if ids.shape != weights.shape or ids.shape[0] != rows.shape[0]:
        raise ValueError(f"{rows.shape[0]} rows, ids {tuple(ids.shape)}, weights {tuple(weights.shape)}")
