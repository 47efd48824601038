"""The hierarchical dispatcher on real ranks of pretended nodes: one process's results, and one copy a node."""

from functools import cache

import pytest
import torch
from test_dispatch import CASES as FOUR_RANKS
from test_dispatch import HIDDEN, Case, Result, make_tokens, measure, reference, relative

from occult_train.moe.dispatch import make_dispatcher
from occult_train.parallel.grid import Grid
from occult_train.parallel.traffic import PASSES
from occult_train.testing import RankError, run_distributed

LAYOUTS = ((4, 4), (8, 8), (8, 4))
"""Ranks, and expert-parallel size; two ranks a node."""
PER_NODE = 2
SIZES = (7, 13, 101, 1, 3, 0, 17, 2)
CASES = {
    **{name: case for name, case in FOUR_RANKS.items() if name != "prime"},
    "prime": Case("prime", lambda rank, ranks: SIZES[rank], k=3),
    "all_to_one_node": Case("all_to_one_node", lambda rank, ranks: 6, k=3, allowed=lambda d, local: range(2 * local)),
    "more_experts_than_a_device_holds": Case("more", lambda rank, ranks: 9, local=2, k=5, permuted=True),
}

Results = dict[tuple[int, str], Result]


def measure_all(rank: int, ranks: int) -> Results:
    """By expert-parallel size and case."""
    results = {}
    for size in [size for count, size in LAYOUTS if count == ranks]:
        grid = Grid.create(size, PER_NODE)
        for name, case in CASES.items():
            results[size, name] = measure(case, "hierarchical", rank, ranks, grid)
    return results


@cache
def run(ranks: int) -> list[Results] | RankError:
    """`measure_all` of every rank; one start of the processes serves all tests, a failed one too."""
    try:
        return run_distributed(measure_all, ranks, ranks)
    except RankError as error:
        return error


def results(layout: tuple[int, int], case: str) -> list[Result]:
    """Of every rank."""
    found = run(layout[0])
    if isinstance(found, RankError):
        raise found
    return [of_rank[layout[1], case] for of_rank in found]


each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout[0]}ranks_ep{layout[1]}")
each_case = pytest.mark.parametrize("case", CASES)


@each_layout
@each_case
def test_result_and_gradients_are_those_of_one_process(
    layout: tuple[int, int], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FOUR_RANKS, case, CASES[case])  # where the reference finds it
    devices = layout[1]
    for rank, got in enumerate(results(layout, case)):
        group = tuple(range(rank - rank % devices, rank - rank % devices + devices))
        outputs, gradients, stacks = reference.__wrapped__(layout, case, group)
        place, local = rank % devices, CASES[case].local
        mine = CASES[case].expert_to_slot(devices).argsort()[place * local :][:local]
        expected = gradients[place] | {key: grad[mine] for key, grad in stacks.items()}
        # measured at most 6e-16
        assert relative(got.y_TH, outputs[place]) < 1e-14
        assert got.gradients.keys() == expected.keys()
        for key, grad in expected.items():
            assert relative(got.gradients[key], grad) < 1e-14, (rank, key)


def copies_between_nodes(layout: tuple[int, int], case: str, rank: int) -> int:
    """Sum over the rank's tokens of |nodes(t) minus home|."""
    ranks, devices = layout
    slots_TK = make_tokens(CASES[case], rank, ranks, devices).slots_TK.tolist()
    home, node_slots = rank % devices // PER_NODE, PER_NODE * CASES[case].local
    return sum(len({slot // node_slots for slot in slots} - {home}) for slots in slots_TK)


@each_layout
@each_case
def test_one_copy_a_node_travels_between_nodes(layout: tuple[int, int], case: str) -> None:
    """As counted, and as handed to the collectives: the first exchange of rows is the one between nodes."""
    found = results(layout, case)
    expected = [copies_between_nodes(layout, case, rank) for rank in range(layout[0])]
    for name in PASSES:
        assert sum(result.traffic.rows_between_nodes[name] for result in found) == sum(expected), name
    for rank, result in enumerate(found):
        assert result.traffic.rows_between_nodes["dispatch"] == expected[rank]
        assert result.traffic.rows_between_nodes["combine_backward"] == expected[rank]
        first, second = (
            [call.data for call in result.calls[name] if call.data.dtype == torch.float64 and call.data.dim() == 2][::2]
            for name in ("dispatch", "combine_backward")
        )
        assert first[0].shape == (expected[rank], HIDDEN)
        assert len(first) == 2
        assert len(second) == 1 or second[0].shape == (expected[rank], HIDDEN)


@each_layout
def test_fewer_rows_than_dedup_sends(layout: tuple[int, int]) -> None:
    """A row for each (token, node) where dedup has one for each (token, device)."""
    ranks, devices = layout
    for case in ("k_all", "more_experts_than_a_device_holds"):
        dedup = 0
        for rank in range(ranks):
            slots_TK = make_tokens(CASES[case], rank, ranks, devices).slots_TK.tolist()
            homes = {rank % devices // PER_NODE * PER_NODE + place for place in range(PER_NODE)}
            dedup += sum(len({slot // CASES[case].local for slot in slots} - homes) for slots in slots_TK)
        sent = sum(result.traffic.rows_between_nodes["dispatch"] for result in results(layout, case))
        assert sent < dedup
        assert case != "k_all" or 2 * sent == dedup


def grids(rank: int, counts: list[int]) -> tuple[int, int, bool]:
    """Nodes and ranks on one, where hosts have the given numbers of ranks."""
    grid = Grid.create(4, counts[rank])
    return grid.nodes, grid.node_size, grid.inside_group is not None


@pytest.mark.parametrize(
    "counts, expected",
    [
        ([2, 2, 2, 2], (2, 2, True)),
        ([1, 1, 1, 1], (4, 1, False)),
        ([4, 4, 4, 4], (1, 4, False)),
        ([3, 3, 3, 1], (1, 4, False)),
        ([0, 0, 0, 0], (1, 4, False)),
    ],
)
def test_nodes_are_told_apart_where_hosts_are_alike(counts: list[int], expected: tuple[int, int, bool]) -> None:
    assert run_distributed(grids, 4, counts) == [expected] * 4


def test_one_node_is_none() -> None:
    with pytest.raises(ValueError, match="needs several nodes of several ranks; expert_size=4 is on 1 of 4"):
        make_dispatcher("hierarchical", Grid(world_size=4, expert_size=4), 2)
