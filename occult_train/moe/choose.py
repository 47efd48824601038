"""Which way the fused layer computes on this machine: measured once, on the layer's own shape, alike on all ranks."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from occult_train.kernels.grouped_matmul import library
from occult_train.moe.fused import FusedExperts, Way
from occult_train.moe.transport import SymmetricTransport
from occult_train.parallel.grid import Grid
from occult_train.parallel.traffic import Traffic

CHUNKS = (0, 1, 2, 4)
"""What `overlap=auto` tries: no overlap; own tokens while the others' travel; and those cut in 2 or 4."""
WARMUP, REPEATS = 2, 5


@dataclass(frozen=True)
class Shape:
    """A layer, and the tokens of a rank's micro-batch."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    tokens: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Wanted:
    """Settings, each `auto` or a choice."""

    matmul: str = "auto"
    transport: str = "auto"
    overlap: str = "auto"


def can_run_kernels() -> bool:
    """Whether Triton kernels run here: on a GPU, or interpreted (TRITON_INTERPRET=1)."""
    return torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


def candidates(shape: Shape, grid: Grid, wanted: Wanted) -> list[Way]:
    """All ways that the settings leave open and that work here.

    Raises:
        ValueError: a setting asks for what does not work here.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    has_library = library.supported(
        shape.dtype, device, (shape.hidden, shape.intermediate), shape.experts // grid.expert_size
    )
    has_symmetric = grid.expert_size > 1 and SymmetricTransport.available(grid)
    if wanted.matmul == "library" and not has_library:
        raise ValueError(
            f"matmul=library does not take {shape.dtype} of widths {shape.hidden}, {shape.intermediate} here"
        )
    if wanted.transport == "symmetric" and not has_symmetric:
        raise ValueError(
            "transport=symmetric needs peer access between all GPUs of an expert-parallel group of one host"
        )
    matmuls = [m for m in ("library", "triton") if wanted.matmul in ("auto", m) and (m == "triton" or has_library)]
    found = []
    for matmul in matmuls:
        if has_symmetric and wanted.transport != "collective" and wanted.overlap in ("auto", "none"):
            found.append(Way(matmul, "symmetric", 0))
        if wanted.transport != "symmetric":
            chunks = CHUNKS if wanted.overlap == "auto" else (0 if wanted.overlap == "none" else int(wanted.overlap),)
            found += [Way(matmul, "collective", c) for c in chunks if c == 0 or grid.expert_size > 1]
    if not found:
        raise ValueError(f"transport=symmetric moves all rows at once; overlap={wanted.overlap} was asked for")
    return found


def choose(shape: Shape, grid: Grid, wanted: Wanted) -> tuple[Way, str]:
    """The fastest way, forward and backward, on random tokens; and a line that says what was measured.

    Collective over all ranks. Without a GPU nothing is measured and the first way is taken.

    Raises:
        ValueError: see `candidates`.
    """
    found = candidates(shape, grid, wanted)
    if len(found) == 1 or not torch.cuda.is_available():
        return found[0], f"{_words(found[0])}, as set"
    trial = _Trial(shape, grid)
    times = {way: trial.measure(way) for way in found}
    best = min(found, key=lambda way: times[way])
    listed = ", ".join(f"{_words(way)} {ms:.2f}" for way, ms in sorted(times.items(), key=lambda item: item[1]))
    return best, f"{_words(best)}: fastest, in ms forward and backward: {listed}"


def _words(way: Way) -> str:
    cut = f", {way.chunks} chunks" if way.chunks else ""
    return f"{way.matmul} products, {way.transport} transport{cut}"


class _Trial:
    """A layer with random weights and tokens."""

    def __init__(self, shape: Shape, grid: Grid) -> None:
        self.shape, self.grid = shape, grid
        local, device = shape.experts // grid.expert_size, torch.device("cuda", torch.cuda.current_device())
        generator = torch.Generator(device).manual_seed(grid.rank)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device).mul_(0.02).to(shape.dtype).requires_grad_()

        self.x = random(shape.tokens, shape.hidden)
        self.weights = [
            random(local, shape.intermediate, shape.hidden),
            random(local, shape.hidden, shape.intermediate),
            random(local, shape.intermediate, shape.hidden),
        ]
        scores = torch.rand(shape.tokens, shape.experts, generator=generator, device=device)
        self.gates, self.slots = scores.topk(shape.top_k)

    def measure(self, way: Way) -> float:
        """Milliseconds of one forward and backward, of the slowest rank."""
        function = FusedExperts(self.grid, self.shape.experts, Traffic(), way)

        def once() -> None:
            function(self.x, self.slots, self.gates, *self.weights).backward(self.x.detach())

        taken = torch.tensor([_milliseconds(once)], device=self.x.device)
        if dist.is_initialized():
            dist.all_reduce(taken, dist.ReduceOp.MAX)
        for tensor in (self.x, *self.weights):
            tensor.grad = None
        return float(taken)


def _milliseconds(once: Callable[[], None]) -> float:
    for _ in range(WARMUP):
        once()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPEATS):
        once()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / REPEATS
