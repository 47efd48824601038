"""Index maps of the fused layer in three launches: count, layout, positions. See `reference.py` for what they mean.

No sort, no host sync. A block of tokens is a 0/1 matrix tokens x slots; its columns' running sums number the tokens of
each expert. Example, one device, slots [[0, 1], [1, 2], [0, 2]]: the matrix is 110 / 011 / 101, running sums before
each token 000 / 110 / 121, expert starts 0 2 4, so positions [[0, 2], [3, 4], [1, 5]].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from occult_train.kernels.launching import parts, power_of_2, quick
from occult_train.kernels.positions.reference import BLOCK_MULTIPLE, NO_LIMIT, Geometry, Layout


@triton.jit
def _chosen(slots, first, T, K: tl.constexpr, EP: tl.constexpr, B: tl.constexpr):
    """[B, EP] 1 where a token of the block chose the slot."""
    t = first + tl.arange(0, B)
    e = tl.arange(0, EP)
    chosen = tl.zeros([B, EP], tl.int32)
    for k in tl.static_range(K):
        slot = tl.load(slots + t.to(tl.int64) * K + k, mask=t < T, other=-1).to(tl.int32)
        chosen += (slot[:, None] == e[None, :]).to(tl.int32)
    return chosen


@triton.jit
def _goes(slots, first, T, K: tl.constexpr, L: tl.constexpr, DP: tl.constexpr, B: tl.constexpr):
    """[B, DP] 1 where a token of the block needs the device."""
    t = first + tl.arange(0, B)
    d = tl.arange(0, DP)
    goes = tl.zeros([B, DP], tl.int32)
    for k in tl.static_range(K):
        slot = tl.load(slots + t.to(tl.int64) * K + k, mask=t < T, other=-L).to(tl.int32)
        device = tl.where(slot < 0, -1, slot // L)
        goes = goes | (device[:, None] == d[None, :]).to(tl.int32)
    return goes


@quick
@triton.jit
def _count_kernel(
    slots, blocks, counts, T, chunk_tokens,
    K: tl.constexpr, E: tl.constexpr, D: tl.constexpr, EP: tl.constexpr, DP: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    V: tl.constexpr = E + D
    e, d = tl.arange(0, EP), tl.arange(0, DP)
    tokens_E = tl.sum(_chosen(slots, block * B, T, K, EP, B), 0)
    rows_D = tl.sum(_goes(slots, block * B, T, K, E // D, DP, B), 0)
    tl.store(blocks + block * V + e, tokens_E, mask=e < E)
    tl.store(blocks + block * V + E + d, rows_D, mask=d < D)
    chunk = counts + (block * B // chunk_tokens) * V
    tl.atomic_add(chunk + e, tokens_E, mask=e < E)
    tl.atomic_add(chunk + E + d, rows_D, mask=d < D)


@quick
@triton.jit
def _layout_kernel(
    counts, base, send, ends, relative, put, back, arrive, room,
    RANK: tl.constexpr, C: tl.constexpr, E: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, LP: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One program; tiles are [device, local expert]."""
    L: tl.constexpr = E // D
    V: tl.constexpr = E + D
    d = tl.arange(0, DP)[:, None]
    local = tl.arange(0, LP)[None, :]
    e = d * L + local
    here = (d < D) & (local < L)
    mine = here & (d == RANK)
    start = tl.zeros([DP, 1], tl.int32)
    if SPLIT:
        total = tl.zeros([DP, LP], tl.int32)
        for c in range(C):
            total += tl.load(counts + (d * C + c) * V + e, mask=here, other=0)
        run = tl.cumsum(total, 1) - total
        tl.store(ends + local + 0 * d, run + total, mask=mine)
        tl.store(relative + local + 0 * d, tl.minimum(run + total, room), mask=mine)
        for c in range(C):
            tl.store(base + c * E + e, run, mask=mine)
            run += tl.load(counts + (RANK * C + c) * V + e, mask=mine, other=0)
        start += tl.sum(total, 1)[:, None]
    for c in range(C):
        total = tl.zeros([DP, LP], tl.int32)
        before = tl.zeros([DP, LP], tl.int32)
        for source in range(D):
            counted = here
            if SPLIT:
                counted = here & (d != source)
            n = tl.load(counts + (source * C + c) * V + e, mask=counted, other=0)
            total += n
            before += tl.where(source < RANK, n, 0)
        run = tl.cumsum(total, 1) - total
        segment = c
        if SPLIT:
            segment = c + 1
            tl.store(base + c * E + e, start + run + before, mask=here & (d != RANK))
        else:
            tl.store(base + c * E + e, start + run + before, mask=here)
        tl.store(ends + segment * L + local + 0 * d, start + run + total, mask=mine)
        tl.store(relative + segment * L + local + 0 * d, tl.minimum(run + total, room), mask=mine)
        start += tl.sum(total, 1)[:, None]

    to = tl.arange(0, DP)
    sent = 0
    for c in range(C):
        rows = tl.load(counts + (RANK * C + c) * V + E + to, mask=(to < D) & (to != RANK), other=0)
        tl.store(send + c * D + to, sent + tl.cumsum(rows, 0) - rows, mask=to < D)
        sent += tl.sum(rows, 0)
    source = tl.arange(0, DP)[:, None]
    away = (source < D) & (to[None, :] < D) & (source != to[None, :])
    rows = tl.load(counts + source * C * V + E + to[None, :], mask=away, other=0)
    arrives = tl.cumsum(rows, 0) - rows
    leaves = tl.cumsum(rows, 1) - rows
    me_row, me_column = source == RANK, to[None, :] == RANK
    tl.store(put + to, tl.sum(tl.where(me_row, arrives - leaves, 0), 0), mask=to < D)
    tl.store(back + to, tl.sum(tl.where(me_column, leaves - arrives, 0), 1), mask=to < D)
    tl.store(arrive + to, tl.sum(tl.where(me_column, arrives + rows, 0), 1), mask=to < D)


@triton.jit
def _before(blocks, block, first, column, known, V: tl.constexpr, VP: tl.constexpr):
    """[VP] sums of the blocks `first` to `block` - 1."""
    total = tl.zeros([VP], tl.int32)
    for b in range(first, block, 16):
        row = b + tl.arange(0, 16)
        total += tl.sum(tl.load(blocks + row[:, None] * V + column, mask=(row[:, None] < block) & known, other=0), 0)
    return total


@quick
@triton.jit
def _positions_kernel(
    slots, blocks, base, send, position, own, sends, T, chunk_tokens,
    RANK: tl.constexpr, K: tl.constexpr, E: tl.constexpr, D: tl.constexpr,
    EP: tl.constexpr, DP: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    V: tl.constexpr = E + D
    L: tl.constexpr = E // D
    chunk = block * B // chunk_tokens
    first = chunk * (chunk_tokens // B)
    t = block * B + tl.arange(0, B)
    e, d = tl.arange(0, EP), tl.arange(0, DP)

    chosen = _chosen(slots, block * B, T, K, EP, B)
    start = tl.load(base + chunk * E + e, mask=e < E, other=0)
    start += _before(blocks, block, first, e[None, :], e[None, :] < E, V, EP)
    number = tl.cumsum(chosen, 0) - chosen + start[None, :]
    for k in tl.static_range(K):
        at = t.to(tl.int64) * K + k
        slot = tl.load(slots + at, mask=t < T, other=-1).to(tl.int32)
        p = tl.sum(tl.where(slot[:, None] == e[None, :], number, 0), 1)
        tl.store(position + at, p, mask=t < T)
        tl.store(own + at, tl.where(slot // L == RANK, p, -1), mask=t < T)

    goes = _goes(slots, block * B, T, K, L, DP, B)
    start = tl.load(send + chunk * D + d, mask=d < D, other=0)
    start += _before(blocks, block, first, E + d[None, :], d[None, :] < D, V, DP)
    number = tl.cumsum(goes, 0) - goes + start[None, :]
    number = tl.where((goes > 0) & (d[None, :] != RANK), number, -1)
    tl.store(sends + t.to(tl.int64)[:, None] * D + d[None, :], number, mask=(t[:, None] < T) & (d[None, :] < D))


def _block(geometry: Geometry) -> int:
    """Tokens of a program; divides BLOCK_MULTIPLE, and keeps the 0/1 matrix in registers."""
    return BLOCK_MULTIPLE if geometry.experts <= 64 else BLOCK_MULTIPLE // 4


def count(slots_TK: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Counts of this rank's tokens, by chunk and by block of tokens.

    Args:
        slots_TK: [T, K] int64, the K of a token distinct.

    Returns:
        counts [C, V] as the reference's `count`, and the same by block for `positions`.
    """
    tokens, k = _check(slots_TK, geometry)
    block = _block(geometry)
    blocks = slots_TK.new_empty((-(-tokens // block), geometry.width), dtype=torch.int32)
    counts = slots_TK.new_zeros((geometry.chunks, geometry.width), dtype=torch.int32)
    if tokens:
        _count_kernel[(blocks.shape[0],)](
            slots_TK, blocks, counts, tokens, geometry.chunk_tokens,
            K=k, E=geometry.experts, D=geometry.devices, B=block, **_padded(geometry),
        )  # fmt: skip
    return counts, blocks


def layout(counts_DCV: Tensor, geometry: Geometry, room: int = NO_LIMIT) -> Layout:
    """As the reference's `layout`; one launch."""
    g = geometry
    if tuple(counts_DCV.shape) != (g.devices, g.chunks, g.width):
        raise ValueError(f"counts {tuple(counts_DCV.shape)}, geometry wants {(g.devices, g.chunks, g.width)}")

    shapes = [(g.chunks, g.experts), (g.chunks, g.devices), *[(g.segments, g.local)] * 2, *[(g.devices,)] * 3]
    found = Layout(*parts(counts_DCV, torch.int32, shapes))
    _layout_kernel[(1,)](
        counts_DCV.contiguous(), found.base_CE, found.send_CD, found.ends_GL, found.relative_GL,
        found.put_D, found.back_D, found.arrive_D, room,
        RANK=g.rank, C=g.chunks, E=g.experts, D=g.devices, DP=power_of_2(g.devices),
        LP=power_of_2(g.local), SPLIT=g.split,
    )  # fmt: skip
    return found


def positions(slots_TK: Tensor, blocks: Tensor, found: Layout, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference's `positions`; `blocks` comes from `count`."""
    tokens, k = _check(slots_TK, geometry)
    position, own, sends = parts(slots_TK, torch.int32, [(tokens, k), (tokens, k), (tokens, geometry.devices)])
    if tokens:
        _positions_kernel[(blocks.shape[0],)](
            slots_TK, blocks, found.base_CE, found.send_CD, position, own, sends, tokens, geometry.chunk_tokens,
            RANK=geometry.rank, K=k, E=geometry.experts, D=geometry.devices, B=_block(geometry), **_padded(geometry),
        )  # fmt: skip
    return position, own, sends


def _padded(geometry: Geometry) -> dict[str, int]:
    return {"EP": power_of_2(geometry.experts), "DP": power_of_2(geometry.devices)}


def _check(slots_TK: Tensor, geometry: Geometry) -> tuple[int, int]:
    if slots_TK.dim() != 2 or slots_TK.dtype != torch.int64 or not slots_TK.is_contiguous():
        raise ValueError(f"slots must be contiguous int64 [T, K], got {slots_TK.dtype} {tuple(slots_TK.shape)}")
    tokens, k = slots_TK.shape
    if k > geometry.experts:
        raise ValueError(f"{k} experts a token of {geometry.experts}")
    if tokens > geometry.chunks * geometry.chunk_tokens:
        raise ValueError(f"{tokens} tokens do not fit {geometry.chunks} chunks of {geometry.chunk_tokens}")
    return tokens, k
