"""Simulated annealing, the yardstick of `occult place`: slow, simple, and sharing no code with the solver.

    python -m occult_train.tools.bench.anneal [STATISTICS] --devices 4 --minutes 10
    python -m occult_train.tools.bench.anneal [STATISTICS] --layer 3 --seeds "0 1"

Without a file: routing made up in clusters, 64 experts, 8 a token. U distinct choices, E experts, D devices.
"""

import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer

from occult_train.moe.collaboration import LayerStatistics
from occult_train.moe.costs import cost
from occult_train.moe.placement import Placement
from occult_train.moe.solver import solution
from occult_train.moe.statistics import RoutingStatistics
from occult_train.moe.synthetic import clustered, statistics_of

CHECK_EVERY = 200
"""Proposals between looks at the clock."""


@dataclass
class Annealed:
    """What a run found."""

    c_t: float
    """Infinite if no placement within the bound was met."""
    proposals: int


class Annealer:
    """Exchanges two random experts of different devices, by Metropolis' rule, while the temperature falls.

    Load above the bound is charged, at a price that rises from a fifth of a device a token to five.
    """

    def __init__(self, statistics: LayerStatistics, devices: int, load_bound: float, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        choices = Counter(map(tuple, statistics.sets_NK.tolist()))
        self.weight_U = np.array(list(choices.values()), dtype=float)
        members = np.array(list(choices))
        self.experts, self.devices = statistics.loads_E.numel(), devices
        self.load_E = statistics.loads_E.numpy() * (self.weight_U.sum() / max(statistics.tokens, 1))
        self.limit = load_bound * self.load_E.sum() / devices * (1 + 1e-12)
        self.rows = [np.flatnonzero((members == expert).any(1)) for expert in range(self.experts)]
        self.only: dict[tuple[int, int], npt.NDArray[np.int64]] = {}
        self.device_E = self._spread_out()
        self.counts_DU = np.zeros((devices, len(members)), dtype=np.int8)
        for expert in range(self.experts):
            self.counts_DU[self.device_E[expert], self.rows[expert]] += 1
        self.load_D = np.bincount(self.device_E, self.load_E, minlength=devices)

    def _spread_out(self) -> npt.NDArray[np.int64]:
        """Hottest first, there and back over the devices like a snake."""
        there = np.concatenate((np.arange(self.devices), np.arange(self.devices)[::-1]))
        device_E = np.zeros(self.experts, dtype=np.int64)
        device_E[np.argsort(-self.load_E)] = np.resize(there, self.experts)
        return device_E

    def only_in(self, a: int, b: int) -> npt.NDArray[np.int64]:
        """Choices with a and without b."""
        if (a, b) not in self.only:
            self.only[a, b] = np.setdiff1d(self.rows[a], self.rows[b], assume_unique=True)
        return self.only[a, b]

    def change(self, a: int, b: int) -> float:
        """Of the weighted number of devices, by exchanging a and b."""
        one, other, total = int(self.device_E[a]), int(self.device_E[b]), 0.0
        for expert, mate, source, target in ((a, b, one, other), (b, a, other, one)):
            rows = self.only_in(expert, mate)
            new = (self.counts_DU[target, rows] == 0).astype(float) - (self.counts_DU[source, rows] == 1)
            total += float(new @ self.weight_U[rows])
        return total

    def exchange(self, a: int, b: int) -> None:
        """Do it."""
        one, other = int(self.device_E[a]), int(self.device_E[b])
        for expert, mate, source, target in ((a, b, one, other), (b, a, other, one)):
            rows = self.only_in(expert, mate)
            self.counts_DU[source, rows] -= 1
            self.counts_DU[target, rows] += 1
        self.device_E[a], self.device_E[b] = other, one
        moved = self.load_E[a] - self.load_E[b]
        self.load_D[one] -= moved
        self.load_D[other] += moved

    def excess_change(self, a: int, b: int) -> float:
        """Of load above the bound."""
        one, other = self.load_D[self.device_E[a]], self.load_D[self.device_E[b]]
        moved = self.load_E[a] - self.load_E[b]
        over = [max(0.0, load - self.limit) for load in (one - moved, other + moved, one, other)]
        return over[0] + over[1] - over[2] - over[3]

    def pair(self) -> tuple[int, int]:
        """Two experts of different devices."""
        while True:
            a, b = (int(expert) for expert in self.random.integers(self.experts, size=2))
            if self.device_E[a] != self.device_E[b]:
                return a, b

    def run(self, seconds: float) -> Annealed:
        """Anneal for that long."""
        total = float(((self.counts_DU > 0).sum(0) * self.weight_U).sum())
        hot = float(np.std([self.change(*self.pair()) for _ in range(200)]))
        best, proposals, began = math.inf, 0, time.monotonic()
        while (passed := (time.monotonic() - began) / seconds) < 1:
            temperature, price = hot * 0.001**passed, 0.2 * 25**passed
            for _ in range(CHECK_EVERY):
                a, b = self.pair()
                change = self.change(a, b)
                charged = change + price * self.excess_change(a, b)
                proposals += 1
                if charged > 0 and self.random.random() >= math.exp(-charged / temperature):
                    continue
                self.exchange(a, b)
                total += change
                if total < best and self.load_D.max() <= self.limit:
                    best = total
        return Annealed(best / float(self.weight_U.sum()), proposals)


def main(
    statistics: Annotated[Path | None, typer.Argument(help="Routing statistics.")] = None,
    devices: Annotated[int, typer.Option(min=2)] = 4,
    minutes: Annotated[float, typer.Option(help="Of each annealing.")] = 10.0,
    load_bound: Annotated[float, typer.Option(min=1)] = 1.1,
    layer: Annotated[int | None, typer.Option(help="One layer alone.")] = None,
    seeds: Annotated[str, typer.Option(help="One annealing each; the best counts.")] = "0",
) -> None:
    """Print, for each layer, how much of the reduction that annealing finds the solver finds."""
    if statistics is None:
        layers = {0: statistics_of(clustered(20_000, 64, 8, 8, 2.5, skew=0.3), 64)}
    else:
        layers = RoutingStatistics.load(statistics).layers
    for index, found in layers.items():
        if layer is not None and index != layer:
            continue
        before = cost(found, Placement.contiguous(found.loads_E.numel()), devices).c_t
        began = time.monotonic()
        solved = solution("hypergraph", found, devices, load_bound=load_bound)
        took, after = time.monotonic() - began, cost(found, solved.placement, devices).c_t
        runs = [Annealer(found, devices, load_bound, int(seed)).run(60 * minutes) for seed in seeds.split()]
        best = min(run.c_t for run in runs)
        print(
            f"layer {index}, D={devices}: C_T {before:.4f}, hypergraph {after:.4f} in {took:.1f} s, annealing "
            f"{best:.4f} ({sum(run.proposals for run in runs):,} proposals): hypergraph reaches "
            f"{(before - after) / (before - best):.1%} of its reduction",
            flush=True,
        )


if __name__ == "__main__":
    typer.run(main)
