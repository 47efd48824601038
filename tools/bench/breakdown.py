"""Where a repetition's time goes, by kernels' names in torch's profiler."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from occult_train.moe.transport import SymmetricBox

COMMUNICATION = re.compile(r"nccl|barrier|symm|memcpy (htod|dtoh)", re.IGNORECASE)
MATMUL = re.compile(
    r"gemm|grouped|cutlass|wgmma|nvjet|xmma|matmul|scatter2scatter|groupxty|_sdd|_dsd|_dds"
    r"|^rows_kernel|^outer_kernel|^swiglu_kernel|^merge_kernel",
    re.IGNORECASE,
)

ONE_SIDED = re.compile(r"^_(pack|merge|share)_kernel")
"""Kernels of ours that write into other GPUs' memory, where the symmetric transport is used."""
MARK = re.compile(r"spin_kernel")
"""What `torch.cuda._sleep` runs: long between phases, short where a barrier was passed (`SymmetricBox.visible`)."""
SHORT = 100.0
"""Microseconds."""


@dataclass(frozen=True)
class Kernel:
    """One run of a kernel, or a copy; microseconds."""

    name: str
    start: float
    end: float

    @property
    def kind(self) -> str:
        """communication, matmul or other."""
        if COMMUNICATION.search(self.name):
            return "communication"
        return "matmul" if MATMUL.search(self.name) else "other"


@dataclass(frozen=True)
class Breakdown:
    """Milliseconds of one repetition on this rank. Kinds may overlap; `idle` is time when no kernel ran."""

    matmul: float
    communication: float
    exposed: float
    """Of the communication, what ran while nothing else did."""
    other: float
    idle: float
    top: tuple[tuple[str, float, int], ...]
    """The longest kernels of all: name, milliseconds and runs in a repetition."""


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, reach = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return total


def break_down(kernels: list[Kernel], repetitions: int, top: int = 12) -> Breakdown:
    """Sort kernels of `repetitions` into kinds; the window is from the first kernel's start to the last one's end."""
    scale = 1 / (1000 * repetitions)
    sums: dict[str, float] = defaultdict(float)
    names: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        sums[kernel.kind] += (kernel.end - kernel.start) * scale
        names[kernel.name].append((kernel.end - kernel.start) * scale)
    busy = covered((k.start, k.end) for k in kernels)
    without = covered((k.start, k.end) for k in kernels if k.kind != "communication")
    window = max((k.end for k in kernels), default=0.0) - min((k.start for k in kernels), default=0.0)
    longest = sorted(names, key=lambda name: -sum(names[name]))[:top]
    return Breakdown(
        sums["matmul"],
        sums["communication"],
        (busy - without) * scale,
        sums["other"],
        (window - busy) * scale,
        tuple((name, sum(names[name]), round(len(names[name]) / repetitions)) for name in longest),
    )


def with_waiting(kernels: Sequence[Kernel]) -> list[Kernel]:
    """In order; a short mark becomes the waiting that it ends, from the last write for other GPUs on if there was one
    since the mark before it."""
    found: list[Kernel] = []
    written = float("inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        if ONE_SIDED.search(kernel.name):
            written = kernel.end
        if MARK.search(kernel.name) and kernel.end - kernel.start < SHORT:
            kernel, written = Kernel("barrier", min(written, kernel.start), kernel.end), float("inf")
        found.append(kernel)
    return sorted(found, key=lambda kernel: kernel.start)


def record_kernels(run: Callable[[], Any]) -> list[Kernel]:
    """What `run` does on the GPU, in order, and where it waited at barriers. Collective if `run` is."""
    torch.cuda.synchronize()
    SymmetricBox.visible = True
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            run()
            torch.cuda.synchronize()
    finally:
        SymmetricBox.visible = False
    events: Any = recorded.events()
    gpu = torch.autograd.DeviceType.CUDA
    return with_waiting(
        [
            Kernel(event.name, event.time_range.start, event.time_range.end)
            for event in events
            if event.device_type == gpu and not getattr(event, "is_user_annotation", False)
        ]
    )


def profile_kernels(run: Callable[[int], Any], repetitions: int = 5) -> Breakdown:
    """Profile `run(i)`, back to back and warm, on a GPU. Collective if `run` is."""
    return break_down(record_kernels(lambda: [run(i) for i in range(repetitions)]), repetitions)
