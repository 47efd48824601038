"""The plan of one forward of the fused layer: which rows go where, known on the device and, as counts, on the host."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise, product

import torch
import torch.distributed as dist
from torch import Tensor

from occult_train.kernels.positions import kernel
from occult_train.kernels.positions.reference import Geometry, Layout, chunk_size
from occult_train.parallel.grid import Grid

# torch 2.13 gave it a better name and warns of the old one
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass(frozen=True)
class Segment:
    """Rows that are computed together: this device's own, or those that arrived in some chunk, or both."""

    own: bool
    chunk: int | None
    start: int
    end: int
    """Expanded rows start:end."""

    @property
    def rows(self) -> int:
        """How many expanded rows."""
        return self.end - self.start


@dataclass(frozen=True)
class Counts:
    """What the host knows of one forward, from all ranks' counts."""

    sends_CD: list[list[int]]
    """Rows sent to each device in each chunk, 0 for this one."""
    arrives_CD: list[list[int]]
    """Rows that arrive from each device."""
    most_rows: int
    """The largest number of rows that any device sends or receives in this forward; the same on all ranks."""
    segments: list[Segment]

    @property
    def sent(self) -> int:
        """S."""
        return sum(map(sum, self.sends_CD))

    @property
    def arrived(self) -> int:
        """R."""
        return sum(map(sum, self.arrives_CD))

    @property
    def expanded(self) -> int:
        """X."""
        return self.segments[-1].end

    def sent_slice(self, chunk: int) -> slice:
        """Rows of a chunk among those sent."""
        return _slice(self.sends_CD, chunk)

    def arrived_slice(self, chunk: int) -> slice:
        """Rows of a chunk among those that arrived."""
        return _slice(self.arrives_CD, chunk)


def _slice(table: list[list[int]], row: int) -> slice:
    start = sum(map(sum, table[:row]))
    return slice(start, start + sum(table[row]))


@dataclass(frozen=True)
class Routes:
    """Index maps of this rank's tokens (kernels/positions), and `counts()`, which waits for the host's copy."""

    geometry: Geometry
    layout: Layout
    slots_TK: Tensor
    position_TK: Tensor
    own_TK: Tensor
    send_TD: Tensor
    counts: Callable[[], Counts]


def find_routes(slots_TK: Tensor, grid: Grid, experts: int, chunks: int) -> Routes:
    """Plan one forward. Collective over the expert-parallel group (one all-gather of D·C·(E + D) numbers).

    Args:
        slots_TK: [T, K] int64 slots of the chosen experts; T may differ between ranks.
        chunks: into which tokens are cut so that exchange and computing overlap; 0 computes all rows at once.
    """
    devices = grid.expert_size
    tokens, k = slots_TK.shape
    split = chunks > 0 and devices > 1
    count = chunks if split else 1
    geometry = Geometry(grid.expert_rank, devices, experts, chunk_size(tokens, count), count, split)
    counts_CV, blocks = kernel.count(slots_TK, geometry)
    counts_DCV = counts_CV[None]
    if devices > 1:
        gathered = counts_CV.new_empty((devices * count, geometry.width))
        _all_gather(gathered, counts_CV, group=grid.expert_group)
        counts_DCV = gathered.view(devices, count, geometry.width)
    host = _to_host(counts_DCV) if devices > 1 else None
    layout = kernel.layout(counts_DCV, geometry)
    maps = kernel.positions(slots_TK, blocks, layout, geometry)

    def counts() -> Counts:
        if host is None:  # every token's K experts live here
            return Counts([[0]], [[0]], 0, [Segment(True, None, 0, tokens * k)])
        return _count(host().tolist(), geometry)

    return Routes(geometry, layout, slots_TK, *maps, counts)


def _to_host(counts: Tensor) -> Callable[[], Tensor]:
    """Start copying to the host; the result waits for the copy alone, not for what was launched after it."""
    if not counts.is_cuda:
        return lambda: counts
    pinned = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
    pinned.copy_(counts, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> Tensor:
        done.synchronize()
        return pinned

    return wait


def _count(counts_DCV: list[list[list[int]]], g: Geometry) -> Counts:
    """Plain numbers: the device has nothing to do while the host counts."""
    devices, chunks, mine = range(g.devices), range(g.chunks), slice(g.rank * g.local, (g.rank + 1) * g.local)
    rows_DCD = [[counts_DCV[s][c][g.experts :] for c in chunks] for s in devices]
    for s, c in product(devices, chunks):
        rows_DCD[s][c][s] = 0
    here_DC = [[sum(counts_DCV[s][c][mine]) for c in chunks] for s in devices]
    own = sum(here_DC[g.rank])
    others_C = [sum(here_DC[s][c] for s in devices if s != g.rank) for c in chunks]
    if g.split:
        ends = list(accumulate(others_C, initial=own))
        segments = [Segment(True, None, 0, own)]
        segments += [Segment(False, c, start, end) for c, (start, end) in enumerate(pairwise(ends))]
    else:
        segments = [Segment(True, 0, 0, own + others_C[0])]
    sent = [sum(map(sum, rows_DCD[s])) for s in devices]
    arrived = [sum(rows_DCD[s][c][d] for s, c in product(devices, chunks)) for d in devices]
    arrives_CD = [[rows_DCD[s][c][g.rank] for s in devices] for c in chunks]
    return Counts(rows_DCD[g.rank], arrives_CD, max(*sent, *arrived), segments)
