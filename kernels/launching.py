"""Launching Triton kernels at little cost to the host.

`kernel[grid](...)` works out each time which compiled variant the arguments need, and reads its settings from the
environment; that can take longer than the kernel runs. Here the variant is remembered under what Triton specializes on:
a tensor's type and 16-byte alignment, whether a number is 1 or a multiple of 16, and the constants. It is launched with
addresses in place of tensors, about which the driver is not asked; hooks of profilers (Proton) are not called.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import prod
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
            device = torch.cuda.current_device()
            values, kinds = look(args)
            key = (device, *constants.values(), *kinds)
            found = self._compiled.get(key)
            if found is None:
                compiled = self.function[grid](*args, **constants)
                self._compiled[key] = compiled, tuple(constants[name] for name in self.function.arg_names[len(args) :])
                return
            compiled, tail = found
            fire(compiled, grid, device, values, tail)

        return run


def quick(function: Any) -> Quick:
    """Decorator of a `triton.jit` function that is launched, not called by another."""
    return Quick(function)


def look(args: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """What to launch with, and what Triton specializes on."""
    values, kinds = [], []
    for arg in args:
        if isinstance(arg, Tensor):
            address = arg.data_ptr()
            values.append(address)
            kinds.append(arg.dtype if address % 16 == 0 else (arg.dtype,))
        else:
            values.append(arg)
            kinds.append(arg if arg is None or arg == 1 else (arg % 16 == 0, -(2**31) <= arg < 2**31))
    return values, kinds


def fire(compiled: Any, grid: tuple[int, ...], device: int, values: Sequence[Any], tail: Sequence[Any]) -> None:
    """Launch a compiled kernel on the device's current stream, as `compiled[grid](...)` does, without hooks."""
    x, y, z = full(grid)
    stream = torch._C._cuda_getCurrentRawStream(device)
    compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *values, *tail)


def full(grid: tuple[int, ...]) -> tuple[int, int, int]:
    """A grid of three dimensions."""
    return (*grid, 1, 1)[:3]  # type: ignore[return-value]


def power_of_2(n: int) -> int:
    """The smallest power of two from n on; triton.next_power_of_2 takes the host microseconds."""
    return 1 << max(n - 1, 0).bit_length()


def parts(like: Tensor, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Uninitialised tensors in one piece of memory, each from a multiple of 16 bytes on; one allocation."""
    grain = 16 // dtype.itemsize
    sizes = [-(-prod(shape) // grain) * grain for shape in shapes]
    memory = like.new_empty(sum(sizes), dtype=dtype)
    starts = accumulate(sizes, initial=0)
    return [memory[start : start + prod(shape)].view(shape) for shape, start in zip(shapes, starts, strict=False)]
