"""Differentiable row movement; the gradient of a copy is a sum over copies in index order, so it is deterministic."""

from typing import Any

import torch
from torch import Tensor

from occult_train.kernels.reindex.reference import RowIndex
from occult_train.kernels.rows import reference


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: RowIndex) -> Tensor:
        ctx.index = index
        return reference.gather(x, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reference.gather_sum(grad, ctx.index), None  # index


class _GatherSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: RowIndex) -> Tensor:
        ctx.index = index
        return reference.gather_sum(rows, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reference.gather(grad, ctx.index), None  # index


def gather(x: Tensor, index: RowIndex) -> Tensor:
    """Copy sources into rows: [N, H] -> [R, H]."""
    _check(x, index.source_to_rows.shape[0], "sources")
    return _Gather.apply(x, index)


def gather_sum(rows: Tensor, index: RowIndex) -> Tensor:
    """Sum the rows of each source: [R, H] -> [N, H]."""
    _check(rows, index.row_to_source.shape[0], "rows")
    return _GatherSum.apply(rows, index)


def _check(x: Tensor, expected: int, what: str) -> None:
    if x.dim() != 2 or x.shape[0] != expected:
        raise ValueError(f"shape {tuple(x.shape)} given, the index has {expected} {what}")
