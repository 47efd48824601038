"""What host functions of the matmul kernels demand of their arguments; every error names both values."""

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_together(**tensors: Tensor | None) -> None:
    """One type, which the kernels know, and one device for all of these."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, reference = next(iter(given.items()))
    if reference.dtype not in DTYPES:
        raise ValueError(f"{first} is {reference.dtype}; the kernels take {', '.join(map(str, DTYPES))}")
    for name, tensor in given.items():
        if tensor.dtype != reference.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, {first} is {reference.dtype}")
        if tensor.device != reference.device:
            raise ValueError(f"{name} is on {tensor.device}, {first} on {reference.device}")


def check_rows(name: str, x: Tensor, rows: int | None, width: int) -> None:
    """A matrix of `rows` rows of a width, whose rows are each contiguous."""
    if x.dim() != 2 or x.shape[1] != width or (rows is not None and x.shape[0] != rows):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, {(rows, width)} fits the other arguments (None: any)")
    if x.stride(1) != 1 and width > 1:
        raise ValueError(f"{name} has strides {x.stride()}; its rows must be contiguous, stride 1")


def check_weights(name: str, w: Tensor, shape: Sequence[int | None]) -> None:
    """Contiguous weights of these sizes, none of them 0; None stands for any size."""
    fits = w.dim() == len(shape) and all(want in (None, size) for size, want in zip(w.shape, shape, strict=True))
    if not fits or 0 in w.shape:
        raise ValueError(
            f"{name} has shape {tuple(w.shape)}, {tuple(shape)} fits the other arguments (None: any but 0)"
        )
    if not w.is_contiguous():
        raise ValueError(f"{name} has strides {w.stride()}; it must be contiguous")


def check_ends(ends_L: Tensor, experts: int | None, like: Tensor) -> None:
    """int32 [L] on the device of `like`. Its values are not read: that would wait for the device."""
    if ends_L.dim() != 1 or ends_L.shape[0] == 0 or (experts is not None and ends_L.shape[0] != experts):
        raise ValueError(f"ends have shape {tuple(ends_L.shape)}, experts are {experts or 'one or more'}")
    _check_integers("ends", ends_L, like)


def check_index(name: str, index: Tensor | None, like: Tensor, rows: int | None = None) -> None:
    """int32 [X] on the device of `like`, if given."""
    if index is None:
        return
    if index.dim() != 1 or (rows is not None and index.shape[0] != rows):
        raise ValueError(f"{name} has shape {tuple(index.shape)}, {(rows,)} fits the other arguments (None: any)")
    _check_integers(name, index, like)


def _check_integers(name: str, x: Tensor, like: Tensor) -> None:
    if x.dtype != torch.int32:
        raise ValueError(f"{name} is {x.dtype}, not {torch.int32}")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, the rows on {like.device}")
    if not x.is_contiguous():
        raise ValueError(f"{name} has strides {x.stride()}; it must be contiguous")
