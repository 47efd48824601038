"""The matmul kernels on one GPU: each checked, then timed, beside torch's library.

python tools/bench/kernels.py [--csv FILE] [--shapes olmoe,deepseek] [--seconds 150] [--settings]

Needs torch and Triton only; with the package not installed, PYTHONPATH=. from the repository's root. A kernel that
fails prints its error in place of a number, and so does one whose result is wrong.
"""

import argparse
import csv
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from occult_train.kernels.gather_matmul import kernel as gather
from occult_train.kernels.grouped_matmul import kernel, library, outer, rows
from occult_train.kernels.merge_matmul import kernel as merge

BOUND = 1.5e-2
"""||got - fp32|| / ||fp32||: bf16 rounds results to 3e-3, sums of two products to 5e-3 and h to 9e-3."""


@dataclass(frozen=True)
class Shape:
    """A layer's experts on one device, and rows for them."""

    name: str
    hidden: int
    ffn: int
    experts: int
    rows: int


SHAPES = [
    Shape("olmoe", 2048, 1024, 64, 65536),
    Shape("olmoe", 2048, 1024, 32, 65536),
    Shape("qwen3-30b-a3b", 2048, 768, 128, 65536),
    Shape("qwen3-30b-a3b", 2048, 768, 64, 65536),
    Shape("deepseek", 2048, 1408, 64, 49152),
    Shape("deepseek", 2048, 1408, 32, 49152),
    Shape("qwen1.5", 2048, 1408, 60, 32768),
    Shape("qwen1.5", 2048, 1408, 30, 32768),
]


@dataclass(frozen=True)
class Case:
    """One computation, by several systems."""

    name: str
    flops: float
    reference: Callable[[], tuple[Tensor, ...]]
    systems: dict[str, Callable[[], Any]]
    tuner: Any


@triton.jit
def _swiglu_kernel(a_ptr, b_ptr, h_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + offset, mask=offset < size, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + offset, mask=offset < size, other=0.0).to(tl.float32)
    tl.store(h_ptr + offset, (a * tl.sigmoid(a) * b).to(h_ptr.dtype.element_ty), mask=offset < size)


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) * b in one pass."""
    h = torch.empty_like(a)
    _swiglu_kernel[(triton.cdiv(a.numel(), 2048),)](a, b, h, a.numel(), BLOCK=2048)
    return h


def by_copy(x: Tensor, index: Tensor, w1: Tensor, w3: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `gather_swiglu` replaces: rows copied, two products of the library, SwiGLU."""
    copied = x.index_select(0, index)
    a, b = library.nt(copied, w1, ends), library.nt(copied, w3, ends)
    return a, b, swiglu(a, b)


def ragged_ends(experts: int, total: int) -> Tensor:
    """Group ends whose sizes vary by about half their mean, one of them empty."""
    weight = torch.rand(experts, generator=torch.Generator().manual_seed(0)) + 0.3
    weight[experts // 2] = 0
    ends = (weight.cumsum(0) / weight.sum() * total).round().to(torch.int32)
    ends[-1] = total
    return ends.cuda()


def by_expert(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """fp32: rows of each expert times its matrix, or transposed rows times rows when both are matrices of rows."""
    bounds = [0, *ends.tolist()]
    groups = [slice(start, end) for start, end in itertools.pairwise(bounds)]
    if right.dim() == 2:
        return torch.stack([left[g].float().T @ right[g].float() for g in groups])
    return torch.cat([left[g].float() @ right[expert].float() for expert, g in enumerate(groups)])


def cases(shape: Shape) -> Iterator[Case]:
    """Every product of a layer's forward and backward."""

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16)

    hidden, ffn, experts, total = shape.hidden, shape.ffn, shape.experts, shape.rows
    ends, one = ragged_ends(experts, total), 2.0 * total * hidden * ffn
    x, h, both = normal(total, hidden), normal(total, ffn), normal(total, 2 * ffn)
    da, db = both[:, :ffn], both[:, ffn:]
    w1, w3 = normal(experts, ffn, hidden) / hidden**0.5, normal(experts, ffn, hidden) / hidden**0.5
    w2 = normal(experts, hidden, ffn) / ffn**0.5
    row = torch.randint(0, total // 2, (total,), device="cuda", dtype=torch.int32)
    weight = torch.rand(total, device="cuda")
    rows_tuned, outer_tuned = rows.rows_tuned, outer.outer_tuned

    def both_ways(name: str, flops: float, reference: Callable[[], Tensor], tuner: Any, *args: Any) -> Case:
        short = name.split()[0]
        systems = {
            "library": lambda: getattr(library, short)(*args),
            "triton": lambda: getattr(kernel, short)(*args),
        }
        return Case(name, flops, lambda: (reference(),), systems, tuner)

    yield both_ways("nt up", one, lambda: by_expert(x, w1.mT, ends), rows_tuned, x, w1, ends)
    yield both_ways("nt down", one, lambda: by_expert(h, w2.mT, ends), rows_tuned, h, w2, ends)
    yield both_ways("nn down", one, lambda: by_expert(x, w2, ends), rows_tuned, x, w2, ends)
    yield both_ways(
        "nn two pairs",
        2 * one,
        lambda: by_expert(da, w1, ends) + by_expert(db, w3, ends),
        rows_tuned,
        *(da, w1, ends, db, w3),
    )
    yield both_ways("tn up", 2 * one, lambda: by_expert(both, x, ends), outer_tuned, both, x, ends)
    yield both_ways("tn down", one, lambda: by_expert(x, h, ends), outer_tuned, x, h, ends)

    def gathered() -> tuple[Tensor, ...]:
        copied = x[row.long()]
        a, b = by_expert(copied, w1.mT, ends), by_expert(copied, w3.mT, ends)
        return a, b, torch.nn.functional.silu(a) * b

    yield Case(
        "swiglu, index",
        2 * one,
        gathered,
        {
            "library": lambda: by_copy(x, row, w1, w3, ends),
            "triton": lambda: gather.gather_swiglu(x, row, w1, w3, ends),
            "h alone": lambda: (gather.gather_swiglu(x, row, w1, w3, ends, keep=False),),
        },
        gather.swiglu_tuned,
    )

    def merged() -> tuple[Tensor, ...]:
        y = by_expert(h, w2.mT, ends) * weight[:, None]
        return (y.new_zeros(total // 2, hidden).index_add_(0, row.long(), y),)

    yield Case(
        "merge",
        one,
        merged,
        {"triton": lambda: merge.merge_matmul(h, w2, ends, row, weight, total // 2)},
        merge.merge_tuned,
    )


def check(got: Any, expected: tuple[Tensor, ...]) -> None:
    """Every result, from the last on: `h alone` gives only that.

    Raises:
        ArithmeticError: one is further off than bf16 explains.
    """
    results = got if isinstance(got, tuple) else (got,)
    for result, wanted in zip(reversed(results), reversed(expected), strict=False):
        error = float((result.float() - wanted).norm() / wanted.norm())
        if not error <= BOUND:
            raise ArithmeticError(f"wrong by {error:.1e}")


def measure(function: Callable[[], Any]) -> float:
    """Median ms."""
    return float(triton.testing.do_bench(function, warmup=10, rep=40, return_mode="median"))


def run(shape: Shape, case: Case, peak: float) -> Iterator[dict[str, Any]]:
    """A line for each system: its time and rate, or its error."""
    expected = case.reference()
    for system, function in case.systems.items():
        line = {"shape": shape.name, "experts": shape.experts, "case": case.name, "system": system}
        try:
            check(function(), expected)
            ms = measure(function)
        except Exception as error:  # a kernel that does not compile or run is a result of this script
            first = error.__cause__ or error
            yield line | {"note": f"{type(first).__name__}: {str(first)[-300:]}"}
            continue
        rate = case.flops / ms / 1e9
        setting = "" if system == "library" else short(case.tuner.best_config)
        yield line | {"ms": round(ms, 3), "tflops": round(rate), "of_mm": round(rate / peak, 3), "note": setting}


def short(setting: Any) -> str:
    """128x256x64 w8 s4 r1 flat: tile, warps, stages, resident programs."""
    meta = setting.kwargs
    tile = "x".join(str(meta[f"BLOCK_{axis}"]) for axis in "MNK")
    flat = " flat" if meta["FLATTEN"] else ""
    return f"{tile} w{setting.num_warps} s{setting.num_stages} r{meta['RESIDENT']}{flat}"


def show_settings(tuner: Any) -> None:
    """What tuning measured last: ms of each setting."""
    for setting, times in getattr(tuner, "configs_timings", {}).items():
        print(f"{'':46} {times[0]:8.3f} ms  {short(setting)}", flush=True)


def tensor_core_instructions(function: Any) -> str:
    """In how many of a kernel's compiled versions wgmma shows, in machine code where it can be read."""
    found: dict[str, int] = {}
    for entry in getattr(function, "device_caches", {}).values():
        for compiled in entry[0].values():
            try:
                name = "HGMMA" if "HGMMA" in compiled.asm["sass"] else "no HGMMA"
            except Exception:  # no disassembler here; what it was assembled from then
                name = "wgmma in PTX" if "wgmma" in compiled.asm["ptx"] else "no wgmma in PTX"
            found[name] = found.get(name, 0) + 1
    return ", ".join(f"{count} {name}" for name, count in found.items()) or "none compiled"


def show(line: dict[str, Any]) -> None:
    name = f"{line['shape']} L={line['experts']}"
    numbers = f"{line['ms']:8.3f} ms {line['tflops']:5} TFLOP/s {line['of_mm']:6.1%}" if "ms" in line else " " * 34
    print(f"{name:22} {line['case']:14} {line['system']:8} {numbers}  {line['note']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", help="write the lines here too")
    parser.add_argument("--shapes", default="", help="names, separated by commas; all by default")
    parser.add_argument("--seconds", type=float, default=150, help="start no further case after this time")
    parser.add_argument("--settings", action="store_true", help="show the time of every setting that tuning tried")
    options = parser.parse_args()
    start = time.monotonic()
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    peak = 2 * 8192**3 / measure(lambda: a @ b) / 1e9
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, mm {peak:.0f} TFLOP/s"
    )
    lines = []
    for shape in SHAPES:
        if options.shapes and shape.name not in options.shapes.split(","):
            continue
        for case in cases(shape):
            if time.monotonic() - start > options.seconds:
                print(f"{shape.name} L={shape.experts} {case.name}: left out, {options.seconds:.0f} s are over")
                continue
            for line in run(shape, case, peak):
                show(line)
                lines.append(line)
                if options.settings and line["system"] != "library":
                    show_settings(case.tuner)
    for function in (rows.rows_kernel, outer.outer_kernel, gather.swiglu_kernel, merge.merge_kernel):
        print(f"{function.__name__}: {tensor_core_instructions(function)}")
    print(f"{time.monotonic() - start:.0f} s")
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, ["shape", "experts", "case", "system", "ms", "tflops", "of_mm", "note"])
            writer.writeheader()
            writer.writerows(lines)


if __name__ == "__main__":
    main()
