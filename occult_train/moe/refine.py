"""Exchanges of experts that lower the cost of a placement while its sizes stay exact and its loads within a limit.

E experts, D devices, N nodes; `device_E[e]` is the device of expert e, which lies on node d // (D/N).
"""

from dataclasses import dataclass, replace

import numpy as np

from occult_train.moe.balance import device_loads
from occult_train.moe.spread import Floats, Ints, Sets, Spread, touched

ROUNDS, STEPS, KICKS, SCATTERED = 10, 500, 6, 2
"""Of tabu search, of exchanges in each (at most; eight an expert), of random exchanges before one, and of rounds that
begin anywhere: where loads bind, the good placements lie in several valleys."""
SAMPLE = 50_000
"""Distinct sets that rounds go by."""
LAST_PINS = 2e8
"""Members of sets that the last round, by all of them, may recount: about ten seconds."""


@dataclass(frozen=True)
class Problem:
    """What is minimised: Σ weight · (|devices(t)| + node_cost · |nodes(t)|), with device loads at most `limit`."""

    sets: Sets
    loads_E: Floats
    devices: int
    nodes: int
    node_cost: float
    limit: float
    """Load of the fullest device, in the unit of loads_E."""

    @property
    def slack(self) -> float:
        """Excess that is rounding."""
        return 1e-9 * self.limit if np.isfinite(self.limit) else 0.0

    def sampled(self) -> "Problem":
        """The same by at most SAMPLE of the sets, always the same ones."""
        return replace(self, sets=self.sets.sample(SAMPLE, np.random.default_rng(0)))

    def cost(self, device_E: Ints) -> float:
        """The objective, loads aside."""
        nodes = touched(self.sets, device_E // (self.devices // self.nodes), self.nodes) if self.nodes > 1 else 0.0
        return touched(self.sets, device_E, self.devices) + self.node_cost * nodes

    def excess(self, loads_D: Floats) -> float:
        """Load above the limit, summed over devices."""
        return float(np.maximum(loads_D - self.limit, 0.0).sum())


class State:
    """A placement under exchange."""

    def __init__(self, problem: Problem, device_E: Ints) -> None:
        self.problem = problem
        self.by_device = Spread(problem.sets, device_E, problem.devices)
        self._per_node = problem.devices // problem.nodes
        self.by_node = None
        if problem.nodes > 1:
            self.by_node = Spread(problem.sets, device_E // self._per_node, problem.nodes)
        self.loads_D = device_loads(device_E, problem.loads_E, problem.devices)

    @property
    def device_E(self) -> Ints:
        """Where experts are now."""
        return self.by_device.group_E

    @property
    def cost(self) -> float:
        """The objective, loads aside."""
        nodes = self.by_node.cost if self.by_node else 0.0
        return self.by_device.cost + self.problem.node_cost * nodes

    @property
    def excess(self) -> float:
        """Load above the limit."""
        return self.problem.excess(self.loads_D)

    def cost_changes(self) -> Floats:
        """By exchanging each two experts [E, E]."""
        change_EE = self.by_device.changes()
        if self.by_node:
            change_EE += self.problem.node_cost * self.by_node.changes()
        return change_EE

    def excess_changes(self) -> Floats:
        """Of the load above the limit, by exchanging each two experts [E, E]."""
        loads_E, limit, device_E = self.problem.loads_E, self.problem.limit, self.device_E
        load_E = self.loads_D[device_E]
        gained_EE = loads_E[None, :] - loads_E[:, None]  # by e's device, when f comes for e
        over_EE = np.maximum(load_E[:, None] + gained_EE - limit, 0.0) - np.maximum(load_E - limit, 0.0)[:, None]
        return over_EE + over_EE.T

    def exchange(self, a: int, b: int) -> None:
        """Exchange two experts of different devices."""
        device_a, device_b = int(self.device_E[a]), int(self.device_E[b])
        moved = self.problem.loads_E[a] - self.problem.loads_E[b]
        self.loads_D[device_a] -= moved
        self.loads_D[device_b] += moved
        if self.by_node and device_a // self._per_node != device_b // self._per_node:
            self.by_node.exchange(a, b)
        self.by_device.exchange(a, b)


def repair(state: State) -> bool:
    """Exchange until no device is above the limit, each time what costs least for the excess it takes away.

    Returns:
        Whether that was possible; if not, no exchange lowers the excess further.
    """
    slack = state.problem.slack
    while state.excess > slack:
        removed_EE = -state.excess_changes()
        removed_EE[state.device_E[:, None] == state.device_E[None, :]] = 0.0
        if removed_EE.max() <= slack:
            return False
        price_EE = np.full_like(removed_EE, np.inf)
        useful_EE = removed_EE > slack
        price_EE[useful_EE] = state.cost_changes()[useful_EE] / removed_EE[useful_EE]
        state.exchange(*_least(price_EE))
    return True


def improve(problem: Problem, starts: list[Ints], seed: int) -> Ints:
    """The cheapest placement within the load limit that rounds of tabu search find [E].

    The first rounds go out from the starts and from random placements, the others from the best so far after some
    exchanges at random. Where there are many sets, rounds go by a sample and a last one by all of them.

    Args:
        starts: placements [E] within the limit; the result is at most as expensive as any.
    """
    random = np.random.default_rng(seed)
    sample = problem.sampled()
    steps = min(STEPS, 8 * problem.loads_E.size)
    scattered = [random.permutation(starts[0]) for _ in range(SCATTERED)]
    first = [*starts, *scattered]
    best_E, best = starts[0], np.inf
    for number in range(max(ROUNDS, len(first))):
        start_E = first[number] if number < len(first) else _kicked(best_E, random)
        found_E, cost = search(State(sample, start_E), steps, random)
        if cost < best:
            best_E, best = found_E, cost
    cheapest_E = min((best_E, *starts), key=problem.cost)
    if sample.sets is problem.sets:
        return cheapest_E
    return search(State(problem, cheapest_E), min(steps, int(LAST_PINS / problem.sets.pins_moved)), random)[0]


def _kicked(device_E: Ints, random: np.random.Generator) -> Ints:
    kicked_E = device_E.copy()
    for _ in range(KICKS):
        a, b = random.integers(device_E.size, size=2)
        kicked_E[a], kicked_E[b] = kicked_E[b], kicked_E[a]
    return kicked_E


def search(state: State, steps: int, random: np.random.Generator) -> tuple[Ints, float]:
    """Tabu search: always make the best exchange, also where it raises the cost, but none that brings an expert back
    to a device that it left lately. The limit on loads may be passed for a while at a price that rises until loads
    are within it and falls while they are.

    Returns:
        The cheapest placement met with loads within the limit [E], and its cost; the first and infinity if none was.
    """
    experts, devices = state.problem.loads_E.size, state.problem.devices
    free_at_ED = np.zeros((experts, devices), dtype=np.int64)
    price = least_price = 0.01 * state.cost / max(float(state.problem.loads_E.sum()), 1.0)
    within = state.excess <= state.problem.slack
    best_E, best = state.device_E.copy(), state.cost if within else np.inf
    for step in range(steps):
        tabu_EE = (free_at_ED > step)[:, state.device_E]
        held_EE = tabu_EE | tabu_EE.T | (state.device_E[:, None] == state.device_E[None, :])
        change_EE = state.cost_changes() + price * state.excess_changes()
        a, b = _least(np.where(held_EE, np.inf, change_EE))
        if held_EE[a, b]:
            continue
        free_at_ED[[a, b], state.device_E[[a, b]]] = step + 1 + random.integers(2, experts // 8 + 3, 2)
        state.exchange(a, b)
        within = state.excess <= state.problem.slack
        price = max(0.9 * price, least_price) if within else 1.2 * price
        if within and state.cost < best:
            best_E, best = state.device_E.copy(), state.cost
    return best_E, best


def _least(values_EE: Floats) -> tuple[int, int]:
    a, b = np.unravel_index(values_EE.argmin(), values_EE.shape)
    return int(a), int(b)
