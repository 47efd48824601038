"""What the host knows of a forward against what the devices do, for random routings."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from occult_train.kernels.positions import reference
from occult_train.kernels.positions.reference import Geometry, chunk_size
from occult_train.moe import routes
from occult_train.moe.routes import Counts, Room, Routes, Segment, find_routes
from occult_train.parallel.grid import Grid
from occult_train.testing import run_distributed


def random_slots(tokens: tuple[int, ...], experts: int, k: int, skew: float) -> list[Tensor]:
    """[T, K] of each rank; low experts are preferred by `skew`."""
    generator = torch.Generator().manual_seed(sum(tokens))
    lean = torch.linspace(skew, 0, experts)
    return [(torch.rand(t, experts, generator=generator) + lean).topk(k, dim=1).indices for t in tokens]


def plans(slots: list[Tensor], experts: int, chunks: int) -> list[tuple[Geometry, reference.Layout, Tensor, Counts]]:
    """Geometry, layout, sends and the host's counts of each rank; the maps by the reference."""
    devices = len(slots)
    split = chunks > 0
    cut = max(chunks, 1)
    geometries = [Geometry(r, devices, experts, chunk_size(len(s), cut), cut, split) for r, s in enumerate(slots)]
    counts = torch.stack([reference.count(s, g) for s, g in zip(slots, geometries, strict=True)])
    found = []
    for s, g in zip(slots, geometries, strict=True):
        layout = reference.layout(counts, g)
        send = reference.positions(s, layout, g)[2]
        found.append((g, layout, send, routes._count(counts.tolist(), g)))
    return found


def rows_by_device(g: Geometry, send: Tensor) -> list[list[int]]:
    """Rows that leave for each device in each chunk."""
    chunks = [send[c * g.chunk_tokens : (c + 1) * g.chunk_tokens] for c in range(g.chunks)]
    return [(part >= 0).sum(0).tolist() for part in chunks]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Tensor], int, int]:
    devices, local = draw(st.integers(2, 4)), draw(st.integers(1, 4))
    tokens = draw(st.lists(st.integers(0, 200), min_size=devices, max_size=devices))
    k = draw(st.integers(1, min(devices * local, 4)))
    slots = random_slots(tuple(tokens), devices * local, k, draw(st.sampled_from([0.0, 0.5, 3.0])))
    return slots, devices * local, draw(st.integers(0, 3))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_host_counts_what_the_devices_do(problem: tuple[list[Tensor], int, int]) -> None:
    slots, experts, chunks = problem
    found = plans(slots, experts, chunks)
    sends = [rows_by_device(g, send) for g, _, send, _ in found]
    most = 0
    for rank, (g, layout, send, counts) in enumerate(found):
        assert counts.sends_CD == sends[rank]
        assert counts.arrives_CD == [[sends[s][c][rank] for s in range(g.devices)] for c in range(g.chunks)]
        assert counts.sent == int((send >= 0).sum())
        assert counts.arrived == int(layout.arrive_D[-1]) or g.chunks > 1
        assert [s.end for s in counts.segments] == layout.ends_GL[:, -1].tolist()
        assert [s.start for s in counts.segments] == [0, *layout.ends_GL[:-1, -1].tolist()]
        assert [s.rows for s in counts.segments] == layout.relative_GL[:, -1].tolist()
        assert [(s.own, s.chunk) for s in counts.segments] == (
            [(True, None), *((False, c) for c in range(chunks))] if chunks else [(True, 0)]
        )
        held = sum(int((s // g.local == rank).sum()) for s in slots)
        assert counts.expanded == held
        most = max(most, counts.sent, counts.arrived)
        check_slices(counts, send, g)
    assert {counts.most_rows for *_, counts in found} == {most}
    assert {counts.most_expanded for *_, counts in found} == {max(counts.segments[0].rows for *_, counts in found)}


def check_slices(counts: Counts, send: Tensor, g: Geometry) -> None:
    """Chunks lie one after the other, in the order of sending."""
    for name, total in (("sent_slice", counts.sent), ("arrived_slice", counts.arrived)):
        slices = [getattr(counts, name)(c) for c in range(g.chunks)]
        assert (slices[0].start, slices[-1].stop) == (0, total)
        assert all(a.stop == b.start for a, b in pairwise(slices))
    for c in range(g.chunks):
        places = send[c * g.chunk_tokens : (c + 1) * g.chunk_tokens]
        inside = counts.sent_slice(c)
        assert sorted(places[places >= 0].tolist()) == list(range(inside.start, inside.stop))


def rank_finds(rank: int, cases: list[tuple[tuple[int, ...], int]]) -> list[Any]:
    grid = Grid.create(2)
    found = []
    for tokens, chunks in cases:
        got = find_routes(random_slots(tokens, 6, 3, 0.5)[rank], grid, 6, chunks)
        found.append((got.geometry, got.counts(), got.layout, (got.position_TK, got.own_TK, got.send_TD)))
    return found


def test_ranks_find_the_routes_together() -> None:
    """By kernels and one all-gather, what the reference finds with all tokens before it."""
    cases = [((5, 70), 0), ((5, 70), 1), ((70, 130), 2), ((0, 3), 0), ((0, 3), 2), ((0, 0), 1)]
    by_rank = run_distributed(rank_finds, 2, cases)
    for number, (tokens, chunks) in enumerate(cases):
        slots = random_slots(tokens, 6, 3, 0.5)
        expected = plans(slots, 6, chunks)
        for rank, (g, layout, _, counts) in enumerate(expected):
            got_g, got_counts, got_layout, maps = by_rank[rank][number]
            assert (got_g, got_counts) == (g, counts)
            assert all(torch.equal(a, b) for a, b in zip(vars(got_layout).values(), vars(layout).values(), strict=True))
            assert all(
                torch.equal(a, b) for a, b in zip(maps, reference.positions(slots[rank], layout, g), strict=True)
            )


@pytest.mark.parametrize("chunks", [0, 2])
@pytest.mark.parametrize("tokens", [0, 1, 70])
def test_a_single_device_has_one_segment_of_all_rows(tokens: int, chunks: int) -> None:
    found: Routes = find_routes(random_slots((tokens,), 6, 3, 0.0)[0], Grid(), 6, chunks)
    counts = found.counts()
    assert counts == Counts([[0]], [[0]], 0, 3 * tokens, [Segment(True, None, 0, 3 * tokens)])
    assert (counts.sent, counts.arrived, counts.expanded) == (0, 0, 3 * tokens)
    assert found.layout.ends_GL[-1, -1] == 3 * tokens
    assert torch.equal(found.own_TK, found.position_TK)
    assert (found.send_TD == -1).all()


def counted(rows: int, expanded: int) -> Counts:
    return Counts([[rows]], [[rows]], rows, expanded, [Segment(True, 0, 0, expanded)])


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1, max_size=20))
def test_room_is_enough_for_the_same_again_and_seldom_changes(needs: list[tuple[int, int]]) -> None:
    room = Room()
    for rows, expanded in needs:
        counts = counted(rows, expanded)
        before, room = room, room.after(counts)
        assert room.holds(counts)
        assert room.rows <= rows + rows // 2
        assert room.expanded <= expanded + expanded // 2
        assert room.after(counts) == room
        if before.holds(counts) and before.rows <= 1.4 * rows and before.expanded <= 1.4 * expanded:
            assert room == before


@pytest.mark.parametrize("rows,expanded,holds", [(5, 7, True), (6, 7, False), (5, 8, False), (0, 0, True)])
def test_room_holds_what_fits(rows: int, expanded: int, holds: bool) -> None:
    assert Room(5, 7).holds(counted(rows, expanded)) == holds


def test_a_guess_fills_its_room() -> None:
    guess = Room(5, 7).guess()
    assert guess.guessed
    assert (guess.sent, guess.arrived, guess.most_rows, guess.expanded, guess.most_expanded) == (5, 5, 5, 7, 7)
