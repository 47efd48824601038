"""How much of the communication in a GPU's trace is hidden behind computing.

Communication is NCCL's kernels, copies between device and host, writes into other GPUs' memory and waiting at barriers
for theirs; computing is every other kernel and copy. What of the one runs while some of the other does is hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from occult_train.tools.bench.breakdown import COMMUNICATION, MARK, ONE_SIDED, Kernel, record_kernels

MARK_CYCLES = 4_000_000
"""About two milliseconds, in which the host runs ahead as it does in training."""
SAME_EXCHANGE = 100.0
"""Microseconds between two communications that belong together: copies of one exchange, which waits for its peer."""

Spans = list[tuple[float, float]]


def union(spans: Spans, gap: float = 0.0) -> Spans:
    """Disjoint, in order; those at most `gap` apart become one."""
    found: Spans = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1] + gap:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def common(a: Spans, b: Spans) -> float:
    """Length of what two unions have in common."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


@dataclass(frozen=True)
class Split:
    """Milliseconds of a trace: unions, so that what runs at once counts once."""

    computing: float
    communication: float
    exposed: float
    """Of the communication, what nothing is computed beside."""
    idle: float
    """Neither."""

    @property
    def hidden(self) -> float:
        """Share of the communication, 1 where there is none."""
        return 1 - self.exposed / self.communication if self.communication else 1.0


def is_communication(kernel: Kernel, one_sided: bool) -> bool:
    """See the head of this file."""
    return bool(COMMUNICATION.search(kernel.name) or (one_sided and ONE_SIDED.search(kernel.name)))


def split(kernels: Sequence[Kernel], one_sided: bool = False) -> Split:
    """From the first kernel's start to the last one's end."""
    if not kernels:
        return Split(0.0, 0.0, 0.0, 0.0)
    sides: dict[bool, Spans] = {True: [], False: []}
    for kernel in kernels:
        sides[is_communication(kernel, one_sided)].append((kernel.start, kernel.end))
    moving, computing = union(sides[True], SAME_EXCHANGE), union(sides[False])
    there, busy = (sum(end - start for start, end in spans) for spans in (moving, computing))
    exposed = there - common(moving, computing)
    whole = max(k.end for k in kernels) - min(k.start for k in kernels)
    return Split(*(value / 1000 for value in (busy, there, exposed, whole - busy - exposed)))


def mean(splits: Sequence[Split]) -> Split:
    """Of each field, over at least one."""
    return Split(*(sum(getattr(s, f) for s in splits) / len(splits) for f in Split.__dataclass_fields__))


def phases(kernels: Sequence[Kernel], names: Sequence[str]) -> dict[str, list[list[Kernel]]]:
    """What ran between marks, which stand before each phase and at the end; the phases take turns.

    Raises:
        RuntimeError: the marks are not that many.
    """
    ordered = sorted(kernels, key=lambda kernel: kernel.start)
    marks = [kernel for kernel in ordered if MARK.search(kernel.name)]
    if len(marks) < 2 or (len(marks) - 1) % len(names):
        raise RuntimeError(f"the trace has {len(marks)} marks for the phases {', '.join(names)} in turn")
    found: dict[str, list[list[Kernel]]] = {name: [] for name in names}
    for number, (mark, after) in enumerate(pairwise(marks)):
        inside = [k for k in ordered if mark.end <= k.start < after.start and not MARK.search(k.name)]
        found[names[number % len(names)]].append(inside)
    return found


def record(steps: dict[str, Callable[[], Any]], repetitions: int = 4) -> dict[str, list[list[Kernel]]]:
    """Profile phases in turn, warm, on a GPU, with the host ahead of the device. Collective.

    Ranks begin together, and one more repetition comes before those that count: profilers take their time to start,
    and who was first would seem to communicate for as long as the last one took.
    """

    def run() -> None:
        if dist.is_initialized():
            dist.barrier()
        torch.cuda.synchronize()
        for _ in range(repetitions + 1):
            for step in steps.values():
                torch.cuda._sleep(MARK_CYCLES)
                step()
        torch.cuda._sleep(MARK_CYCLES)

    return {name: runs[1:] for name, runs in phases(record_kernels(run), list(steps)).items()}
