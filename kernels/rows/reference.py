"""Moving rows through a RowIndex: copying sources out, and summing rows back. Each is the other's transpose."""

import torch
from torch import Tensor

from occult_train.kernels.reindex.reference import RowIndex


def gather(x: Tensor, index: RowIndex) -> Tensor:
    """Copy sources into rows: [N, H] -> [R, H]."""
    return x[index.row_to_source]


def gather_sum(rows: Tensor, index: RowIndex) -> Tensor:
    """Sum the rows of each source: [R, H] -> [N, H], added in fp32 (fp64 for fp64) in the order of the columns."""
    sources, columns = index.source_to_rows.shape
    wide = torch.promote_types(rows.dtype, torch.float32)
    out = torch.zeros(sources, rows.shape[1], dtype=wide, device=rows.device)
    if rows.shape[0] == 0:
        return out.to(rows.dtype)
    for column in range(columns):
        row = index.source_to_rows[:, column]
        out += torch.where((row >= 0)[:, None], rows[row.clamp(min=0)].to(wide), 0)
    return out.to(rows.dtype)
