"""Which experts should share a device: placements solved from a layer's statistics. Pure functions, no ranks.

E experts, D devices, L = E/D experts a device, K experts a token; `device_E[e]` is the device of expert e.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from occult_train.errors import PlacementError
from occult_train.moe.collaboration import LayerStatistics
from occult_train.moe.placement import Placement

METHODS = ("contiguous", "greedy")


@dataclass(frozen=True)
class Solution:
    """A placement and the load that it was held to."""

    placement: Placement
    load: float
    """Load of the fullest device over the mean."""
    limit: float
    """What `load` was held to: the bound that was asked for, or the least maximum where that cannot be met."""
    bound: float
    """What was asked for; infinite where the method knows no bound."""

    @property
    def bound_met(self) -> bool:
        """Whether the bound could be met."""
        return self.load <= self.bound


def solve(
    method: str,
    statistics: LayerStatistics,
    devices: int,
    *,
    load_bound: float = 1.1,
    nodes: int = 1,
    seed: int = 0,
) -> Placement:
    """The placement of `solution`, which says more."""
    return solution(method, statistics, devices, load_bound=load_bound, nodes=nodes, seed=seed).placement


def solution(
    method: str,
    statistics: LayerStatistics,
    devices: int,
    *,
    load_bound: float = 1.1,
    nodes: int = 1,
    seed: int = 0,
) -> Solution:
    """Place one layer's experts on devices, E/D on each.

    Args:
        method: one of METHODS. `contiguous` knows no bound.
        load_bound: load of the fullest device over the mean is at most this; where no placement can do that, the
            least maximum is the bound. Infinite: none.
        nodes: devices d·D/nodes to (d+1)·D/nodes − 1 are one node.
        seed: of what is random; the same seed gives the same placement.

    Raises:
        PlacementError: unknown method, devices that do not divide the experts, nodes that do not divide the devices.
    """
    experts = statistics.loads_E.numel()
    _check(method, experts, devices, nodes, load_bound)
    if method == "contiguous":
        return _solution(_contiguous(experts, devices), statistics.loads_E, devices, math.inf)
    return _solution(_greedy(statistics.pairs_EE, devices), statistics.loads_E, devices, math.inf)


def _check(method: str, experts: int, devices: int, nodes: int, load_bound: float) -> None:
    if method not in METHODS:
        raise PlacementError(f"method={method} is not one of {', '.join(METHODS)}")
    if devices < 1 or experts % devices:
        raise PlacementError(f"devices={devices} does not divide num_experts={experts}")
    if nodes < 1 or devices % nodes:
        raise PlacementError(f"nodes={nodes} does not divide devices={devices}")
    if not load_bound >= 1:
        raise PlacementError(f"load_bound={load_bound} is below 1, the load of perfect balance")


def _solution(device_E: Tensor, loads_E: Tensor, devices: int, bound: float) -> Solution:
    load = load_ratio(device_E, loads_E, devices)
    return Solution(to_placement(device_E), load, max(load, bound), bound)


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
    return float(loads_D.max() * devices / loads_D.sum().clamp(min=1)) if loads_D.sum() else 1.0


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
