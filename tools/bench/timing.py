"""Clocks and memory of one rank, on GPU and (for a dry run) on CPU, and agreement among ranks."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

FLUSH_BYTES = 256 * 2**20
"""More than any L2; written before every repetition, so that no input is found in the cache."""
BATCH = 8
"""Repetitions queued before the host waits for them: a system that never waits itself gets to run ahead, as in
training."""


@dataclass(frozen=True)
class Times:
    """Milliseconds of one repetition on the slowest rank, over repetitions."""

    median: float
    p10: float
    p90: float
    repetitions: int

    @classmethod
    def of(cls, values: list[float]) -> "Times":
        """Median and percentiles of at least one value."""
        ordered = sorted(values)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered))


class Clock:
    """Times a function on all ranks together: each repetition starts behind a barrier and counts its slowest rank."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.gpu = device, device.type == "cuda"
        self._flush = torch.empty(FLUSH_BYTES if self.gpu else 0, dtype=torch.int8, device=device)
        self._barrier = torch.zeros(1, device=device)

    def measure(self, run: Callable[[int], Any], seconds: float, least: int = 5, most: int = 200) -> Times:
        """Repeat `run(i)` for about `seconds` and at least `least` times. Call it warm. Collective."""
        first = max(self._slowest(self._batch(run, 0, 2)))
        count = min(most, max(least, int(seconds * 1000 / max(first, 1e-3))))
        values: list[float] = []
        while len(values) < count:
            values += self._slowest(self._batch(run, len(values), min(BATCH, count - len(values))))
        return Times.of(values)

    def _batch(self, run: Callable[[int], Any], start: int, count: int) -> list[float]:
        marks = [self._repeat(run, start + i) for i in range(count)]
        if not self.gpu:
            return [(after - before) * 1000 for before, after in marks]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in marks]

    def _repeat(self, run: Callable[[int], Any], index: int) -> tuple[Any, Any]:
        self._flush.zero_()
        dist.all_reduce(self._barrier)
        before = self._mark()
        run(index)
        return before, self._mark()

    def _mark(self) -> Any:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _slowest(self, values: list[float]) -> list[float]:
        shared = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return shared.tolist()


def matmul_peak(clock: Clock, dtype: torch.dtype) -> float:
    """TFLOP/s of a product of two 8192 x 8192 matrices (256 on CPU) on the slowest rank. Collective."""
    size = 8192 if clock.gpu else 256
    a, b = (torch.randn(size, size, device=clock.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    for _ in range(3):
        torch.mm(a, b, out=out)
    times = clock.measure(lambda i: torch.mm(a, b, out=out), 0.2)
    return 2 * size**3 / times.median / 1e9


@dataclass(frozen=True)
class Memory:
    """Bytes on the worst rank."""

    saved: int
    """Held after forward for backward, the output not counted."""
    peak: int
    """Highest during forward and backward above the state before; gradients of weights count, as they arise here."""
    gradients: int
    """Of the peak, gradients that are left at the end."""


def measure_memory(forward: Callable[[], torch.Tensor], backward: Callable[[torch.Tensor], Any]) -> Memory | None:
    """Memory of one forward and backward, run warm and without gradients from before; None on CPU. Collective."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = forward()
    torch.cuda.synchronize()
    saved = torch.cuda.memory_allocated() - before - y.untyped_storage().nbytes()
    backward(y)
    del y
    torch.cuda.synchronize()
    peak, after = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    worst = torch.tensor([saved, peak, after], device="cuda")
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return Memory(*worst.tolist())


def device_memory_used() -> int:
    """Bytes of this GPU in use by anybody, caches of torch's allocator not counted; 0 on CPU."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


@dataclass
class SentBytes:
    """Bytes handed to all_to_all_single for other ranks."""

    total: int = 0


@contextmanager
def counted_all_to_all() -> Iterator[SentBytes]:
    """Count what goes through torch.distributed.all_to_all_single, on this rank, while the context lasts."""
    count, original = SentBytes(), dist.all_to_all_single

    def counting(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: list[int] | None = None,
        input_split_sizes: list[int] | None = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        rows = max(input.shape[0], 1)
        own = input_split_sizes[rank] / rows if input_split_sizes else 1 / ranks
        count.total += round(input.numel() * input.element_size() * (1 - own))
        return original(output, input, output_split_sizes, input_split_sizes, group, async_op)

    dist.all_to_all_single = counting
    try:
        yield count
    finally:
        dist.all_to_all_single = original
