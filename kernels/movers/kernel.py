"""Row movement of the fused layer in Triton; see `reference.py` for what each does and for the layout on the wire.

One program moves one row, 16 bytes a thread: a row is read once however often it is copied, and a sum reads its terms
all at once and adds them in order. `pack` and `merge` write through an address table when given peers: then the rows
land in the memory of other devices, and no collective is needed.

Example of merge, K=2: positions [[0, 3], [2, -1]], weights [[.5, .5], [1, 0]] give rows .5 y0 + .5 y3 and y2.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from occult_train.kernels.launching import power_of_2, quick
from occult_train.kernels.movers.reference import Wire


@dataclass(frozen=True)
class Peers:
    """Where rows for each device begin in that device's memory, as seen from here."""

    address_D: Tensor
    """[D] int64, a multiple of 32; not read for this device."""
    shift_D: Tensor
    """[D] int32, to add to a row's place here to get its place there."""
    capacity: int
    """Rows that fit there; rows beyond are left out, and the counts tell everyone."""


@dataclass(frozen=True)
class Own:
    """Where tokens' copies for the experts of this device go, and their weights if asked for; all contiguous."""

    position_TK: Tensor
    rows_XH: Tensor
    weight_TK: Tensor | None = None
    weight_X: Tensor | None = None

    def of(self, tokens: slice) -> "Own":
        """The same for some of the tokens."""
        weight_TK = None if self.weight_TK is None else self.weight_TK[tokens]
        return Own(self.position_TK[tokens], self.rows_XH, weight_TK, self.weight_X)


@quick
@triton.jit
def _expand_kernel(
    x, position, out, weight, weight_X, arrive, start, capacity, H, x_stride, p_stride, w_stride,
    D: tl.constexpr, K: tl.constexpr, WEIGHTS: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    there = n >= 0
    if D:
        there = n < tl.load(arrive + D - 1)
    row = tl.load(x + n * x_stride + h, mask=h < tl.where(there, H, 0), other=0)
    for k in tl.static_range(K):
        p = tl.load(position + n * p_stride + k).to(tl.int64) - start
        if there & (p >= 0) & (p < capacity):
            tl.store(out + p * H + h, row, mask=h < H)
            if WEIGHTS:
                if tl.program_id(1) == 0:
                    tl.store(weight_X + p, tl.load(weight + n * w_stride + k))


@quick
@triton.jit
def _pack_kernel(
    x, send, out, out_words, address, shift, position, slots, weight, own, own_rows, own_weight, weight_X,
    H, x_stride, out_stride, words_stride, first_word, capacity, own_capacity,
    D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, L: tl.constexpr,
    PEERS: tl.constexpr, EXTRAS: tl.constexpr, OWN: tl.constexpr, OWN_WEIGHTS: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    k = tl.arange(0, KP)
    row = tl.load(x + t * x_stride + h, mask=h < H, other=0)
    for d in range(D):
        s = tl.load(send + t * D + d).to(tl.int64)
        if s >= 0:
            rows, words = out, out_words
            if PEERS:
                there = tl.load(address + d)
                rows = tl.multiple_of(there.to(tl.pointer_type(x.dtype.element_ty)), 16)
                words = tl.multiple_of(there.to(tl.pointer_type(tl.int32)), 16)
                s += tl.load(shift + d)
            if s < capacity:
                tl.store(rows + s * out_stride + h, row, mask=h < H)
                if EXTRAS:
                    if tl.program_id(1) == 0:
                        at = words + s * words_stride + first_word + k
                        slot = tl.load(slots + t * K + k, mask=k < K, other=0).to(tl.int32)
                        p = tl.load(position + t * K + k, mask=k < K, other=0)
                        tl.store(at, tl.where(slot // L == d, p, -1), mask=k < K)
                        w = tl.load(weight + t * K + k, mask=k < K, other=0).to(tl.float32)
                        tl.store(at + K, w.to(tl.int32, bitcast=True), mask=k < K)
    if OWN:
        for i in tl.static_range(K):
            p = tl.load(own + t * K + i).to(tl.int64)
            if (p >= 0) & (p < own_capacity):
                tl.store(own_rows + p * H + h, row, mask=h < H)
                if OWN_WEIGHTS:
                    if tl.program_id(1) == 0:
                        tl.store(weight_X + p, tl.load(own_weight + t * K + i))


@triton.jit
def _sum_rows(
    y, y2, position, weight, start, n, p_stride, w_stride, y_stride, h, H, y_rows,
    K: tl.constexpr, TWO: tl.constexpr, WEIGHTS: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """[BH] fp32 sum over k of the rows at position[n, k]; rows beyond the end of y are not read."""
    total = tl.zeros([BH], tl.float32)
    for k in tl.static_range(K):
        p = tl.load(position + n * p_stride + k).to(tl.int64) - start
        there = h < tl.where((p >= 0) & (p < y_rows), H, 0)
        value = tl.load(y + p * y_stride + h, mask=there, other=0).to(tl.float32)
        if TWO:
            value += tl.load(y2 + p * y_stride + h, mask=there, other=0).to(tl.float32)
        if WEIGHTS:
            value *= tl.load(weight + n * w_stride + k).to(tl.float32)
        total += tl.where(p >= 0, value, 0)
    return total


@quick
@triton.jit
def _merge_kernel(
    y, y2, position, weight, scalar, start, out, out_words, address, shift, arrive,
    H, y_rows, p_stride, w_stride, y_stride, out_stride, words_stride, first_word, capacity,
    D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, TWO: tl.constexpr, WEIGHTS: tl.constexpr,
    PEERS: tl.constexpr, EXTRAS: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    k = tl.arange(0, KP)
    exists = r >= 0
    if PEERS:
        exists = r < tl.load(arrive + D - 1)
    width = tl.where(exists, H, 0)
    total = _sum_rows(
        y, y2, position, weight, start, r, p_stride, w_stride, y_stride, h, width, y_rows, K, TWO, WEIGHTS, BH
    )
    place = r
    rows, words = out, out_words
    if PEERS:
        d = tl.zeros([], tl.int32)
        for source in range(D):
            d += (r >= tl.load(arrive + source)).to(tl.int32)
        d = tl.minimum(d, D - 1)
        there = tl.load(address + d)
        rows = tl.multiple_of(there.to(tl.pointer_type(y.dtype.element_ty)), 16)
        words = tl.multiple_of(there.to(tl.pointer_type(tl.int32)), 16)
        place = r + tl.load(shift + d)
    if exists & (place < capacity):
        tl.store(rows + place * out_stride + h, total.to(y.dtype.element_ty), mask=h < H)
        if EXTRAS:
            if tl.program_id(1) == 0:
                p = tl.load(position + r * p_stride + k, mask=k < K, other=-1) - start
                value = tl.load(scalar + p, mask=(k < K) & (p >= 0), other=0)
                at = words + place * words_stride + first_word + k
                tl.store(at, value.to(tl.int32, bitcast=True), mask=k < K)


@quick
@triton.jit
def _combine_kernel(
    y, y2, own, weight, scalar, returned, words, send, slots, out, scalars,
    H, y_rows, y_stride, back_stride, words_stride, first_word,
    D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, L: tl.constexpr, TWO: tl.constexpr, WEIGHTS: tl.constexpr,
    AWAY: tl.constexpr, EXTRAS: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    k = tl.arange(0, KP)
    total = _sum_rows(y, y2, own, weight, 0, t, K, K, y_stride, h, H, y_rows, K, TWO, WEIGHTS, BH)
    if AWAY:
        for d in range(D):
            s = tl.load(send + t * D + d).to(tl.int64)
            if s >= 0:
                total += tl.load(returned + s * back_stride + h, mask=h < H, other=0).to(tl.float32)
    tl.store(out + t * H + h, total.to(out.dtype.element_ty), mask=h < H)
    if EXTRAS:
        if tl.program_id(1) == 0:
            p = tl.load(own + t * K + k, mask=k < K, other=-1)
            value = tl.load(scalar + p, mask=p >= 0, other=0)
            if AWAY:
                slot = tl.load(slots + t * K + k, mask=k < K, other=0).to(tl.int32)
                s = tl.load(send + t * D + slot // L, mask=k < K, other=-1).to(tl.int64)
                found = tl.load(words + s * words_stride + first_word + k, mask=(s >= 0) & (k < K), other=0)
                value = tl.where(s >= 0, found.to(tl.float32, bitcast=True), value)
            tl.store(scalars + t * K + k, value, mask=k < K)


@cache
def _width(hidden: int) -> dict[str, int]:
    """Columns of a program, and its warps: 16 elements a thread."""
    columns = min(power_of_2(hidden), 2048)
    return {"BH": columns, "num_warps": max(1, min(columns // 512, 8))}


def _grid(rows: int, hidden: int) -> tuple[int, int]:
    return rows, -(-hidden // _width(hidden)["BH"])


@quick
@triton.jit
def _share_kernel(numbers, address, offset, N, BN: tl.constexpr):
    n = tl.arange(0, BN)
    there = tl.load(address + tl.program_id(0)).to(tl.pointer_type(tl.int32)) + offset
    tl.store(there + n, tl.load(numbers + n, mask=n < N, other=0), mask=n < N)


def share(numbers: Tensor, address_D: Tensor, offset: int) -> None:
    """Write int32 numbers into the memory of all devices, from the offset-th number after each address on."""
    count = numbers.numel()
    _share_kernel[(address_D.numel(),)](numbers, address_D, offset, count, BN=power_of_2(count))


def expand(
    x_NH: Tensor, position_NK: Tensor, out_XH: Tensor, weight_NK: Tensor | None = None, weight_X: Tensor | None = None,
    start: int = 0, arrive_D: Tensor | None = None,
) -> None:  # fmt: skip
    """As the reference's. Rows of x may lie apart (a view of rows on the wire), positions and weights too.

    Copies beyond the end of out are left out: the caller made it before the number of rows was known, and finds out.
    """
    rows, hidden = x_NH.shape
    _same("rows", rows, "positions", position_NK.shape[0])
    _same("width of x", hidden, "of out", out_XH.shape[1])
    if rows == 0:
        return
    _expand_kernel[_grid(rows, hidden)](
        x_NH, position_NK, out_XH, weight_NK, weight_X, arrive_D, start, out_XH.shape[0], hidden,
        x_NH.stride(0), position_NK.stride(0),
        0 if weight_NK is None else weight_NK.stride(0),
        D=0 if arrive_D is None else arrive_D.numel(), K=position_NK.shape[1], WEIGHTS=weight_X is not None,
        **_width(hidden),
    )  # fmt: skip


def pack(
    x_TH: Tensor, send_TD: Tensor, out: Tensor | Peers, wire: Wire,
    position_TK: Tensor | None = None, slots_TK: Tensor | None = None, weight_TK: Tensor | None = None, local: int = 1,
    own: Own | None = None,
) -> None:  # fmt: skip
    """As the reference's, into rows on the wire here or straight into those of other devices; and, while a row is at
    hand, its copies for the experts of this device, as `expand` makes them."""
    rows, hidden = x_TH.shape
    _same("tokens", rows, "sends", send_TD.shape[0])
    _same("width of x", hidden, "of the wire", wire.hidden)
    if rows == 0:
        return
    local_out, address, shift, capacity = _target(out)
    _pack_kernel[_grid(rows, hidden)](
        x_TH, send_TD, local_out, _words(local_out), address, shift, position_TK, slots_TK, weight_TK,
        *((None,) * 4 if own is None else (own.position_TK, own.rows_XH, own.weight_TK, own.weight_X)),
        hidden, x_TH.stride(0), wire.width, wire.nbytes // 4, wire.first_word, capacity,
        0 if own is None else own.rows_XH.shape[0],
        D=send_TD.shape[1], K=wire.top_k, KP=power_of_2(wire.top_k), L=local,
        PEERS=address is not None, EXTRAS=position_TK is not None, OWN=own is not None,
        OWN_WEIGHTS=own is not None and own.weight_X is not None, **_width(hidden),
    )  # fmt: skip


def merge(
    rows: list[Tensor], position_RK: Tensor, out: Tensor | Peers, wire: Wire,
    weight_RK: Tensor | None = None, scalar_X: Tensor | None = None,
    start: int = 0, arrive_D: Tensor | None = None,
) -> None:  # fmt: skip
    """As the reference's, into rows on the wire here or, by source (`arrive_D`), into those of other devices.

    Given arrive_D, rows from its last number on are not there. Positions beyond the end of `rows` count as none: the
    caller made them before their number was known, and finds out.
    """
    count, hidden = position_RK.shape[0], rows[0].shape[1]
    _same("width of rows", hidden, "of the wire", wire.hidden)
    if count == 0:
        return
    local_out, address, shift, capacity = _target(out)
    _merge_kernel[_grid(count, hidden)](
        rows[0], rows[-1], position_RK, weight_RK, scalar_X, start, local_out, _words(local_out),
        address, shift, arrive_D,
        hidden, rows[0].shape[0], position_RK.stride(0), 0 if weight_RK is None else weight_RK.stride(0),
        rows[0].stride(0),
        wire.width, wire.nbytes // 4, wire.first_word, capacity,
        D=0 if arrive_D is None else arrive_D.numel(), K=wire.top_k, KP=power_of_2(wire.top_k),
        TWO=len(rows) == 2, WEIGHTS=weight_RK is not None, PEERS=address is not None, EXTRAS=scalar_X is not None,
        **_width(hidden),
    )  # fmt: skip


def combine(
    rows: list[Tensor], own_TK: Tensor, returned: Tensor | None, send_TD: Tensor, wire: Wire,
    weight_TK: Tensor | None = None, scalar_X: Tensor | None = None, slots_TK: Tensor | None = None, local: int = 1,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As the reference's; `returned` is None where nothing was sent."""
    (tokens, k), hidden = own_TK.shape, rows[0].shape[1]
    out = rows[0].new_empty(tokens, hidden)
    scalars = None if scalar_X is None else torch.empty(tokens, k, dtype=torch.float32, device=out.device)
    if tokens:
        _combine_kernel[_grid(tokens, hidden)](
            rows[0], rows[-1], own_TK, weight_TK, scalar_X, returned, None if returned is None else _words(returned),
            send_TD, slots_TK, out, scalars, hidden, rows[0].shape[0], rows[0].stride(0),
            wire.width, wire.nbytes // 4, wire.first_word,
            D=send_TD.shape[1], K=k, KP=power_of_2(k), L=local, TWO=len(rows) == 2,
            WEIGHTS=weight_TK is not None, AWAY=returned is not None, EXTRAS=scalar_X is not None, **_width(hidden),
        )  # fmt: skip
    return out, scalars


def _target(out: Tensor | Peers) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
    if isinstance(out, Peers):
        return None, out.address_D, out.shift_D, out.capacity
    return out, None, None, out.shape[0]


def _words(wire: Tensor | None) -> Tensor | None:
    return None if wire is None else wire.view(torch.int32)


def _same(first: str, a: int, second: str, b: int) -> None:
    if a != b:
        raise ValueError(f"{a} {first}, {b} {second}")
