"""Where every copy of a token goes: index maps of the fused layer, in plain torch.

T tokens, K experts a token, E slots, D devices, L = E / D slots a device, C chunks of tokens, G segments, X expanded
rows (token, expert) on their expert's device. All integers are int32, -1 stands for "none".

The tokens of a rank are cut into C chunks, so that the rows of one can travel while others are computed. What arrives
at a device is computed in G segments, each with its rows grouped by expert: one segment of everything, or, `split`,
the device's own tokens first (they need not wait) and then one segment for each chunk of the others' tokens.
Within an expert of a segment, rows are ordered by source rank, then token. Segments lie one after the other.

Every rank knows the counts of all ranks, so a sender computes the expanded row that a token gets at its destination
(BRIM_0 and BRIM_1 of Occult in one step), and nothing is sorted anywhere.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """Who we are among the devices, and how the work is cut."""

    rank: int
    devices: int
    experts: int
    chunk_tokens: int
    """Tokens of a chunk; a multiple of `BLOCK_MULTIPLE`. The last ones may be shorter, or empty."""
    chunks: int = 1
    split: bool = False

    def __post_init__(self) -> None:
        if self.experts % self.devices:
            raise ValueError(f"{self.experts} experts cannot be spread evenly over {self.devices} devices")
        if not 0 <= self.rank < self.devices:
            raise ValueError(f"rank {self.rank} is not among {self.devices} devices")
        if self.chunks > 1 and not self.split:
            raise ValueError(f"{self.chunks} chunks need split=True")
        if self.chunk_tokens % BLOCK_MULTIPLE:
            raise ValueError(f"chunk_tokens={self.chunk_tokens} is not a multiple of {BLOCK_MULTIPLE}")

    @property
    def local(self) -> int:
        """L, slots a device."""
        return self.experts // self.devices

    @property
    def segments(self) -> int:
        """G."""
        return self.chunks + 1 if self.split else 1

    @property
    def width(self) -> int:
        """V, numbers that describe a chunk: tokens of each expert, then rows for each device."""
        return self.experts + self.devices


BLOCK_MULTIPLE = 64


def chunk_size(tokens: int, chunks: int) -> int:
    """Tokens of a chunk when `tokens` are cut into `chunks`: rounded up to `BLOCK_MULTIPLE`, at least that."""
    each = -(-max(tokens, 1) // chunks)
    return -(-each // BLOCK_MULTIPLE) * BLOCK_MULTIPLE


@dataclass(frozen=True)
class Layout:
    """Offsets derived from all ranks' counts; see `layout`."""

    base_CE: Tensor
    """[C, E] expanded row, on its device, of the first of this rank's tokens of chunk c that chose slot e."""
    send_CD: Tensor
    """[C, D] row of the first token for device d of chunk c among the rows that this rank sends: by chunk, then device,
    then token. Own rows are not sent."""
    ends_GL: Tensor
    """[G, L] where the rows of each local expert of each segment end."""
    relative_GL: Tensor
    """[G, L] the same, counted from the segment's first row, but not beyond `room`."""
    put_D: Tensor
    """[D] to add to a row's place in this rank's send order to get its place among the rows that arrive at device d
    (by source, then token; one chunk)."""
    back_D: Tensor
    """[D] to add to a row's place among the rows that arrived here from device d to get its place in d's send order."""
    arrive_D: Tensor
    """[D] where the rows that arrive here from each device end."""


def count(slots_TK: Tensor, geometry: Geometry) -> Tensor:
    """[C, V]: tokens of chunk c that chose slot e at [c, e], rows for device d at [c, E + d]."""
    counts = slots_TK.new_zeros((geometry.chunks, geometry.width), dtype=torch.int32)
    for chunk, slots in enumerate(slots_TK.split(geometry.chunk_tokens)):
        chose_TE = torch.zeros(slots.shape[0], geometry.experts, dtype=torch.bool, device=slots.device)
        chose_TE.scatter_(1, slots, True)
        goes_TD = chose_TE.view(-1, geometry.devices, geometry.local).any(2)
        counts[chunk] = torch.cat((chose_TE.sum(0), goes_TD.sum(0)))
    return counts


NO_LIMIT = 2**31 - 1


def layout(counts_DCV: Tensor, geometry: Geometry, room: int = NO_LIMIT) -> Layout:
    """Offsets from the counts of all ranks [D, C, V] (`count`, gathered).

    Args:
        room: rows for which there is memory; what multiplies the rows before relative_GL touches no others.
    """
    g, me = geometry, geometry.rank
    device = counts_DCV.device
    tokens_DCE, rows_DCD = counts_DCV[..., : g.experts].long(), counts_DCV[..., g.experts :].long()
    holder_E = torch.arange(g.experts, device=device) // g.local
    base = torch.zeros(g.chunks, g.experts, dtype=torch.int64, device=device)
    ends, starts = [], [0]
    for segment in range(g.segments):
        # blocks [D, C, E] that the segment of each slot's device is made of
        mine = (torch.arange(g.devices, device=device)[:, None] == holder_E)[:, None]
        chunk = torch.arange(g.chunks, device=device)[:, None] + 1
        taken = torch.ones_like(mine) if not g.split else torch.where(mine, segment == 0, chunk == segment)
        blocks = tokens_DCE * taken
        total_E = blocks.sum((0, 1))
        start_E = torch.zeros_like(total_E)
        for d in range(g.devices):
            own = slice(d * g.local, (d + 1) * g.local)
            earlier = _segment_start(tokens_DCE, g, d, segment)
            start_E[own] = earlier + total_E[own].cumsum(0) - total_E[own]
            if d == me:
                ends.append(start_E[own] + total_E[own])
                starts.append(int(ends[-1][-1]))
        flat = blocks.view(-1, g.experts)
        before = (flat.cumsum(0) - flat).view_as(blocks)[me]
        base += torch.where(taken[me].expand_as(base), start_E + before, 0)
    away_DCD = rows_DCD * ~torch.eye(g.devices, dtype=torch.bool, device=device)[:, None]
    order = away_DCD[me].flatten()
    send = (order.cumsum(0) - order).view(g.chunks, g.devices)
    first_SD = away_DCD[:, 0]
    arrive_SD, leave_SD = first_SD.cumsum(0) - first_SD, first_SD.cumsum(1) - first_SD
    ends_GL = torch.stack(ends)
    as_int = [
        base,
        send,
        ends_GL,
        (ends_GL - torch.tensor(starts[:-1], device=device)[:, None]).clamp(max=room),
        arrive_SD[me] - leave_SD[me],
        leave_SD[:, me] - arrive_SD[:, me],
        arrive_SD[:, me] + first_SD[:, me],
    ]
    return Layout(*(t.to(torch.int32) for t in as_int))


def _segment_start(tokens_DCE: Tensor, g: Geometry, device: int, segment: int) -> int:
    """Expanded rows of the segments before `segment` on `device`."""
    here = tokens_DCE[..., device * g.local : (device + 1) * g.local].sum(2)
    if segment == 0:
        return 0
    others = here.sum(0) - here[device]
    return int(here[device].sum() + others[: segment - 1].sum())


def positions(slots_TK: Tensor, found: Layout, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """Where each copy goes.

    Returns:
        position_TK [T, K], the expanded row of (token, expert) on the expert's device; own_TK [T, K], the same for
        experts of this device and -1 for others; send_TD [T, D], the token's place among the rows that this rank
        sends, -1 for this device and for those that it does not need.
    """
    g = geometry
    tokens = slots_TK.shape[0]
    chunk_T = torch.arange(tokens, device=slots_TK.device) // g.chunk_tokens
    chose_TE = torch.zeros(tokens, g.experts, dtype=torch.int64, device=slots_TK.device).scatter_(1, slots_TK, 1)
    goes_TD = chose_TE.view(-1, g.devices, g.local).amax(2)
    rank_TE, rank_TD = torch.zeros_like(chose_TE), torch.zeros_like(goes_TD)
    for chunk in range(g.chunks):
        here = chunk_T == chunk
        rank_TE[here] = chose_TE[here].cumsum(0) - chose_TE[here] + found.base_CE[chunk]
        rank_TD[here] = goes_TD[here].cumsum(0) - goes_TD[here] + found.send_CD[chunk]
    position_TK = rank_TE.gather(1, slots_TK)
    own_TK = torch.where(slots_TK // g.local == g.rank, position_TK, -1)
    away_TD = goes_TD.bool() & (torch.arange(g.devices, device=slots_TK.device) != g.rank)
    return tuple(t.to(torch.int32) for t in (position_TK, own_TK, torch.where(away_TD, rank_TD, -1)))  # type: ignore
