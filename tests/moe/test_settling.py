"""Renaming devices and slots so that few experts move: C_T, nodes and the set of placements stay what they were."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from occult_train.moe.placement import Placement
from occult_train.moe.settling import settle


def groups(placement: Placement, devices: int) -> set[frozenset[int]]:
    return {frozenset(group) for group in placement.by_device(devices)}


def movers(old: Placement, new: Placement, devices: int) -> int:
    return sum(len(set(b) - set(a)) for a, b in zip(old.by_device(devices), new.by_device(devices), strict=True))


def test_by_hand() -> None:
    """Devices are swapped and one pair of experts exchanged: two move, all others keep their slots."""
    old = Placement((0, 1, 2, 3, 4, 5))
    new = Placement((5, 3, 0, 1, 4, 2))
    settled = settle(old, new, devices=2)
    assert settled.slot_to_expert == (4, 1, 2, 3, 0, 5)
    assert movers(old, settled, 2) == 2


def test_devices_stay_in_their_node() -> None:
    """Without nodes nothing would have to move; two nodes pair the devices otherwise."""
    old = Placement(tuple(range(8)))
    new = Placement((0, 1, 4, 5, 2, 3, 6, 7))
    assert settle(old, new, devices=4) == old
    settled = settle(old, new, devices=4, nodes=2)
    halves = {frozenset(settled.slot_to_expert[:4]), frozenset(settled.slot_to_expert[4:])}
    assert halves == {frozenset((0, 1, 4, 5)), frozenset((2, 3, 6, 7))}
    assert movers(old, settled, 4) == 4


@given(st.sampled_from([(1, 1), (2, 1), (4, 1), (4, 2), (6, 3), (8, 2)]), st.integers(1, 4), st.integers(0, 999))
def test_only_names_change(shape: tuple[int, int], local: int, seed: int) -> None:
    (devices, nodes), rng = shape, random.Random(seed)
    old, new = (Placement(tuple(rng.sample(range(devices * local), devices * local))) for _ in range(2))
    settled = settle(old, new, devices, nodes)
    assert groups(settled, devices) == groups(new, devices)
    assert groups(settled, nodes) == groups(new, nodes)
    pairs = zip(old.by_device(devices), settled.by_device(devices), strict=True)
    stayers = set.union(*(set(before) & set(after) for before, after in pairs))
    assert all(settled.expert_to_slot[e] == old.expert_to_slot[e] for e in stayers), "who stays keeps its slot"
    assert settle(settled, settled, devices, nodes) == settled


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_a_renamed_placement_moves_nothing(devices: int) -> None:
    rng = random.Random(devices)
    old = Placement(tuple(rng.sample(range(16), 16)))
    renamed = old.by_device(devices)
    rng.shuffle(renamed)
    new = Placement(tuple(e for group in renamed for e in rng.sample(group, len(group))))
    assert settle(old, new, devices) == old
