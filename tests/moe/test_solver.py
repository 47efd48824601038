"""Placements solved from statistics: worked by hand, invariants, optima."""

import pytest
import torch
from torch import Tensor

from occult_train.errors import PlacementError
from occult_train.moe.collaboration import LayerStatistics
from occult_train.moe.solver import device_of, solution, solve

UPPER = [5, 1, 9, 2, 0, 4, 6, 3, 1, 2, 8, 7, 1, 3, 5]
"""Of six experts: (0,1), (0,2) ... (0,5), (1,2) ... (4,5)."""


def symmetric(upper: list[int], experts: int) -> Tensor:
    pairs_EE = torch.zeros(experts, experts, dtype=torch.int64)
    one, other = torch.triu_indices(experts, experts, offset=1)
    pairs_EE[one, other] = torch.tensor(upper)
    return pairs_EE + pairs_EE.T


def with_pairs(pairs_EE: Tensor) -> LayerStatistics:
    experts = pairs_EE.shape[0]
    sets_NK = torch.zeros(0, 2, dtype=torch.int16)
    return LayerStatistics(100, torch.ones(experts, dtype=torch.int64), pairs_EE, sets_NK)


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        # 0 and 3 collaborate most. With them 2, 4 and 5 collaborate equally little: 2 is the second seed. Device 0
        # takes 1 (11 against 3 and 3), device 1 takes 4 (8 against 7), then 5.
        (2, [0, 0, 1, 0, 1, 1]),
        # Device 0 is full. Least collaboration with 0, 3 and 2: 5 (10; 4 has 11, 1 has 15). Device 1 takes 4 (8 against
        # 4), device 2 the last.
        (3, [0, 2, 1, 0, 1, 2]),
        # One expert a device: 0 is the seed; with 0 expert 5 collaborates least, with {0, 5} 1 (6; 2 has 8, 3 12, 4 7),
        # with {0, 5, 1} 4 (10; 2 has 12, 3 18), with {0, 5, 1, 4} 3 (19; 2 has 20).
        (6, [0, 2, 5, 4, 3, 1]),
        (1, [0] * 6),
    ],
)
def test_greedy_by_hand(devices: int, expected: list[int]) -> None:
    statistics = with_pairs(symmetric(UPPER, 6))
    assert device_of(solve("greedy", statistics, devices), devices).tolist() == expected


def test_greedy_gives_ties_to_lower_ids() -> None:
    statistics = with_pairs(symmetric([1] * 28, 8))
    # seeds (0, 1), 2; then device 1 is not yet asked before device 0
    assert device_of(solve("greedy", statistics, 2), 2).tolist() == [0, 0, 1, 0, 1, 0, 1, 1]


def test_contiguous() -> None:
    statistics = with_pairs(symmetric(UPPER, 6))
    assert solve("contiguous", statistics, 3).slot_to_expert == tuple(range(6))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"devices": 4}, "devices=4 does not divide num_experts=6"),
        ({"nodes": 2}, "nodes=2 does not divide devices=3"),
        ({"method": "best"}, "method=best is not one of"),
        ({"load_bound": 0.9}, "load_bound=0.9 is below 1"),
        ({"load_bound": float("nan")}, "load_bound=nan"),
    ],
)
def test_mistakes(settings: dict[str, object], words: str) -> None:
    arguments = {"method": "greedy", "devices": 3} | settings
    with pytest.raises(PlacementError, match=words):
        solution(statistics=with_pairs(symmetric(UPPER, 6)), **arguments)
