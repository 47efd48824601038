"""Which experts should share a device: placements solved from a layer's statistics. Pure functions, no ranks.

E experts, D devices, L = E/D experts a device, K experts a token; `device_E[e]` is the device of expert e.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from occult_train.errors import PlacementError
from occult_train.moe.balance import balanced, device_loads
from occult_train.moe.collaboration import LayerStatistics
from occult_train.moe.partition import partition
from occult_train.moe.placement import Placement
from occult_train.moe.refine import Problem, State, improve, repair
from occult_train.moe.spread import Ints, Sets

METHODS = ("contiguous", "greedy", "hypergraph")
NODE_COST = 8.0
"""What reaching a further node costs, against a further device of a node reached already (which a device of a further
node is too): nine times as much in all, the time of a row at 50 GB/s over that at 450 GB/s."""


@dataclass(frozen=True)
class Solution:
    """A placement and the load that it was held to."""

    placement: Placement
    load: float
    """Load of the fullest device over the mean."""
    limit: float
    """What `load` was held to: the bound that was asked for or, where no placement meets it, the least maximum.
    Infinite where the method knows no bound."""
    bound: float
    """What was asked for; infinite where the method knows no bound."""

    @property
    def bound_met(self) -> bool:
        """Whether the bound could be met."""
        return self.limit <= self.bound


def solve(
    method: str,
    statistics: LayerStatistics,
    devices: int,
    *,
    load_bound: float = 1.1,
    nodes: int = 1,
    node_cost: float = NODE_COST,
    seed: int = 0,
) -> Placement:
    """The placement of `solution`, which says more."""
    chosen = solution(method, statistics, devices, load_bound=load_bound, nodes=nodes, node_cost=node_cost, seed=seed)
    return chosen.placement


def solution(
    method: str,
    statistics: LayerStatistics,
    devices: int,
    *,
    load_bound: float = 1.1,
    nodes: int = 1,
    node_cost: float = NODE_COST,
    seed: int = 0,
) -> Solution:
    """Place one layer's experts on devices, E/D on each.

    `contiguous` puts expert e in slot e and knows no bound. `greedy` is the paper's, then exchanges that bring the
    loads within the bound for the least C_T. `hypergraph` minimises the mean over tokens of |devices(t)| + node_cost ·
    |nodes(t)| (C_T, on one node): the results of a partitioner and of the other methods, brought within the bound and
    refined by exchanges; by the statistics' sample it is at most as expensive as they then are.

    Args:
        method: one of METHODS.
        load_bound: load of the fullest device over the mean is at most this; where no placement can do that, the
            least maximum is the bound. Infinite: none.
        nodes: devices d·D/nodes to (d+1)·D/nodes − 1 are one node. A copy reaches a node once where the dispatch is
            hierarchical; a flat one sends as much over the network whatever the placement, tokens being anywhere.
        seed: of what is random; the same seed gives the same placement.

    Raises:
        PlacementError: unknown method, devices that do not divide the experts, nodes that do not divide the devices,
            no sample of whole sets, no partitioner installed.
    """
    experts = statistics.loads_E.numel()
    _check(method, experts, devices, nodes, load_bound)
    if method == "contiguous":
        return _solution(_contiguous(experts, devices), statistics.loads_E, math.inf, math.inf, devices)
    greedy_E = _greedy(statistics.pairs_EE, devices).numpy()
    loads_E = statistics.loads_E.numpy().astype(np.float64)
    total = float(loads_E.sum())
    bound = load_bound * total / devices if total else math.inf
    within_E = balanced(loads_E, devices, bound)
    limit = max(bound, float(device_loads(within_E, loads_E, devices).max()))
    sets = Sets.of(statistics.sets_NK.numpy(), experts)
    problem = Problem(sets, loads_E, devices, nodes, node_cost, limit)
    start_E = _repaired(problem, greedy_E, within_E)
    if method == "hypergraph":
        start_E = _hypergraph(problem, start_E, within_E, seed)
    relative = max(load_bound, limit * devices / total) if total else load_bound
    return _solution(torch.from_numpy(start_E), statistics.loads_E, relative, load_bound, devices)


def _hypergraph(problem: Problem, greedy_E: Ints, within_E: Ints, seed: int) -> Ints:
    if problem.sets.total == 0:
        raise PlacementError("the statistics hold no sample of whole sets, which placement by hypergraph needs")
    if problem.devices in (1, problem.loads_E.size) and problem.nodes == 1:
        return greedy_E  # all placements are equal
    first_E = partition(problem.sets, problem.devices, problem.nodes, seed)
    contiguous_E = _contiguous(problem.loads_E.size, problem.devices).numpy()
    starts = [_repaired(problem, start_E, within_E) for start_E in (first_E, greedy_E, contiguous_E)]
    return improve(problem, starts, seed)


def _repaired(problem: Problem, device_E: Ints, within_E: Ints) -> Ints:
    """The placement after exchanges that bring its loads within the limit, else one that is within it."""
    if problem.excess(device_loads(device_E, problem.loads_E, problem.devices)) <= problem.slack:
        return device_E
    state = State(problem.sampled(), device_E)
    return state.device_E if repair(state) else within_E


def _check(method: str, experts: int, devices: int, nodes: int, load_bound: float) -> None:
    if method not in METHODS:
        raise PlacementError(f"method={method} is not one of {', '.join(METHODS)}")
    if devices < 1 or experts % devices:
        raise PlacementError(f"devices={devices} does not divide num_experts={experts}")
    if nodes < 1 or devices % nodes:
        raise PlacementError(f"nodes={nodes} does not divide devices={devices}")
    if not load_bound >= 1:
        raise PlacementError(f"load_bound={load_bound} is below 1, the load of perfect balance")


def given(placement: Placement, statistics: LayerStatistics, devices: int) -> Solution:
    """A placement of the user's own, with its load; no bound is asked of it.

    Raises:
        PlacementError: devices that do not divide the experts, or a placement of other experts.
    """
    experts = statistics.loads_E.numel()
    if len(placement.slot_to_expert) != experts:
        raise PlacementError(f"a placement of {len(placement.slot_to_expert)} experts, statistics of {experts}")
    _check("contiguous", experts, devices, 1, math.inf)
    return Solution(
        placement, load_ratio(device_of(placement, devices), statistics.loads_E, devices), math.inf, math.inf
    )


def _solution(device_E: Tensor, loads_E: Tensor, limit: float, bound: float, devices: int) -> Solution:
    return Solution(to_placement(device_E), load_ratio(device_E, loads_E, devices), limit, bound)


def to_placement(device_E: Tensor) -> Placement:
    """Slots for experts on devices [E]: in each device in ascending order of expert."""
    return Placement(tuple(torch.argsort(device_E, stable=True).tolist()))


def device_of(placement: Placement, devices: int) -> Tensor:
    """The device of each expert [E] int64."""
    experts = len(placement.slot_to_expert)
    return torch.tensor(placement.expert_to_slot) // (experts // devices)


def load_ratio(device_E: Tensor, loads_E: Tensor, devices: int) -> float:
    """Load of the fullest device over the mean; 1 where nothing was counted."""
    loads_D = torch.zeros(devices, dtype=torch.int64).index_add_(0, device_E, loads_E.to(torch.int64))
    total = int(loads_D.sum())
    return int(loads_D.max()) * devices / total if total else 1.0


def _contiguous(experts: int, devices: int) -> Tensor:
    return torch.arange(experts) // (experts // devices)


def _greedy(pairs_EE: Tensor, devices: int) -> Tensor:
    """The paper's algorithm, in the manner of farthest point sampling [E] int64.

    DECIDED where it is silent: seeds first; then in turn each device with room takes the unplaced expert of largest
    mean collaboration with its members; ties go to the lower id; with one expert a device the first seed is one expert.
    Sums stand for means, as in each comparison all are over equally many, so ties are exact.
    """
    experts = pairs_EE.shape[0]
    local = experts // devices
    device_E = torch.full((experts,), -1)
    device_E[_first_seed(pairs_EE)[: min(local, 2)]] = 0
    for device in range(1, devices):
        with_placed_E = pairs_EE[:, device_E >= 0].sum(1)
        device_E[_first(-with_placed_E, device_E < 0)] = device
    while bool((device_E < 0).any()):
        for device in range(devices):
            members_E = device_E == device
            if int(members_E.sum()) < local:
                device_E[_first(pairs_EE[:, members_E].sum(1), device_E < 0)] = device
    return device_E


def _first_seed(pairs_EE: Tensor) -> Tensor:
    """The pair that collaborates most [2], or the only expert [1]; the first pair in order of ids if several do."""
    experts = pairs_EE.shape[0]
    if experts == 1:
        return torch.tensor([0])
    one, other = torch.triu_indices(experts, experts, offset=1)
    best = int(pairs_EE[one, other].argmax())
    return torch.stack((one[best], other[best]))


def _first(score_E: Tensor, allowed_E: Tensor) -> int:
    """The allowed expert of highest score; of equals the lowest id."""
    ids = allowed_E.nonzero()[:, 0]
    return int(ids[score_E[ids].argmax()])
