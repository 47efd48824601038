"""Row movement of the fused layer against its reference, and sums against float64; and there and back again."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from groups import check_close, normal
from torch import Tensor

from occult_train.kernels.movers import kernel, reference
from occult_train.kernels.movers.kernel import Own, Peers
from occult_train.kernels.movers.reference import Wire
from occult_train.kernels.positions import reference as positions
from occult_train.kernels.positions.reference import Geometry, Layout

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, torch.float32), (63, torch.bfloat16), (100, torch.float16), (600, torch.bfloat16), (2049, torch.bfloat16)]
"""Widths and types of a row: less than 16 bytes, no multiple of them, and more than a program takes."""
UNTOUCHED = -7.0


@dataclass(frozen=True)
class Rank:
    """One rank's tokens, and its maps."""

    slots: Tensor
    layout: Layout
    position: Tensor
    own: Tensor
    send: Tensor

    @property
    def sent(self) -> int:
        return int((self.send >= 0).sum())

    @property
    def weights(self) -> Tensor:
        return normal(*self.slots.shape, device=self.slots.device, seed=len(self.slots))


def routed(tokens: tuple[int, ...], experts: int, k: int, device: torch.device) -> list[Rank]:
    """Maps of all ranks for random tokens."""
    generator = torch.Generator().manual_seed(1)
    slots = [torch.rand(t, experts, generator=generator).topk(k, dim=1).indices.to(device) for t in tokens]
    geometries = [Geometry(rank, len(tokens), experts, 64) for rank in range(len(tokens))]
    counts = torch.stack([positions.count(s, g) for s, g in zip(slots, geometries, strict=True)])
    layouts = [positions.layout(counts, g) for g in geometries]
    maps = [positions.positions(s, f, g) for s, f, g in zip(slots, layouts, geometries, strict=True)]
    return [Rank(s, f, *m) for s, f, m in zip(slots, layouts, maps, strict=True)]


def marked(*shape: int, like: Tensor) -> Tensor:
    """Memory of which it shows what was not written."""
    return torch.full(shape, UNTOUCHED, dtype=like.dtype, device=like.device)


def on_wire(wire: Wire, rows: int, device: torch.device) -> Tensor:
    """Rows on the wire that nobody wrote."""
    return marked(rows, wire.width, like=torch.empty(0, dtype=wire.dtype, device=device))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 7, 100, 2048])
@pytest.mark.parametrize("k,extras", [(1, 0), (3, 1), (8, 2)])
def test_layout_on_the_wire(hidden: int, dtype: torch.dtype, k: int, extras: int, device: torch.device) -> None:
    wire = Wire(hidden, k, dtype, extras)
    size = hidden * dtype.itemsize
    assert wire.first_word * 4 % 16 == 0
    assert size <= wire.first_word * 4 < size + 16
    assert wire.nbytes % 32 == 0
    assert 0 <= wire.nbytes - 4 * (wire.first_word + extras * k) < 32
    assert wire.width * dtype.itemsize == wire.nbytes
    rows = wire.empty(3, normal(1, device=device))
    assert (rows.shape, rows.dtype, rows.device.type) == ((3, wire.width), dtype, device.type)
    rows.zero_()
    wire.values(rows).fill_(1)
    for number in range(extras):
        extra = wire.extra(rows, number, torch.int32)
        assert (extra.shape, extra.unique().tolist()) == ((3, k), [0]), "extras overlap"
        extra.fill_(number + 1)
    assert (wire.values(rows) == 1).all()


def test_a_row_on_the_wire_by_hand() -> None:
    """Five bf16 values are 10 bytes, so words begin at 16; 2 x 3 of them end at 40, and the row at 64."""
    wire = Wire(5, 3, torch.bfloat16, 2)
    assert (wire.first_word, wire.nbytes, wire.width) == (4, 64, 32)


def expand_both(x: Tensor, position: Tensor, rows: int, weight: Tensor | None, start: int) -> Iterator[list[Tensor]]:
    """What kernel and reference write."""
    for module in (kernel, reference):
        out = marked(rows, x.shape[1], like=x)
        weight_X = None if weight is None else marked(rows, like=weight)
        module.expand(x, position, out, weight, weight_X, start)
        yield [out] if weight_X is None else [out, weight_X]


@pytest.mark.parametrize("hidden,dtype", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_expand(hidden: int, dtype: torch.dtype, weighted: bool, device: torch.device) -> None:
    rank = routed((5, 3), 6, 3, device)[0]
    x = normal(5, hidden, device=device, dtype=dtype)
    rows = int(rank.layout.ends_GL[-1, -1])
    got, expected = expand_both(x, rank.own, rows, rank.weights if weighted else None, 0)
    assert all(map(same_bits, got, expected))
    assert (got[0] != UNTOUCHED).any()


@pytest.mark.parametrize("start,rows", [(0, 9), (0, 4), (0, 0), (3, 7), (1, 5), (9, 2)])
def test_expand_leaves_out_what_lies_outside(start: int, rows: int, device: torch.device) -> None:
    """Positions from `start` on, and as many rows as there is room for."""
    position = torch.tensor([[8, 3, -1], [4, -1, 9], [-1, -1, -1], [5, 10, 11]], dtype=torch.int32, device=device)
    position = torch.where(position < start, -1, position)
    got, expected = expand_both(normal(4, 33, device=device), position, rows, normal(4, 3, device=device), start)
    assert all(map(same_bits, got, expected))


@pytest.mark.parametrize("there", [0, 1, 3, 4])
def test_expand_leaves_out_rows_that_are_not_there(there: int, device: torch.device) -> None:
    """Their positions are whatever memory held."""
    position = torch.tensor([[0, 2], [1, 5], [3, -1], [4, 0]], dtype=torch.int32, device=device)
    arrive = torch.tensor([there // 2, there], dtype=torch.int32, device=device)
    x, weight, found = normal(4, 33, device=device), normal(4, 2, device=device), []
    for module in (kernel, reference):
        out, weight_X = marked(6, 33, like=x), marked(6, like=x)
        module.expand(x, position, out, weight, weight_X, arrive_D=arrive)
        found.append((out, weight_X))
    for got, expected in zip(*found, strict=True):
        assert torch.equal(got, expected)
    written = {p for row in position[:there].tolist() for p in row if p >= 0}
    assert [bool((row == UNTOUCHED).all()) for row in found[0][0]] == [r not in written for r in range(6)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expand_reads_rows_on_the_wire(dtype: torch.dtype, device: torch.device) -> None:
    wire = Wire(63, 3, dtype, 2)
    rows = on_wire(wire, 4, device)
    wire.values(rows).copy_(normal(4, 63, device=device))
    position, weight = wire.extra(rows, 0, torch.int32), wire.extra(rows, 1, torch.float32)
    position.copy_(torch.tensor([[0, 1, 2], [-1, 3, -1], [-1, -1, -1], [4, 6, 5]], device=device))
    weight.copy_(normal(4, 3, device=device))
    got, expected = expand_both(wire.values(rows), position, 7, weight, 0)
    assert all(map(same_bits, got, expected))
    assert not (got[0] == UNTOUCHED).all(1).any()


def pack_arguments(rank: Rank, hidden: int, dtype: torch.dtype, extras: bool) -> tuple[Wire, tuple[Tensor, ...]]:
    tokens, k = rank.slots.shape
    x = normal(tokens, 2 * hidden, device=rank.slots.device, dtype=dtype)[:, :hidden]
    more = (rank.position, rank.slots, rank.weights) if extras else ()
    return Wire(hidden, k, dtype, 2 if extras else 0), (x, *more)


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("hidden,dtype", SHAPES, ids=str)
def test_pack(hidden: int, dtype: torch.dtype, extras: bool, device: torch.device) -> None:
    rank = routed((5, 2, 3), 6, 3, device)[0]
    wire, (x, *more) = pack_arguments(rank, hidden, dtype, extras)
    got, expected = (on_wire(wire, rank.sent + 1, device) for _ in range(2))
    for module, out in ((kernel, got), (reference, expected)):
        module.pack(x, rank.send, out, wire, *more, local=2)
    assert same_bits(got, expected)
    assert same_bits(got[-1], on_wire(wire, 1, device)[0])


@pytest.mark.parametrize("capacity", [20, 3])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("hidden,dtype", SHAPES[1:4], ids=str)
def test_pack_into_other_devices(
    hidden: int, dtype: torch.dtype, extras: bool, capacity: int, device: torch.device
) -> None:
    """Rows for each device lie in its memory by source and token, and those beyond its end are left out."""
    ranks = routed((5, 2, 4), 6, 3, device)
    boxes = [on_wire(Wire(hidden, 3, dtype, 2 if extras else 0), 20, device) for _ in ranks]
    expected = [box.clone() for box in boxes]
    for number, rank in enumerate(ranks):
        wire, (x, *more) = pack_arguments(rank, hidden, dtype, extras)
        addresses = [0 if d == number else box.data_ptr() for d, box in enumerate(boxes)]
        peers = Peers(torch.tensor(addresses, device=device), rank.layout.put_D, capacity)
        kernel.pack(x, rank.send, peers, wire, *more, local=2)
        sent = on_wire(wire, rank.sent, device)
        reference.pack(x, rank.send, sent, wire, *more, local=2)
        for d, box in enumerate(expected):
            places = rank.send[:, d][rank.send[:, d] >= 0].long()
            there = places + int(rank.layout.put_D[d])
            box[there[there < capacity]] = sent[places[there < capacity]]
    for box, wanted, rank in zip(boxes, expected, ranks, strict=True):
        assert same_bits(box, wanted)
        written = int((box[:, 0] != UNTOUCHED).sum())
        assert written == min(capacity, int(rank.layout.arrive_D[-1]))


@pytest.mark.parametrize("room", [0, 4, 30])
@pytest.mark.parametrize("weighted", [False, True])
def test_pack_expands_own_rows_beside(weighted: bool, room: int, device: torch.device) -> None:
    """As pack and expand one after the other; copies beyond the room are left out."""
    rank = routed((5, 2, 3), 6, 3, device)[0]
    wire, (x, *more) = pack_arguments(rank, 40, torch.float32, True)
    found = []
    for together in (True, False):
        out, rows, weight_X = on_wire(wire, rank.sent, device), marked(room, 40, like=x), marked(room, like=x)
        weights = (rank.weights, weight_X) if weighted else (None, None)
        own = Own(rank.own, rows, *weights) if together else None
        kernel.pack(x, rank.send, out, wire, *more, local=2, own=own)
        if not together:
            kernel.expand(x, rank.own, rows, *weights)
        found.append((out, rows, weight_X))
    assert all(map(same_bits, *found))
    if room:
        assert not (found[0][1] == UNTOUCHED).all()


def merge_exactly(rows: list[Tensor], position: Tensor, weight: Tensor | None, start: int) -> Tensor:
    """[R, H] in float64."""
    wide = sum(r.double().cpu() for r in rows)
    out = torch.zeros(len(position), rows[0].shape[1], dtype=torch.float64)
    assert isinstance(wide, Tensor)
    for r, row in enumerate(position.tolist()):
        for k, p in enumerate(row):
            if p >= 0:
                out[r] += wide[p - start] * (1.0 if weight is None else float(weight[r, k]))
    return out


def positions_of(count: int, k: int, experts: int, start: int, device: torch.device) -> Tensor:
    """[R, K] int32 distinct positions from start on, or -1; the last row has none."""
    generator = torch.Generator().manual_seed(2)
    position = torch.randperm(count * k, generator=generator).view(count, k) + start
    position[torch.rand(count, k, generator=generator) < 1 - 1 / experts] = -1
    position[0, 0], position[-1] = start, -1
    return position.to(device, torch.int32)


@pytest.mark.parametrize("two,weighted,scalars,start", [(False, True, False, 0), (True, False, True, 0),
                                                        (False, False, True, 5), (True, True, True, 1)])  # fmt: skip
@pytest.mark.parametrize("hidden,dtype", SHAPES, ids=str)
def test_merge(
    hidden: int, dtype: torch.dtype, two: bool, weighted: bool, scalars: bool, start: int, device: torch.device
) -> None:
    """Positions and weights as they arrive, in rows on the wire."""
    count, k = 5, 3
    came, back = Wire(hidden, k, dtype, 2), Wire(hidden, k, dtype, 1 if scalars else 0)
    arrived = on_wire(came, count, device)
    position, weight = came.extra(arrived, 0, torch.int32), came.extra(arrived, 1, torch.float32)
    position.copy_(positions_of(count, k, 2, start, device))
    weight.copy_(normal(count, k, device=device))
    rows = [normal(count * k, hidden, device=device, dtype=dtype, seed=s) for s in range(1 + two)]
    scalar = normal(count * k, device=device, seed=9) if scalars else None
    given = (rows, position, weight if weighted else None)
    got, expected = (on_wire(back, count, device) for _ in range(2))
    kernel.merge(rows, position, got, back, given[2], scalar, start)
    reference.merge(rows, position, expected, back, given[2], scalar, start)
    check_close(back.values(got), merge_exactly(*given, start))
    check_close(back.values(got), back.values(expected).double().cpu())
    assert (back.values(got)[-1] == 0).all()
    if scalars:
        assert same_bits(back.extra(got, 0, torch.float32), back.extra(expected, 0, torch.float32))
    rest = slice(4 * (back.first_word + back.extras * k), None)
    assert same_bits(got.view(torch.uint8)[:, rest], on_wire(back, count, device).view(torch.uint8)[:, rest])


@pytest.mark.parametrize("capacity", [20, 2])
@pytest.mark.parametrize("hidden,dtype", SHAPES[1:4], ids=str)
def test_merge_into_other_devices(hidden: int, dtype: torch.dtype, capacity: int, device: torch.device) -> None:
    """Each row goes home to the place from which it was sent; rank 1 sent none."""
    ranks = routed((5, 0, 4), 6, 3, device)
    wire = Wire(hidden, 3, dtype, 1)
    boxes = [on_wire(wire, 20, device) for _ in ranks]
    expected = [box.clone() for box in boxes]
    for number, rank in enumerate(ranks):
        ends = rank.layout.arrive_D.tolist()
        position = positions_of(max(ends[-1], 1), 3, 2, 0, device)[: ends[-1]]
        rows = [normal(3 * max(ends[-1], 1), hidden, device=device, dtype=dtype, seed=number + s) for s in range(2)]
        scalar = normal(len(rows[0]), device=device, seed=number)
        addresses = [0 if d == number else box.data_ptr() for d, box in enumerate(boxes)]
        peers = Peers(torch.tensor(addresses, device=device), rank.layout.back_D, capacity)
        beyond = torch.full((3, 3), 2**30, dtype=torch.int32, device=device)  # as memory that nobody wrote
        more = torch.cat((position, beyond))
        kernel.merge(rows, more, peers, wire, None, scalar, arrive_D=rank.layout.arrive_D)
        local = on_wire(wire, ends[-1], device)
        kernel.merge(rows, position, local, wire, None, scalar)
        for source, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            there = torch.arange(start, end, device=device) + int(rank.layout.back_D[source])
            expected[source][there[there < capacity]] = local[start:end][there < capacity]
    assert all(map(same_bits, boxes, expected))
    for box, rank in zip(boxes, ranks, strict=True):
        assert int((box[:, 0] != UNTOUCHED).sum()) == min(capacity, rank.sent)


@pytest.mark.parametrize("tokens", [(5, 2, 4), (5,)], ids=["three ranks", "one rank"])
@pytest.mark.parametrize("two,weighted,scalars", [(False, True, False), (True, False, True), (False, True, True)])
@pytest.mark.parametrize("hidden,dtype", SHAPES, ids=str)
def test_combine(
    hidden: int, dtype: torch.dtype, two: bool, weighted: bool, scalars: bool, tokens: tuple[int, ...],
    device: torch.device,
) -> None:  # fmt: skip
    rank = routed(tokens, 6, 3, device)[0]
    local, wire = 6 // len(tokens), Wire(hidden, 3, dtype, 1 if scalars else 0)
    count = max(int(rank.layout.ends_GL[-1, -1]), 1)
    rows = [normal(count, hidden, device=device, dtype=dtype, seed=s) for s in range(1 + two)]
    returned = on_wire(wire, rank.sent, device)
    wire.values(returned).copy_(normal(rank.sent, hidden, device=device, seed=5))
    scalar = normal(count, device=device, seed=9) if scalars else None
    if scalars:
        wire.extra(returned, 0, torch.float32).copy_(normal(rank.sent, 3, device=device, seed=6))
    weight = rank.weights if weighted else None
    more = {"scalar_X": scalar, "slots_TK": rank.slots if scalars else None, "local": local}
    there = returned if len(tokens) > 1 else None
    got, got_scalars = kernel.combine(rows, rank.own, there, rank.send, wire, weight, **more)
    expected, expected_scalars = reference.combine(rows, rank.own, returned, rank.send, wire, weight, **more)
    exact = merge_exactly(rows, rank.own, weight, 0)
    for t, places in enumerate(rank.send.tolist()):
        for place in places:
            exact[t] += wire.values(returned)[place].double().cpu() if place >= 0 else 0
    assert got.dtype == dtype
    check_close(got, exact)
    check_close(got, expected.double().cpu())
    assert (got_scalars is None) == (not scalars)
    if got_scalars is not None and expected_scalars is not None:
        assert same_bits(got_scalars, expected_scalars)


@pytest.mark.parametrize("k", [1, 2, 6])
@pytest.mark.parametrize("tokens", [(4, 3), (4, 0, 6)], ids=str)
def test_there_and_back(tokens: tuple[int, ...], k: int, device: torch.device) -> None:
    """Rows are stamped with rank and token, expert e multiplies by e + 1, all in whole numbers."""
    ranks, hidden, local = routed(tokens, 6, k, device), 5, 6 // len(tokens)
    out, back = Wire(hidden, k, torch.float32, 2), Wire(hidden, k, torch.float32, 1)
    weights = [(torch.arange(t * k, device=device).view(t, k) + 1).float() for t in tokens]
    xs = [
        (100 * rank + torch.arange(t, device=device)[:, None] + 10000 * torch.arange(hidden, device=device)).float()
        for rank, t in enumerate(tokens)
    ]
    outbox, inbox = [], [on_wire(out, int(r.layout.arrive_D[-1]), device) for r in ranks]
    for rank, x, weight in zip(ranks, xs, weights, strict=True):
        outbox.append(on_wire(out, rank.sent, device))
        kernel.pack(x, rank.send, outbox[-1], out, rank.position, rank.slots, weight, local)
    crossings = [(s, d, p[p >= 0].long()) for s, r in enumerate(ranks) for d, p in enumerate(r.send.unbind(1))]
    for source, device_number, places in crossings:
        there = places + int(ranks[source].layout.put_D[device_number])
        inbox[device_number][there] = outbox[source][places]
    results, homes = [], [on_wire(back, r.sent, device) for r in ranks]
    merged = []
    for number, (rank, x, weight, arrived) in enumerate(zip(ranks, xs, weights, inbox, strict=True)):
        ends = [0, *rank.layout.ends_GL[0].tolist()]
        x_XH, weight_X = marked(ends[-1], hidden, like=x), marked(ends[-1], like=x)
        position, weight_RK = out.extra(arrived, 0, torch.int32), out.extra(arrived, 1, torch.float32)
        kernel.expand(x, rank.own, x_XH, weight, weight_X)
        kernel.expand(out.values(arrived), position, x_XH, weight_RK, weight_X)
        assert not (x_XH == UNTOUCHED).any()
        scale = torch.empty(ends[-1], 1, device=device)
        for expert in range(local):
            scale[ends[expert] : ends[expert + 1]] = number * local + expert + 1
        results.append((x_XH * scale, weight_X))
        merged.append(on_wire(back, len(arrived), device))
        kernel.merge([results[-1][0]], position, merged[-1], back, weight_RK, weight_X)
    for source, device_number, places in crossings:
        there = places + int(ranks[source].layout.put_D[device_number])
        homes[source][places] = merged[device_number][there]
    for rank, x, weight, (y_XH, weight_X), home in zip(ranks, xs, weights, results, homes, strict=True):
        y, scalars = kernel.combine([y_XH], rank.own, home, rank.send, back, weight, weight_X, rank.slots, local)
        assert torch.equal(y, x * (weight * (rank.slots + 1)).sum(1, keepdim=True))
        assert scalars is not None
        assert torch.equal(scalars, weight)


def test_without_rows_nothing_happens(device: torch.device) -> None:
    wire = Wire(8, 2, torch.float32, 1)
    none, maps = normal(0, 8, device=device), torch.zeros(0, 2, dtype=torch.int32, device=device)
    room = on_wire(wire, 2, device)
    kernel.expand(none, maps, marked(3, 8, like=none))
    kernel.pack(none, maps, room, wire)
    kernel.merge([none], maps, room, wire)
    assert same_bits(room, on_wire(wire, 2, device))
    y, scalars = kernel.combine([none], maps, None, maps, wire, scalar_X=normal(0, device=device), slots_TK=maps.long())
    assert (y.shape, scalars.shape if scalars is not None else None) == ((0, 8), (0, 2))


def test_what_does_not_belong_together_is_refused(device: torch.device) -> None:
    wire, x = Wire(8, 2, torch.float32, 0), normal(3, 8, device=device)
    maps = torch.zeros(4, 2, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="3 rows, 4 positions"):
        kernel.expand(x, maps, x)
    with pytest.raises(ValueError, match="8 width of x, 9 of out"):
        kernel.expand(x, maps[:3], normal(5, 9, device=device))
    with pytest.raises(ValueError, match="3 tokens, 4 sends"):
        kernel.pack(x, maps, wire.empty(3, x), wire)
    with pytest.raises(ValueError, match="8 width of x, 9 of the wire"):
        kernel.pack(x, maps[:3], wire.empty(3, x), Wire(9, 2, torch.float32, 0))
    with pytest.raises(ValueError, match="8 width of rows, 9 of the wire"):
        kernel.merge([x], maps, wire.empty(4, x), Wire(9, 2, torch.float32, 0))


def test_sums_do_not_read_beyond_the_rows(device: torch.device) -> None:
    """As when there were more rows than was made room for: the result is of no use, but nothing else is touched."""
    x = normal(4, 16, device=device)
    position = torch.tensor([[0, 4], [2**30, 3]], dtype=torch.int32, device=device)
    wire = Wire(16, 2, torch.float32, 0)
    merged = on_wire(wire, 2, device)
    kernel.merge([x], position, merged, wire)
    home = torch.full((2, 1), -1, dtype=torch.int32, device=device)
    combined, _ = kernel.combine([x], position, None, home, wire)
    assert torch.equal(wire.values(merged), x[[0, 3]])
    assert torch.equal(combined, x[[0, 3]])


def test_share_writes_into_all_devices(device: torch.device) -> None:
    boxes = [torch.zeros(9, dtype=torch.int32, device=device) for _ in range(3)]
    addresses = torch.tensor([box.data_ptr() for box in boxes], device=device)
    kernel.share(torch.tensor([[5, 6], [7, 8]], dtype=torch.int32, device=device), addresses, 3)
    assert [box.tolist() for box in boxes] == [[0, 0, 0, 5, 6, 7, 8, 0, 0]] * 3
