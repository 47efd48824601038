"""Costs of a placement by hand."""

import math

import pytest
import torch

from occult_train.moe.costs import cost, groups_of_tokens, mean_and_error, rows_moved
from occult_train.moe.placement import Placement
from occult_train.moe.synthetic import clustered, statistics_of

# four tokens of two experts; experts {2, 0} on device 0, {1, 3} on device 1
SETS = torch.tensor([[0, 2], [2, 0], [1, 2], [3, 1]])
PLACED = Placement((2, 0, 1, 3))


def test_costs_by_hand() -> None:
    found = cost(statistics_of(SETS, 4), PLACED, 2)
    assert found.c_t == (1 + 1 + 2 + 1) / 4
    assert found.c_t_error == pytest.approx(0.5 / 2)  # deviation of 1, 1, 2, 1 over sqrt(4)
    assert found.intra_share == 3 / 4
    assert found.load == 5 / 4  # five choices of eight are on device 0, which is one of two
    assert found.nodes == 1


def test_nodes_by_hand() -> None:
    found = cost(statistics_of(SETS, 4), Placement((0, 1, 2, 3)), 4, nodes=2)
    assert found.c_t == 2
    assert found.nodes == (2 + 2 + 2 + 2 - 0) / 4  # 0|2, 2|0, 1|2, and 3|1
    assert cost(statistics_of(SETS, 4), PLACED, 4, nodes=2).nodes == 5 / 4


def test_statistics_of_by_hand() -> None:
    statistics = statistics_of(SETS, 4)
    assert statistics.tokens == 4
    assert statistics.loads_E.tolist() == [2, 2, 3, 1]
    assert statistics.pairs_EE.tolist() == [[0, 0, 2, 0], [0, 0, 1, 1], [2, 1, 0, 0], [0, 1, 0, 0]]
    assert statistics.sets_NK.tolist() == [[0, 2], [0, 2], [1, 2], [1, 3]]


@pytest.mark.parametrize(("devices", "expected"), [(2, 1.995), (4, 3.659), (8, 5.433), (16, 6.751)])
def test_uniform_routing_costs_what_theory_says(devices: int, expected: float) -> None:
    """D · (1 − C(E − L, K) / C(E, K)) for 64 experts, 8 a token."""
    local = 64 // devices
    assert devices * (1 - math.comb(64 - local, 8) / math.comb(64, 8)) == pytest.approx(expected, abs=5e-4)
    sets_TK = clustered(20_000, 64, 8, 8, 0.0)
    mean, error = mean_and_error(groups_of_tokens(sets_TK, torch.arange(64) // local, devices))
    assert abs(mean - expected) < 4 * error + 5e-4


def test_too_few_tokens_for_an_error() -> None:
    assert mean_and_error(torch.tensor([3]))[0] == 3
    assert math.isnan(mean_and_error(torch.tensor([3]))[1])
    assert math.isnan(mean_and_error(torch.zeros(0))[0])


def test_rows_moved() -> None:
    assert rows_moved(2.0, 4) == 1.5
    assert rows_moved(1.0, 1) == 0
