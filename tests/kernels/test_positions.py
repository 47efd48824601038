"""Index maps of the fused layer: worked by hand, against the reference, and by what they must be whoever made them."""

from dataclasses import dataclass, fields
from itertools import accumulate
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from occult_train.kernels.launching import INTERPRETED
from occult_train.kernels.positions import kernel, reference
from occult_train.kernels.positions.reference import Geometry, Layout, chunk_size


@dataclass(frozen=True)
class Setup:
    """Tokens of each device's rank, and where they go."""

    tokens: tuple[int, ...]
    experts: int
    top_k: int
    skew: float = 0.0
    """How strongly experts with low numbers are preferred."""

    def slots(self, device: torch.device) -> list[Tensor]:
        """[T, K] of each rank."""
        generator = torch.Generator().manual_seed(sum(self.tokens) + self.experts)
        lean = torch.linspace(self.skew, 0, self.experts)
        scores = [torch.rand(t, self.experts, generator=generator) + lean for t in self.tokens]
        return [s.topk(self.top_k, dim=1).indices.to(device) for s in scores]


@dataclass(frozen=True)
class Plan:
    """One rank's maps."""

    geometry: Geometry
    counts: Tensor
    layout: Layout
    position: Tensor
    own: Tensor
    send: Tensor


def plans(module: ModuleType, slots: list[Tensor], experts: int, chunks: int, split: bool) -> list[Plan]:
    """What each rank finds; counts are gathered by hand."""
    devices = len(slots)
    geometries = [
        Geometry(rank, devices, experts, chunk_size(len(s), chunks), chunks, split) for rank, s in enumerate(slots)
    ]
    counted = [module.count(s, g) for s, g in zip(slots, geometries, strict=True)]
    blocks = [c[1] if module is kernel else None for c in counted]
    counts = torch.stack([c[0] if module is kernel else c for c in counted])
    found = []
    for s, g, b in zip(slots, geometries, blocks, strict=True):
        layout = module.layout(counts, g)
        maps = kernel.positions(s, b, layout, g) if module is kernel else reference.positions(s, layout, g)  # type: ignore
        found.append(Plan(g, counts[g.rank], layout, *maps))
    return found


def same(got: Tensor, expected: Tensor) -> bool:
    return got.dtype == expected.dtype == torch.int32 and torch.equal(got, expected)


CUTS = [(1, False), (1, True), (2, True), (3, True)]
SETUPS = [
    *(Setup((tokens,), 6, 3) for tokens in (0, 1, 63, 64, 65, 100, 600)),
    Setup((100,), 60, 60),
    Setup((0, 0), 6, 2),
    Setup((0, 65), 6, 1),
    Setup((63, 64), 60, 8),
    Setup((600, 1), 6, 6),
    Setup((100, 65), 64, 8, skew=1.0),
    Setup((65, 20), 128, 8),
    Setup((1, 100, 64), 6, 2),
    Setup((65, 0, 63), 60, 4, skew=0.5),
    Setup((65, 0, 1, 100), 60, 6),
    Setup((64, 63, 130, 0), 8, 8),
    Setup((3, 5, 4, 6), 4, 1),
    Setup((2, 65, 0, 7, 64, 1, 100, 3), 24, 5),
]


@pytest.mark.parametrize("chunks,split", CUTS)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_the_kernels_agree_with_the_reference(setup: Setup, chunks: int, split: bool, device: torch.device) -> None:
    slots = setup.slots(device)
    got, expected = (plans(module, slots, setup.experts, chunks, split) for module in (kernel, reference))
    for mine, theirs in zip(got, expected, strict=True):
        for name in ("counts", "position", "own", "send"):
            assert same(getattr(mine, name), getattr(theirs, name)), (name, mine.geometry)
        for field in fields(Layout):
            pair = getattr(mine.layout, field.name), getattr(theirs.layout, field.name)
            assert same(*pair), (field.name, mine.geometry)


HAND = [[[0, 2], [1, 3], [0, 1]], [[2, 3], [0, 3]]]
"""Experts 0 and 1 live on device 0, 2 and 3 on device 1."""


@pytest.mark.parametrize("module", [kernel, reference], ids=["kernel", "reference"])
def test_by_hand(module: ModuleType, device: torch.device) -> None:
    """Device 0 computes, by expert: tokens 0 and 2 of rank 0, token 1 of rank 1; tokens 1 and 2 of rank 0.
    Device 1: token 0 of rank 0, token 0 of rank 1; token 1 of rank 0, tokens 0 and 1 of rank 1."""
    first, second = plans(module, [torch.tensor(s, device=device) for s in HAND], 4, 1, False)
    assert first.counts.tolist() == [[2, 2, 1, 1, 3, 2]]
    assert second.counts.tolist() == [[1, 0, 1, 2, 1, 2]]
    assert first.position.tolist() == [[0, 0], [3, 2], [1, 4]]
    assert second.position.tolist() == [[1, 3], [2, 4]]
    assert first.own.tolist() == [[0, -1], [3, -1], [1, 4]]
    assert second.own.tolist() == [[1, 3], [-1, 4]]
    assert first.send.tolist() == [[-1, 0], [-1, 1], [-1, -1]]
    assert second.send.tolist() == [[-1, -1], [0, -1]]
    assert (first.layout.ends_GL.tolist(), second.layout.ends_GL.tolist()) == ([[3, 5]], [[2, 5]])
    assert (first.layout.arrive_D.tolist(), second.layout.arrive_D.tolist()) == ([0, 1], [2, 2])


@pytest.mark.parametrize("module", [kernel, reference], ids=["kernel", "reference"])
def test_by_hand_with_own_tokens_first(module: ModuleType, device: torch.device) -> None:
    first, second = plans(module, [torch.tensor(s, device=device) for s in HAND], 4, 1, True)
    assert first.position.tolist() == [[0, 3], [2, 4], [1, 3]]
    assert second.position.tolist() == [[0, 1], [4, 2]]
    assert first.layout.ends_GL.tolist() == [[2, 4], [5, 5]]
    assert first.layout.relative_GL.tolist() == [[2, 4], [1, 1]]
    assert second.layout.ends_GL.tolist() == [[1, 3], [4, 5]]
    assert second.layout.relative_GL.tolist() == [[1, 3], [1, 2]]


def rows_of(found: list[Plan], slots: list[Tensor], device: int) -> dict[int, tuple[int, int, int, int]]:
    """Expanded rows of a device: row to (segment, expert, rank, token)."""
    rows: dict[int, tuple[int, int, int, int]] = {}
    for plan, chosen in zip(found, slots, strict=True):
        g = plan.geometry
        for token, (positions, experts) in enumerate(zip(plan.position.tolist(), chosen.tolist(), strict=True)):
            for position, expert in zip(positions, experts, strict=True):
                if expert // g.local == device:
                    late = g.split and g.rank != device
                    segment = 1 + token // g.chunk_tokens if late else 0
                    assert position not in rows
                    rows[position] = (segment, expert, g.rank, token)
    return rows


def check_device(found: list[Plan], slots: list[Tensor], device: int) -> None:
    """Rows 0 to X - 1 are each somebody's, ordered by segment, expert, rank and token, and end where ends say."""
    rows = rows_of(found, slots, device)
    assert sorted(rows) == list(range(len(rows)))
    assert [rows[row] for row in range(len(rows))] == sorted(rows.values())
    g, layout = found[device].geometry, found[device].layout
    sizes = [
        sum(row[:2] == (segment, expert) for row in rows.values())
        for segment in range(g.segments)
        for expert in range(device * g.local, (device + 1) * g.local)
    ]
    assert layout.ends_GL.flatten().tolist() == list(accumulate(sizes))
    starts = [0, *layout.ends_GL[:-1, -1].tolist()]
    for segment, start in enumerate(starts):
        assert (layout.relative_GL[segment] + start).tolist() == layout.ends_GL[segment].tolist()


def check_sends(plan: Plan, chosen: Tensor) -> None:
    """Each token goes once to each other device that it needs: rows 0 to S - 1, by chunk, device and token."""
    g = plan.geometry
    wanted = [
        (token // g.chunk_tokens, device, token)
        for token, experts in enumerate(chosen.tolist())
        for device in {expert // g.local for expert in experts} - {g.rank}
    ]
    places = {place: key for key, place in zip(sorted(wanted), range(len(wanted)), strict=True)}
    sent = {
        place: (token // g.chunk_tokens, device, token)
        for token, row in enumerate(plan.send.tolist())
        for device, place in enumerate(row)
        if place >= 0
    }
    assert (plan.send >= -1).all()
    assert sent == places
    own = torch.where(chosen // g.local == g.rank, plan.position, -1)
    assert torch.equal(plan.own, own.to(torch.int32))


def check_places(found: list[Plan]) -> None:
    """put_D takes a row to its place on arrival, by source and token, back_D back; arrive_D is where sources end."""
    for device, there in enumerate(found):
        arrivals = []
        for rank, plan in enumerate(found):
            if rank == device:
                continue
            sent = [p for p in plan.send[:, device].tolist() if p >= 0]
            places = [p + int(plan.layout.put_D[device]) for p in sent]
            assert [p + int(there.layout.back_D[rank]) for p in places] == sent
            arrivals.append((rank, places))
        assert [p for _, places in arrivals for p in places] == list(range(sum(len(p) for _, p in arrivals)))
        counts = dict(arrivals) | {device: []}
        assert there.layout.arrive_D.tolist() == list(accumulate(len(counts[rank]) for rank in range(len(found))))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Setup, int, bool]:
    devices, local = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    experts = devices * local
    setup = Setup(
        tuple(draw(st.lists(st.integers(0, 140), min_size=devices, max_size=devices))),
        experts,
        draw(st.integers(1, min(experts, 5))),
        draw(st.sampled_from([0.0, 0.5, 2.0])),
    )
    return setup, *draw(st.sampled_from(CUTS))


@settings(max_examples=15, deadline=None)
@given(problems())
def test_every_copy_has_its_own_place(problem: tuple[Setup, int, bool]) -> None:
    setup, chunks, split = problem
    slots = setup.slots(torch.device("cpu" if INTERPRETED else "cuda"))
    found = plans(kernel, slots, setup.experts, chunks, split)
    for device, (plan, chosen) in enumerate(zip(found, slots, strict=True)):
        check_device(found, slots, device)
        check_sends(plan, chosen)
    if chunks == 1:
        check_places(found)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((0, 4, 6, 64), "6 experts cannot be spread evenly over 4 devices"),
        ((2, 2, 6, 64), "rank 2 is not among 2 devices"),
        ((-1, 2, 6, 64), "rank -1 is not among 2 devices"),
        ((0, 2, 6, 64, 2), "2 chunks need split=True"),
        ((0, 2, 6, 65), "chunk_tokens=65 is not a multiple of 64"),
    ],
)
def test_a_wrong_geometry_is_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Geometry(*arguments)


def test_wrong_slots_are_refused(device: torch.device) -> None:
    geometry = Geometry(0, 2, 6, 64)
    with pytest.raises(ValueError, match=r"int64 \[T, K\], got torch.int32 \(3, 2\)"):
        kernel.count(torch.zeros(3, 2, dtype=torch.int32, device=device), geometry)
    with pytest.raises(ValueError, match=r"contiguous int64"):
        kernel.count(torch.zeros(2, 3, dtype=torch.int64, device=device).t(), geometry)
    with pytest.raises(ValueError, match="7 experts a token of 6"):
        kernel.count(torch.zeros(3, 7, dtype=torch.int64, device=device), geometry)
    with pytest.raises(ValueError, match="65 tokens do not fit 1 chunks of 64"):
        kernel.count(torch.zeros(65, 2, dtype=torch.int64, device=device), geometry)
    with pytest.raises(ValueError, match=r"counts \(2, 2, 8\), geometry wants \(2, 1, 8\)"):
        kernel.layout(torch.zeros(2, 2, 8, dtype=torch.int32, device=device), geometry)


@pytest.mark.parametrize(
    "tokens,chunks,size",
    [(0, 1, 64), (1, 3, 64), (64, 1, 64), (65, 1, 128), (192, 3, 64), (193, 3, 128)],
)
def test_chunks_are_multiples_of_a_block_and_hold_all_tokens(tokens: int, chunks: int, size: int) -> None:
    assert chunk_size(tokens, chunks) == size
    assert size * chunks >= tokens


@pytest.mark.parametrize("module", [kernel, reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("room", [0, 3, 5, 100])
def test_relative_ends_stay_within_the_room(module: ModuleType, room: int, device: torch.device) -> None:
    geometry = Geometry(1, 2, 4, chunk_size(5, 1))
    counts = torch.tensor([[[1, 2, 3, 0, 2, 3]], [[0, 1, 1, 2, 1, 3]]], dtype=torch.int32, device=device)
    found = module.layout(counts, geometry, room)
    assert found.ends_GL.tolist() == [[4, 6]]
    assert found.relative_GL.tolist() == [[min(4, room), min(6, room)]]
