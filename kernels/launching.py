"""Launching Triton kernels at little cost to the host.

`kernel[grid](...)` works out each time which compiled variant the arguments need, and reads its settings from the
environment; that can take longer than the kernel runs. `quick` remembers the variant under a key of what Triton
specializes on: a tensor's type and 16-byte alignment, whether a number is 1 or a multiple of 16, and the constants.
"""

from typing import Any

import torch
from torch import Tensor
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when triton was imported)."""


class Quick:
    """A JIT function, launched as `quick[grid](*args, **constants)`; the constants come last in its signature."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self._compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **constants: Any) -> None:
            if INTERPRETED:
                self.function[grid](*args, **constants)
                return
            key = (torch.cuda.current_device(), *constants.values(), *map(kind, args))
            found = self._compiled.get(key)
            if found is None:
                compiled = self.function[grid](*args, **constants)
                tail = tuple(constants[name] for name in self.function.arg_names[len(args) :])
                self._compiled[key] = compiled, tail
                return
            compiled, tail = found
            compiled[full(grid)](*args, *tail)

        return run


def quick(function: Any) -> Quick:
    """Decorator of a `triton.jit` function that is launched, not called by another."""
    return Quick(function)


def kind(value: Any) -> Any:
    """What Triton specializes on."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if value is None:
        return None
    return value == 1, value % 16 == 0, -(2**31) <= value < 2**31


def full(grid: tuple[int, ...]) -> tuple[int, int, int]:
    """A grid of three dimensions."""
    return (*grid, 1, 1)[:3]  # type: ignore[return-value]


def power_of_2(n: int) -> int:
    """The smallest power of two from n on; triton.next_power_of_2 takes the host microseconds."""
    return 1 << max(n - 1, 0).bit_length()
