"""The plan of one forward of the fused layer: which rows go where, known on the device and, as counts, on the host."""

from collections.abc import Callable
from dataclasses import dataclass

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
        return _count(host(), geometry)

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


def _count(counts_DCV: Tensor, g: Geometry) -> Counts:
    away_DCD = counts_DCV[..., g.experts :].clone()
    away_DCD.diagonal(dim1=0, dim2=2).zero_()
    here_DC = counts_DCV[..., g.rank * g.local : (g.rank + 1) * g.local].sum(2)
    own = int(here_DC[g.rank].sum())
    others_C = here_DC.sum(0) - here_DC[g.rank]
    segments = [Segment(True, None, 0, own)]
    if g.split:
        for chunk, rows in enumerate(others_C.tolist()):
            start = segments[-1].end
            segments.append(Segment(False, chunk, start, start + rows))
    else:
        segments = [Segment(True, 0, 0, own + int(others_C.sum()))]
    most = max(int(away_DCD.sum((1, 2)).max()), int(away_DCD.sum((0, 1)).max()))
    return Counts(away_DCD[g.rank].tolist(), away_DCD[:, :, g.rank].t().tolist(), most, segments)
