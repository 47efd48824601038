"""Which way the fused layer computes on this machine: measured once, on the layer's own shape, alike on all ranks."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from occult_train.kernels.grouped_matmul import library
from occult_train.moe.fused import MATMULS, FusedExperts, Way
from occult_train.moe.transport import HostTransport, SymmetricTransport
from occult_train.parallel.grid import Grid
from occult_train.parallel.traffic import Traffic

CHUNKS = (0, 1, 2, 4)
"""What `overlap=auto` tries: no overlap; own tokens while the others' travel; and those cut in 2 or 4."""
WARMUP, REPEATS = 2, 5
NEEDS = {
    "symmetric": "parallel.expert of 2 or more GPUs of one host that can all write each other's memory",
    "host": "parallel.expert of 2 or more GPUs of one host, and 64 MB of /dev/shm for each ordered pair of them",
}


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
    several = grid.expert_size > 1
    transports = {
        "collective": True,
        "symmetric": several and SymmetricTransport.available(grid),
        "host": several and HostTransport.available(grid),
    }
    if not transports.get(wanted.transport, True):
        raise ValueError(f"transport={wanted.transport} needs {NEEDS[wanted.transport]}")
    names = [n for n, works in transports.items() if works and wanted.transport in ("auto", n)]
    if transports["symmetric"] and wanted.transport == "auto":
        names.remove("host")  # for GPUs that cannot reach each other's memory
    chunks = CHUNKS if wanted.overlap == "auto" else (0 if wanted.overlap == "none" else int(wanted.overlap),)
    found = [
        Way(matmul, name, c)
        for matmul in _matmuls(shape, grid, wanted)
        for name in names
        for c in chunks
        if c == 0 or (several and name != "symmetric")
    ]
    if not found and not several:
        raise ValueError(f"overlap={wanted.overlap} needs several ranks a layer: on one, nothing travels")
    if not found:
        raise ValueError(f"transport={wanted.transport} moves all rows at once; overlap={wanted.overlap} was asked for")
    return found


def _matmuls(shape: Shape, grid: Grid, wanted: Wanted) -> list[str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    widths = (shape.hidden, shape.intermediate)
    has_library = library.supported(shape.dtype, device, widths, shape.experts // grid.expert_size)
    if wanted.matmul in ("library", "mixed") and not has_library:
        raise ValueError(f"matmul={wanted.matmul} does not take {shape.dtype} of widths {widths} here")
    return [m for m in MATMULS if wanted.matmul in ("auto", m) and (m in ("triton", "joint") or has_library)]


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
    times = {way: trial.measure(way) for way in found if way.matmul == found[0].matmul}
    first = min(times, key=lambda way: times[way])
    # how rows travel hardly depends on who multiplies them, so the rest is tried with the best transport alone
    rest = [way for way in found if way not in times and (way.transport, way.chunks) == (first.transport, first.chunks)]
    times |= {way: trial.measure(way) for way in rest}
    del trial
    torch.cuda.empty_cache()
    best = min(times, key=lambda way: times[way])
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
