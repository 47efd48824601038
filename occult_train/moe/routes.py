"""The plan of one forward of the fused layer: which rows go where, known on the device and, as counts, on the host."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, product

import torch
import torch.distributed as dist
from torch import Tensor

from occult_train.kernels.launching import power_of_2
from occult_train.kernels.positions import kernel
from occult_train.kernels.positions.reference import NO_LIMIT, Geometry, Layout, chunk_size
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
    most_expanded: int
    """The largest first segment of any device; the same on all ranks."""
    segments: list[Segment]
    guessed: bool = False
    """Whether these are no counts but a `Room`."""

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
class Room:
    """Rows for which memory is made before the host knows their number; alike on all ranks, as counts are."""

    rows: int = 0
    """Sent or received."""
    expanded: int = 0
    """Of the first segment."""

    def holds(self, counts: Counts) -> bool:
        """Whether it was enough."""
        return counts.most_rows <= self.rows and counts.most_expanded <= self.expanded

    def after(self, counts: Counts) -> "Room":
        """For the next forward: the same while it is neither too little nor much more than was needed."""
        return Room(_enough(self.rows, counts.most_rows), _enough(self.expanded, counts.most_expanded))

    def guess(self) -> Counts:
        """What would fill it, on one host; all rows are computed at once."""
        return Counts(
            [[self.rows]], [[self.rows]], self.rows, self.expanded, [Segment(True, 0, 0, self.expanded)], guessed=True
        )


def _enough(had: int, needed: int) -> int:
    """A sixteenth more than needed, unless what one had is enough and less than half more."""
    if needed <= had <= needed + needed // 2:
        return had
    grain = max(1, power_of_2(needed) // 64)
    return -(-(needed + needed // 16) // grain) * grain


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

    def with_all_room(self) -> "Routes":
        """The same after memory was made for all rows (of one segment)."""
        return replace(self, layout=replace(self.layout, relative_GL=self.layout.ends_GL))


def all_gather(numbers: Tensor, grid: Grid) -> Tensor:
    """[C, V] of each rank, the same C and V, to [D, C, V]. Collective over the expert-parallel group."""
    gathered = numbers.new_empty((grid.expert_size * numbers.shape[0], *numbers.shape[1:]))
    _all_gather(gathered, numbers, group=grid.expert_group)
    return gathered.view(grid.expert_size, *numbers.shape)


class HostCopy:
    """Copies numbers to the host, again and again into the same pinned memory."""

    def __init__(self) -> None:
        self._pinned: Tensor | None = None
        self._done: torch.cuda.Event | None = None

    def __call__(self, numbers: Tensor) -> Callable[[], Tensor]:
        """Start copying; the result waits for the copy alone, not for what was launched after it. Good until the next
        call."""
        if not numbers.is_cuda:
            return lambda: numbers
        if self._pinned is None or self._pinned.shape != numbers.shape:
            self._pinned = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._done = torch.cuda.Event()
        pinned, done = self._pinned, self._done
        assert done is not None
        pinned.copy_(numbers, non_blocking=True)
        done.record()

        def wait() -> Tensor:
            done.synchronize()
            return pinned

        return wait


def find_routes(
    slots_TK: Tensor, grid: Grid, experts: int, chunks: int, room: Room | None = None,
    gather: Callable[[Tensor, Grid], Tensor] = all_gather, to_host: HostCopy | None = None,
) -> Routes:  # fmt: skip
    """Plan one forward. Collective over the expert-parallel group (D·C·(E + D) numbers are gathered).

    Args:
        slots_TK: [T, K] int64 slots of the chosen experts; T may differ between ranks.
        chunks: into which tokens are cut so that exchange and computing overlap; 0 computes all rows at once.
        room: rows there is memory for, if not for all; then products end there. For one segment.
        to_host: of whoever does this again and again, and asks for the counts in between.
    """
    devices = grid.expert_size
    tokens, k = slots_TK.shape
    split = chunks > 0 and devices > 1
    count = chunks if split else 1
    geometry = Geometry(grid.expert_rank, devices, experts, chunk_size(tokens, count), count, split)
    counts_CV, blocks = kernel.count(slots_TK, geometry)
    counts_DCV = counts_CV[None]
    if devices > 1:
        counts_DCV = gather(counts_CV, grid)
    host = (to_host or HostCopy())(counts_DCV) if devices > 1 else None
    layout = kernel.layout(counts_DCV, geometry, NO_LIMIT if room is None else room.expanded)
    maps = kernel.positions(slots_TK, blocks, layout, geometry)

    def counts() -> Counts:
        if host is None:  # every token's K experts live here
            return Counts([[0]], [[0]], 0, tokens * k, [Segment(True, None, 0, tokens * k)])
        return _count(host().tolist(), geometry)

    return Routes(geometry, layout, slots_TK, *maps, counts)


def _count(counts_DCV: list[list[list[int]]], g: Geometry) -> Counts:
    """Plain numbers: the device may have nothing to do while the host counts."""
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
    slots_D = [slice(d * g.local, (d + 1) * g.local) for d in devices]
    first_D = [
        sum(sum(counts_DCV[s][c][slots_D[d]]) for s, c in product([d] if g.split else devices, chunks)) for d in devices
    ]
    return Counts(rows_DCD[g.rank], arrives_CD, max(*sent, *arrived), max(first_D), segments)
