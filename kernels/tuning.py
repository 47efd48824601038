"""Launch settings of the matmul kernels: tile sizes to choose from, how the choice is measured and kept."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from occult_train.kernels.launching import INTERPRETED, fire, look, power_of_2

DEPTH = 64
"""Every BLOCK_K divides it: kernels skip tails for widths that are multiples of it."""


def config(m: int, n: int, k: int, *, warps: int, stages: int, resident: int = 1, flatten: bool = False) -> Any:
    """A tile of m rows, n columns, k deep; `resident` programs share a multiprocessor."""
    meta = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8, "RESIDENT": resident, "FLATTEN": flatten}
    return triton.Config(meta, num_warps=warps, num_stages=stages)


SMALL = config(64, 64, 64, warps=4, stages=1)
"""The one choice of the interpreter: small sizes have several tiles, and tails."""
WIDE = config(64, 64, 32, warps=4, stages=3)
"""The one choice for fp32 inputs, whose exact products use no tensor cores."""


def tuned(hopper: list[Any], ampere: list[Any], key: list[str], **options: Any) -> Callable[[Any], Any]:
    """`triton.autotune` over a few settings, the winner kept on disk.

    Only settings for the card at hand are tried: `hopper` from compute capability 9.0 on, `ampere` before, WIDE for
    fp32 inputs. That takes some 25 ms a setting once for each value of `key` and each set of types; from then on, in
    later processes too, the winner is read from Triton's cache folder.
    """
    if INTERPRETED:
        return triton.autotune([SMALL], key=key, **options)  # type: ignore[no-any-return]

    def prune(configs: list[Any], named: dict[str, Any], **kwargs: Any) -> list[Any]:
        first = next(value for value in named.values() if isinstance(value, Tensor))
        if first.dtype == torch.float32:
            return [WIDE]
        return hopper if torch.cuda.get_device_capability(first.device) >= (9, 0) else ampere

    return triton.autotune(  # type: ignore[no-any-return]
        [*hopper, *ampere, WIDE],
        key=key,
        prune_configs_by={"early_config_prune": prune},
        do_bench=functools.partial(triton.testing.do_bench, warmup=5, rep=20),
        cache_results=True,
        **options,
    )


def launch(kernel: Any, like: Tensor, *args: Any, TMA: bool, **meta: Any) -> None:
    """Run a persistent kernel where `like` lives, with as many programs as that device runs at a time.

    The compiled kernel and its settings are remembered, as in kernels/launching, under what decides on them.
    """
    constants = {**meta, "TMA": TMA, "WIDEN": INTERPRETED}
    if INTERPRETED:
        kernel[lambda chosen: (3 * chosen["RESIDENT"],)](*args, **constants)
        return
    if TMA:
        _allocate_descriptors()
    if like.device.index != torch.cuda.current_device():
        with torch.cuda.device(like.device):
            _launch(kernel, args, constants)
    else:
        _launch(kernel, args, constants)


_COMPILED: dict[Any, tuple[Any, int, tuple[Any, ...]]] = {}


def _launch(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    device = torch.cuda.current_device()
    values, kinds = look(args)
    key = (kernel, device, *constants.values(), *map(_decisive, args, kinds, _modes(kernel)))
    found = _COMPILED.get(key)
    if found is None:
        count = _multiprocessors(device)
        compiled = kernel[lambda chosen: (count * chosen["RESIDENT"],)](*args, **constants)
        chosen = kernel.best_config.kwargs
        tail = tuple({**constants, **chosen}[name] for name in kernel.arg_names[len(args) :])
        _COMPILED[key] = compiled, count * chosen["RESIDENT"], tail
        return
    compiled, programs, tail = found
    fire(compiled, (programs,), device, values, tail)


@functools.cache
def _modes(kernel: Any) -> tuple[bool, ...]:
    """For each parameter whether a number's value decides on the settings, or on the variant; else nothing does."""
    return tuple(p.name in kernel.keys or not p.do_not_specialize for p in kernel.fn.params)


def _decisive(value: Any, kind: Any, counts: bool) -> Any:
    if isinstance(value, int):
        return value if counts else None
    return kind


def use_descriptors(*tensors: Tensor | None) -> bool:
    """Whether the card's tensor memory accelerator can load these: sm_90, 2-byte types, 16-byte bases and strides."""
    given = [tensor for tensor in tensors if tensor is not None]
    return bool(given) and all(_has_descriptors(tensor.device) and _aligned(tensor) for tensor in given)


def rows_bucket(rows: int, experts: int) -> int:
    """log2 of the mean rows of an expert: the tuning key for a number that changes with each step."""
    return max(rows // experts, 1).bit_length()


def expert_block(experts: int) -> int:
    """BLOCK_L, one value for most layers so that they share compiled kernels."""
    return max(power_of_2(experts), 128)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _has_descriptors(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _aligned(tensor: Tensor) -> bool:
    size = tensor.element_size()
    strides = [stride > 0 and stride * size % 16 == 0 for stride in tensor.stride()[:-1]]
    return size == 2 and tensor.stride(-1) == 1 and all(strides) and tensor.data_ptr() % 16 == 0


def _allocate_descriptors() -> None:
    """Say where descriptors go; before each launch, as the setting is a thread's own and backward has its thread."""
    triton.set_allocator(_allocate)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
