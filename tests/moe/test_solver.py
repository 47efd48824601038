"""Placements solved from statistics: by hand, against the optimum of small problems, and by what they must be."""

import itertools
import math
import sys
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from occult_train.errors import PlacementError
from occult_train.moe import partition
from occult_train.moe.collaboration import LayerStatistics
from occult_train.moe.placement import Placement
from occult_train.moe.solver import NODE_COST, device_of, solution, solve
from occult_train.moe.synthetic import clustered, statistics_of

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


# --- the reference: every placement there is, costs in plain loops


def all_placements(experts: list[int], local: int) -> Iterator[list[list[int]]]:
    """Every way to put experts on devices of `local` each, the order of devices aside."""
    if not experts:
        yield []
        return
    first, *others = experts
    for mates in itertools.combinations(others, local - 1):
        left = [e for e in others if e not in mates]
        for devices in all_placements(left, local):
            yield [[first, *mates], *devices]


def slow_cost(devices: list[list[int]], sets: list[list[int]], nodes: int = 1, node_cost: float = 0.0) -> float:
    """Mean over tokens of |devices(t)| + node_cost · |nodes(t)|."""
    place = {expert: device for device, members in enumerate(devices) for expert in members}
    total = 0.0
    for chosen in sets:
        used = {place[expert] for expert in chosen}
        total += len(used) + node_cost * len({device * nodes // len(devices) for device in used})
    return total / len(sets)


def slow_load(devices: list[list[int]], sets: list[list[int]]) -> float:
    """Load of the fullest device over the mean."""
    counts = [sum(expert in members for chosen in sets for expert in chosen) for members in devices]
    return max(counts) * len(devices) / sum(counts)


def c_t(placement: Placement, sets_TK: Tensor, devices: int) -> float:
    return slow_cost(placement.by_device(devices), sets_TK.tolist())


def random_sets(tokens: int, experts: int, top_k: int, seed: int) -> Tensor:
    """Two clusters and popularity, weakly."""
    return clustered(tokens, experts, top_k, 2, 1.0, skew=0.7, seed=seed)


@pytest.mark.parametrize(
    ("experts", "devices", "top_k"), [(8, 2, 2), (8, 4, 3), (9, 3, 4), (10, 5, 3), (12, 3, 2), (12, 4, 4)]
)
@pytest.mark.parametrize("bound", [math.inf, 1.1])
def test_within_one_percent_of_the_optimum(experts: int, devices: int, top_k: int, bound: float) -> None:
    sets_TK = random_sets(60, experts, top_k, seed=experts * devices)
    sets = sets_TK.tolist()
    found = solution("hypergraph", statistics_of(sets_TK, experts), devices, load_bound=bound)
    every = [(slow_load(p, sets), slow_cost(p, sets)) for p in all_placements(list(range(experts)), experts // devices)]
    least = min(load for load, _ in every)
    assert found.limit == pytest.approx(max(bound, least), rel=1e-3)
    optimum = min(cost for load, cost in every if load <= found.limit + 1e-9)
    got = c_t(found.placement, sets_TK, devices)
    assert optimum - 1e-9 <= got <= 1.01 * optimum
    assert found.load == pytest.approx(slow_load(found.placement.by_device(devices), sets))
    assert found.load <= found.limit + 1e-9


def test_optimum_on_nodes() -> None:
    sets_TK = random_sets(60, 8, 3, seed=5)
    found = solve("hypergraph", statistics_of(sets_TK, 8), 4, load_bound=math.inf, nodes=2)
    costs = [
        slow_cost([devices[i] for i in order], sets_TK.tolist(), 2, NODE_COST)
        for devices in all_placements(list(range(8)), 2)
        for order in ((0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2))
    ]
    got = slow_cost(found.by_device(4), sets_TK.tolist(), 2, NODE_COST)
    assert min(costs) - 1e-9 <= got <= 1.01 * min(costs)


def test_nodes_come_first_when_they_cost_more() -> None:
    """Clusters of eight experts: each belongs on one node of two devices, to which devices alone are indifferent."""
    sets_TK = clustered(4000, 32, 6, 4, 20.0, seed=3)
    placed = solve("hypergraph", statistics_of(sets_TK, 32), 8, nodes=4)
    nodes = device_of(placed, 8) // 2
    assert all(len(set(nodes[row].tolist())) == 1 for row in sets_TK)


# --- structure


def test_planted_partition_is_recovered() -> None:
    sets_TK = clustered(5000, 32, 4, 4, 20.0, seed=1)
    placed = solve("hypergraph", statistics_of(sets_TK, 32), 4)
    assert c_t(placed, sets_TK, 4) == 1.0


def test_planted_partition_is_recovered_from_noise() -> None:
    sets_TK = clustered(5000, 32, 4, 4, 2.0, seed=1)
    planted = device_of(solve("hypergraph", statistics_of(clustered(5000, 32, 4, 4, 20.0, seed=1), 32), 4), 4)
    placed = device_of(solve("hypergraph", statistics_of(sets_TK, 32), 4), 4)
    assert torch.equal(placed[:, None] == placed, planted[:, None] == planted)


def test_olmoe_like_structure_is_used() -> None:
    """64 experts, top-8, C_T of 3.66 on four devices in the order of ids; the paper's model has 3.68 and saves 18 %."""
    sets_TK = clustered(10_000, 64, 8, 8, 2.5, skew=0.3, seed=0)
    statistics = statistics_of(sets_TK, 64)
    before = c_t(Placement.contiguous(64), sets_TK, 4)
    assert before == pytest.approx(3.66, abs=0.02)
    found = solution("hypergraph", statistics, 4)
    assert found.load <= 1.1
    after, greedy = (c_t(p, sets_TK, 4) for p in (found.placement, solve("greedy", statistics, 4)))
    assert after <= 0.85 * before
    assert after <= greedy


def test_held_out_tokens_gain_too() -> None:
    sets_TK = clustered(12_000, 64, 8, 16, 3.0, skew=0.3, seed=4)
    seen_TK, unseen_TK = sets_TK[:6_000], sets_TK[6_000:]
    placed = {m: solve(m, statistics_of(seen_TK, 64), 4) for m in ("contiguous", "greedy", "hypergraph")}
    got = {m: c_t(p, unseen_TK, 4) for m, p in placed.items()}
    assert got["hypergraph"] < min(got["greedy"], got["contiguous"])


@pytest.mark.parametrize("seed", range(3))
def test_never_worse_than_the_other_methods(seed: int) -> None:
    """Where experts lie in the right order already, and the bound holds for all."""
    sets_TK = clustered(1000, 16, 3, 4, 20.0, seed=seed)
    order_E = device_of(solve("hypergraph", statistics_of(sets_TK, 16), 4), 4).argsort(stable=True).argsort()
    noise_TK = clustered(1000, 16, 3, 4, 0.0, seed=seed)
    sets_TK = torch.cat((order_E[sets_TK], noise_TK))  # clusters of consecutive ids
    statistics = statistics_of(sets_TK, 16)
    costs = [c_t(solve(m, statistics, 4, load_bound=1.2), sets_TK, 4) for m in ("hypergraph", "contiguous", "greedy")]
    assert costs[0] <= min(costs[1:])


def test_no_token_was_counted() -> None:
    nothing = statistics_of(torch.zeros(0, 2, dtype=torch.int64), 4)
    for bound in (1.1, math.inf):
        assert solution("greedy", nothing, 2, load_bound=bound).bound_met


# --- loads


def hot(experts: int, share: int) -> LayerStatistics:
    """Tokens of two experts, expert 0 in `share` times as many as any other."""
    cold = range(1, experts)
    sets = [[0, e] for e in cold] * share + [[e, e % (experts - 1) + 1] for e in cold]
    return statistics_of(torch.tensor(sets), experts)


@pytest.mark.parametrize("method", ["greedy", "hypergraph"])
def test_a_hot_expert_leaves_the_least_maximum(method: str) -> None:
    statistics = hot(8, 5)
    loads = sorted(statistics.loads_E.tolist())
    least = (loads[-1] + loads[0]) * 4 / sum(loads)
    found = solution(method, statistics, 4)
    assert least > 1.1
    assert found.limit == pytest.approx(least)
    assert found.load == pytest.approx(least)
    assert not found.bound_met
    assert solution(method, statistics, 4, load_bound=3.0).bound_met


def test_the_bound_costs_devices_and_holds() -> None:
    sets_TK = clustered(5000, 32, 4, 4, 3.0, skew=1.0, seed=2)
    statistics = statistics_of(sets_TK, 32)
    free, tight = (solution("hypergraph", statistics, 4, load_bound=b) for b in (math.inf, 1.02))
    assert free.load > 1.1
    assert tight.load <= 1.02
    assert c_t(free.placement, sets_TK, 4) < c_t(tight.placement, sets_TK, 4)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, int, int, int]:
    """Sets [T, K] of tokens, experts, devices, nodes."""
    nodes, per_node, local = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    experts = nodes * per_node * local
    top_k = draw(st.integers(1, min(experts, 5)))
    token = st.permutations(range(experts)).map(lambda order: order[:top_k])
    return torch.tensor(draw(st.lists(token, min_size=1, max_size=30))), experts, nodes * per_node, nodes


@settings(max_examples=40, deadline=None)
@given(problems(), st.sampled_from(["contiguous", "greedy", "hypergraph"]), st.sampled_from([1.0, 1.1, 2.0, math.inf]))
def test_always_a_placement_within_its_limit(problem: tuple[Tensor, int, int, int], method: str, bound: float) -> None:
    sets_TK, experts, devices, nodes = problem
    found = solution(method, statistics_of(sets_TK, experts), devices, load_bound=bound, nodes=nodes)
    assert sorted(found.placement.slot_to_expert) == list(range(experts))
    by_device = found.placement.by_device(devices)
    assert [len(members) for members in by_device] == [experts // devices] * devices
    assert all(members == sorted(members) for members in by_device)
    assert found.load == pytest.approx(slow_load(by_device, sets_TK.tolist()))
    assert found.load <= found.limit * (1 + 1e-9)
    assert found.limit == bound or found.limit >= bound or method == "contiguous"


# --- the rest


def test_the_same_seed_gives_the_same_placement() -> None:
    statistics = statistics_of(clustered(500, 16, 4, 8, 1.5, seed=7), 16)
    first = solve("hypergraph", statistics, 4, seed=3)
    solve("hypergraph", statistics, 8, seed=1)
    assert solve("hypergraph", statistics, 4, seed=3) == first


def test_without_the_partitioner(monkeypatch: pytest.MonkeyPatch) -> None:
    partition._initialized.cache_clear()
    monkeypatch.setitem(sys.modules, "mtkahypar", None)
    statistics = statistics_of(random_sets(50, 8, 2, 0), 8)
    with pytest.raises(PlacementError, match="needs the package mtkahypar"):
        solve("hypergraph", statistics, 2)
    solve("greedy", statistics, 2)


def test_without_whole_sets() -> None:
    with pytest.raises(PlacementError, match="no sample of whole sets"):
        solve("hypergraph", with_pairs(symmetric(UPPER, 6)), 2)


@pytest.mark.slow
def test_256_experts_a_million_sets_32_devices_in_a_minute_of_one_core() -> None:
    sets_TK = clustered(1_000_000, 256, 8, 32, 3.0, skew=0.3)
    statistics = statistics_of(sets_TK, 256)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        before = time.process_time()
        found = solution("hypergraph", statistics, 32)
        seconds = time.process_time() - before  # of all threads: other programs do not count
    finally:
        torch.set_num_threads(threads)
    assert seconds <= 60
    assert found.load <= 1.1
