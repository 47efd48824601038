"""Which elements go where when experts move, against lists that are reordered whole."""

import random

from hypothesis import given
from hypothesis import strategies as st

from occult_train.moe.placement import Placement
from occult_train.moving import Layout, Piece


def test_by_hand() -> None:
    """Two devices with two experts of three elements, each stack in two shares of 4 and 2; experts 1 and 2 swap."""
    layout = Layout(((0, 4), (0, 4), (4, 6), (4, 6)), devices=2, size=3)
    old, new = Placement((0, 1, 2, 3)), Placement((0, 2, 1, 3))
    # device 0's slot 1 has elements 3 | 4 5, device 1's slot 0 has 0 1 2, all in its first share
    assert list(layout.pieces(0, old, new)) == [Piece(source=1, source_at=0, target_at=3, length=1)]
    assert list(layout.pieces(2, old, new)) == [Piece(source=1, source_at=1, target_at=0, length=2)]
    assert list(layout.pieces(1, old, new)) == [Piece(0, 3, 0, 1), Piece(2, 0, 1, 2)]
    assert list(layout.pieces(3, old, new)) == []


def test_a_whole_copy_comes_from_the_own_group() -> None:
    layout = Layout(((0, 4),) * 4, devices=2, size=2)
    old, new = Placement((0, 1, 2, 3)), Placement((2, 1, 0, 3))
    assert [next(layout.pieces(r, old, new)).source for r in range(4)] == [1, 0, 3, 2]


def cut(total: int, parts: int, rng: random.Random) -> list[tuple[int, int]]:
    """Shares of a stack, some of them empty, as ZeRO leaves them."""
    ends = [*sorted(rng.choices(range(total + 1), k=parts - 1)), total]
    return list(zip([0, *ends[:-1]], ends, strict=True))


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.integers(0, 9999))
def test_against_whole_lists(devices: int, replicas: int, local: int, size: int, shared: bool, seed: int) -> None:
    rng, experts = random.Random(seed), devices * local
    old, new = (Placement(tuple(rng.sample(range(experts), experts))) for _ in range(2))
    shares = cut(local * size, replicas, rng) if shared else [(0, local * size)] * replicas
    runs = tuple(shares[rank // devices] for rank in range(devices * replicas))

    def values(placement: Placement) -> list[list[tuple[int, int]]]:
        """(expert, element) of each rank's run."""
        stacks = [[(e, x) for e in group for x in range(size)] for group in placement.by_device(devices)]
        return [stacks[rank % devices][start:end] for rank, (start, end) in enumerate(runs)]

    layout, before, after = Layout(runs, devices, size), values(old), values(old)
    for rank, run in enumerate(after):
        for p in layout.pieces(rank, old, new):
            assert p.length > 0
            run[p.target_at : p.target_at + p.length] = before[p.source][p.source_at : p.source_at + p.length]
    assert after == values(new)
