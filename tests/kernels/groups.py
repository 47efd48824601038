"""Rows grouped by expert for kernel tests, and how far a result is from an exact one."""

import torch
from torch import Tensor

COUNTS = {
    "none": [0, 0, 0],
    "one": [1],
    "63": [0, 63],
    "100": [100],
    "ragged": [37, 0, 63, 1, 0, 20],
    "skewed": [0, 3, 590, 0, 7],
}
"""Rows of each expert: sizes around and far from tiles, experts without rows first, last and in between."""
ERRORS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Bounds for a result rounded once: measured in the interpreter 1.2e-7, 2.2e-4 and 3.4e-3 (it cuts bf16 off)."""


def ends_of(counts: list[int], device: torch.device) -> Tensor:
    """int32 ends of groups of these sizes."""
    return torch.tensor(counts).cumsum(0).to(torch.int32).to(device)


def normal(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values, the same on each device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def exact(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In fp64 on the CPU, integers as they are."""
    return tuple(t.cpu().double() if t.is_floating_point() else t.cpu() for t in tensors)


def check_close(got: Tensor, expected: Tensor, bound: float | None = None) -> None:
    """||got - expected|| <= bound ||expected||, the bound by the type if not given, and nothing left unwritten."""
    assert got.shape == expected.shape
    assert not got.isnan().any(), "a value was not written, or computed from one that was not"
    error = (got.cpu().double() - expected).norm()
    assert error <= (ERRORS[got.dtype] if bound is None else bound) * expected.norm(), float(error / expected.norm())
