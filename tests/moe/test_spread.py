"""The cost of a placement and of every exchange, against plain loops."""

import numpy as np
import pytest

from occult_train.moe.balance import balanced, device_loads, lower_bound
from occult_train.moe.refine import Problem, State, repair
from occult_train.moe.spread import Sets, Spread, distinct, touched


def random_sets(rows: int, experts: int, top_k: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.sort(np.stack([random.choice(experts, top_k, replace=False) for _ in range(rows)]), axis=1)


def slow_cost(sets_NK: np.ndarray, group_E: np.ndarray) -> int:
    return sum(len({group_E[e] for e in row}) for row in sets_NK.tolist())


def test_distinct_sets_by_hand() -> None:
    members, weights = distinct(np.array([[0, 300], [1, 2], [0, 300], [0, 5]]))
    assert members.tolist() == [[0, 5], [0, 300], [1, 2]]
    assert weights.tolist() == [1, 2, 1]


def test_no_sets() -> None:
    spread = Spread(Sets.of(np.zeros((0, 2), np.int16), 4), np.array([0, 0, 1, 1]), 2)
    assert spread.cost == 0
    assert not spread.changes().any()


@pytest.mark.parametrize(("experts", "groups", "top_k"), [(6, 2, 2), (12, 4, 3), (12, 3, 1), (12, 12, 5)])
def test_every_exchange_costs_what_it_says(experts: int, groups: int, top_k: int) -> None:
    sets_NK = random_sets(80, experts, top_k, seed=experts)
    group_E = np.random.default_rng(1).permutation(experts) % groups
    spread = Spread(Sets.of(sets_NK, experts), group_E, groups)
    assert spread.cost == touched(spread.sets, group_E, groups) == slow_cost(sets_NK, group_E)
    changes = spread.changes()
    for a in range(experts):
        for b in range(experts):
            other = group_E.copy()
            other[a], other[b] = group_E[b], group_E[a]
            assert changes[a, b] == slow_cost(sets_NK, other) - spread.cost


def test_tables_after_many_exchanges_are_those_of_a_fresh_start() -> None:
    sets = Sets.of(random_sets(300, 12, 4, seed=0), 12)
    spread, random = Spread(sets, np.arange(12) // 3, 4), np.random.default_rng(2)
    for _ in range(200):
        a, b = random.integers(12, size=2)
        if spread.group_E[a] != spread.group_E[b]:
            spread.exchange(int(a), int(b))
    fresh = Spread(sets, spread.group_E, 4)
    assert spread.cost == fresh.cost
    for name in ("counts_UG", "zero_EG", "alone_EE"):
        np.testing.assert_array_equal(getattr(spread, name), getattr(fresh, name), err_msg=name)


def problem(limit: float, nodes: int = 1) -> Problem:
    sets_NK = random_sets(200, 12, 3, seed=3)
    loads_E = np.bincount(sets_NK.ravel(), minlength=12).astype(float)
    return Problem(Sets.of(sets_NK, 12), loads_E, 4, nodes, 8.0, limit * loads_E.sum() / 4)


def test_state_counts_nodes_and_excess() -> None:
    asked = problem(1.0, nodes=2)
    state = State(asked, np.arange(12) // 3)
    costs, excesses = state.cost_changes(), state.excess_changes()
    for a, b in ((0, 3), (0, 6), (5, 11), (2, 9), (1, 2)):
        other_E = np.arange(12) // 3
        other_E[a], other_E[b] = other_E[b], other_E[a]
        other = State(asked, other_E)
        assert costs[a, b] == other.cost - state.cost
        if a // 3 != b // 3:
            assert excesses[a, b] == pytest.approx(other.excess - state.excess)
    state.exchange(0, 6)
    state.exchange(4, 1)
    fresh = State(asked, state.device_E)
    assert state.cost == fresh.cost == asked.cost(state.device_E)
    np.testing.assert_allclose(state.loads_D, fresh.loads_D)


def test_repair_brings_loads_within_the_limit() -> None:
    asked = problem(1.02)
    start = np.argsort(np.argsort(-asked.loads_E, kind="stable")) // 3  # the hottest together
    state = State(asked, start)
    assert state.excess > 0
    assert repair(state)
    assert device_loads(state.device_E, asked.loads_E, 4).max() <= asked.limit * (1 + 1e-9)
    assert np.bincount(state.device_E).tolist() == [3, 3, 3, 3]


def test_balanced_loads_by_hand() -> None:
    loads_E = np.array([10.0, 1, 2, 3, 4, 5])
    device_E = balanced(loads_E, 3)
    assert device_loads(device_E, loads_E, 3).max() == lower_bound(loads_E, 3) == 11
    assert device_E[0] == device_E[1]
    assert np.bincount(device_E).tolist() == [2, 2, 2]
