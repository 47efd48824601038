"""Latency and bandwidth of all-to-all on this machine, and whether two constants are enough to describe it."""

import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from occult_train.errors import UserError
from occult_train.launcher.plan import count_gpus
from occult_train.moe.links import Link
from occult_train.tools.bench.ranks import Launch, run_tasks

MEGABYTES = {"cuda": (16.0, 64.0, 256.0), "cpu": (8.0, 24.0, 64.0)}
"""That a rank sends to all others together: the constants come from the first and the last, and predict the middle."""
ROUNDS = 21
"""Each measures every size once, so that what disturbs the machine for a while disturbs all of them."""
TOLERANCE = 0.15


@dataclass(frozen=True)
class Fit:
    """Times of all-to-all by size, and the constants that the outer two give."""

    ranks: int
    device: str
    nbytes: tuple[float, float, float]
    """That a rank sends to others."""
    milliseconds: tuple[float, float, float]
    """Medians over rounds, of the slowest rank."""

    @property
    def link(self) -> Link:
        """Latency of a message and bandwidth of a rank."""
        (first, _, last), (early, _, late) = self.nbytes, self.milliseconds
        per_byte = (late - early) / (last - first)
        fixed = early - per_byte * first
        return Link(max(fixed, 0.0) * 1e3 / (self.ranks - 1), 1e-6 / per_byte)

    @property
    def predicted(self) -> float:
        """Milliseconds of the middle size by the constants."""
        return self.link.milliseconds(self.ranks - 1, self.nbytes[1])

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted / self.milliseconds[1] - 1

    @property
    def agrees(self) -> bool:
        """Whether the model holds on this machine."""
        return abs(self.error) <= TOLERANCE

    def words(self) -> str:
        """One paragraph for the user."""
        sizes = ", ".join(
            f"{nbytes / 1e6:.0f} MB {ms:.3f} ms" for nbytes, ms in zip(self.nbytes, self.milliseconds, strict=True)
        )
        verdict = "" if self.agrees else f": more than {TOLERANCE:.0%} off, so times below are not to be trusted"
        constants = f"{self.link.latency_us:.1f} us a message and {self.link.gigabytes_per_second:.2f} GB/s"
        measured = f"all-to-all of {self.ranks} {self.device} ranks here: {sizes}"
        return f"{measured}. {constants} predict the middle one {self.error:+.1%}{verdict}"


def fit(ranks: int) -> Fit:
    """Measure all-to-alls among ranks of this machine.

    Args:
        ranks: how many; 0 takes all GPUs, or four ranks on CPU.

    Raises:
        UserError: fewer than two ranks or GPUs, measuring failed, or time did not grow with size.
    """
    gpus = count_gpus()
    count = ranks or gpus or 4
    if count < 2 or (gpus and count > gpus):
        raise UserError(f"--fit with --ranks={ranks} needs at least two ranks, each with a GPU of the {gpus} here")
    device = "cuda" if gpus else "cpu"
    launch = Launch(count, cpu=not gpus, environment={} if gpus else {"OMP_NUM_THREADS": "1"}, task_seconds=300)
    sizes = [size * 1e6 for size in MEGABYTES[device]]
    for _, found, error in run_tasks(f"{__name__}:measure", [sizes], launch):
        if error:
            raise UserError(f"measuring failed: {error.splitlines()[-1]}")
        result = Fit(count, device, tuple(found["nbytes"]), tuple(found["milliseconds"]))
    if result.milliseconds[2] <= result.milliseconds[0]:
        raise UserError(f"all-to-all of more bytes took no longer: {result.milliseconds} ms; is the machine busy?")
    return result


def measure(sizes: list[float]) -> dict[str, Any]:
    """Median milliseconds of all_to_all_single of each size on the slowest rank, and the exact bytes. Collective."""
    ranks = dist.get_world_size()
    gpu = torch.cuda.is_available() and dist.get_backend() == "nccl"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    rows = [int(size / (ranks - 1) / 4) * ranks for size in sizes]
    buffers = [(torch.ones(count, device=device), torch.empty(count, device=device)) for count in rows]
    times: list[list[float]] = [[] for _ in sizes]
    for number in range(ROUNDS + 2):
        for index, (source, target) in enumerate(buffers):
            taken = _once(source, target)
            if number >= 2:
                times[index].append(taken)
    slowest = torch.tensor(times, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    nbytes = [count * 4 * (ranks - 1) / ranks for count in rows]
    return {"nbytes": nbytes, "milliseconds": [statistics.median(row) for row in slowest.tolist()]}


def _once(source: torch.Tensor, target: torch.Tensor) -> float:
    dist.barrier()
    if source.is_cuda:
        torch.cuda.synchronize()
    before = time.perf_counter()
    dist.all_to_all_single(target, source)
    if source.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - before) * 1e3
