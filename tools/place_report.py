"""What `occult place` says of placements: costs by method, and whether placement is worth it."""

import math
from dataclasses import dataclass
from statistics import fmean

from rich.table import Table
from torch import Tensor

from occult_train.moe.collaboration import LayerStatistics
from occult_train.moe.costs import Cost, cost, groups_of_tokens, mean_and_error, rows_moved
from occult_train.moe.placement import Placement
from occult_train.moe.solver import Solution, device_of, given, solution

MIN_GAIN = 0.02
"""A smaller share of C_T saved is not worth a placement: loading, and comparing runs, become harder for nothing."""
EXCHANGES = 4
"""Of rows in a training step: dispatch, combine, and both backward."""
UNBOUND = "greedy, no bound"


@dataclass(frozen=True)
class Wanted:
    """How to place."""

    method: str
    load_bound: float
    nodes: int
    node_cost: float
    seed: int
    own: dict[int, Placement] | None = None
    """The placements of method `file`."""


@dataclass(frozen=True)
class Step:
    """A training step: tokens over all ranks, model width, bytes of an activation."""

    tokens: int
    hidden: int
    itemsize: int


@dataclass(frozen=True)
class Compared:
    """One layer on one number of devices: the methods' solutions and costs by name; the chosen method comes last."""

    layer: int
    devices: int
    solutions: dict[str, Solution]
    costs: dict[str, Cost]
    held_out: dict[str, Cost]
    """Costs by the other statistics; empty without any."""
    saved: tuple[float, float]
    """Devices a token saved by the chosen method against the order of ids, and their standard error, as all tokens are
    the same; by the held-out statistics if there are any."""
    over_best: tuple[float, float]
    """What a token costs more than with the better of greedy (within the same bound) and contiguous, in devices; on
    several nodes, in devices and nodes at their cost."""

    @property
    def chosen(self) -> Solution:
        """Of the method that was asked for."""
        return list(self.solutions.values())[-1]


def compare(
    layer: int, statistics: LayerStatistics, held_out: LayerStatistics | None, devices: int, wanted: Wanted
) -> Compared:
    """Place one layer by every method and count what it costs."""
    solutions = _solutions(layer, statistics, devices, wanted)
    costs = {name: cost(statistics, s.placement, devices, wanted.nodes) for name, s in solutions.items()}
    judge = held_out or statistics
    others = {name: cost(judge, s.placement, devices, wanted.nodes) for name, s in solutions.items()}
    homes = {name: device_of(s.placement, devices) for name, s in solutions.items()}
    tokens = {name: groups_of_tokens(judge.sets_NK, device_E, devices) for name, device_E in homes.items()}
    saved = mean_and_error(tokens["contiguous"] - tokens[wanted.method])
    for name, device_E in homes.items() if wanted.nodes > 1 else ():
        nodes_N = groups_of_tokens(judge.sets_NK, device_E // (devices // wanted.nodes), wanted.nodes)
        tokens[name] = tokens[name] + wanted.node_cost * nodes_N
    rivals = [tokens[name] for name in ("contiguous", "greedy") if name in tokens]
    best_N: Tensor = min(rivals, key=lambda values: float(values.double().mean()))
    over = mean_and_error(tokens[wanted.method] - best_N)
    return Compared(layer, devices, solutions, costs, others if held_out else {}, saved, over)


def _solutions(layer: int, statistics: LayerStatistics, devices: int, wanted: Wanted) -> dict[str, Solution]:
    """By name, the chosen method last."""

    def by(method: str, bound: float) -> Solution:
        return solution(
            method,
            statistics,
            devices,
            load_bound=bound,
            nodes=wanted.nodes,
            node_cost=wanted.node_cost,
            seed=wanted.seed + layer,
        )

    found = {"contiguous": by("contiguous", math.inf), UNBOUND: by("greedy", math.inf)}
    if math.isfinite(wanted.load_bound):
        found["greedy"] = by("greedy", wanted.load_bound)
    else:
        found["greedy"] = found.pop(UNBOUND)
    if wanted.own is not None:
        found[wanted.method] = given(wanted.own[layer], statistics, devices)
    else:
        chosen = found.pop(wanted.method) if wanted.method in found else by(wanted.method, wanted.load_bound)
        found[wanted.method] = chosen
    return found


def device_table(results: list[Compared], wanted: Wanted, step: Step | None, held_out: bool) -> Table:
    """A row for each layer and method, and for all layers together."""
    devices = results[0].devices
    nodes = f" on {wanted.nodes} nodes" if wanted.nodes > 1 else ""
    title = f"D={devices} devices{nodes}; bound on load {wanted.load_bound:g} (largest over mean)"
    caption = "all: means over layers, but the largest load and the sum of what moves"
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    unit = "MB a step" if step else "rows a token"
    names = ["layer", "method", "C_T", *(["held out"] if held_out else []), *(["nodes"] if nodes else [])]
    for name in (*names, "intra", "load", unit):
        table.add_column(name, justify="left" if name == "method" else "right")
    for result in results:
        for name in result.solutions:
            _add_row(table, str(result.layer), name, [result], nodes != "", step)
        table.add_section()
    for name in results[0].solutions:
        _add_row(table, "all", name, results, nodes != "", step)
    return table


def _add_row(table: Table, layer: str, name: str, results: list[Compared], nodes: bool, step: Step | None) -> None:
    """Means over layers; load is the worst layer's, rows or bytes are sums."""
    costs, others = [r.costs[name] for r in results], [r.held_out[name] for r in results if r.held_out]
    cells = [f"{fmean(c.c_t for c in costs):.3f}"]
    if others:
        error = math.sqrt(sum(c.c_t_error**2 for c in others)) / len(others)
        cells.append(f"{fmean(c.c_t for c in others):.3f} ± {error:.3f}")
    if nodes:
        cells.append(f"{fmean(c.nodes for c in costs):.3f}")
    rows = EXCHANGES * sum(rows_moved(c.c_t, results[0].devices) for c in costs)
    moved = _megabytes(rows * step.tokens * step.hidden * step.itemsize) if step else f"{rows:.2f}"
    first = name == next(iter(results[0].solutions))
    intra = f"{fmean(c.intra_share for c in costs):.1%}"
    table.add_row(layer if first else "", name, *cells, intra, f"{max(c.load for c in costs):.2f}", moved)


def _megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.1f}" if nbytes >= 1e7 else f"{nbytes / 1e6:.3f}"


def sentences(results: list[Compared], wanted: Wanted, top_k: int) -> list[str]:
    """What came of it at each number of devices, and what could not be had."""
    lines = []
    for devices in dict.fromkeys(result.devices for result in results):
        lines += _verdict([result for result in results if result.devices == devices], wanted, top_k)
    for result in results:
        if not result.chosen.bound_met:
            lines.append(
                f"D={result.devices}, layer {result.layer}: no placement meets the load bound of "
                f"{wanted.load_bound:g}; it is held to the least maximum, {result.chosen.limit:.3f}"
            )
    return lines


def _verdict(results: list[Compared], wanted: Wanted, top_k: int) -> list[str]:
    devices, held_out = results[0].devices, bool(results[0].held_out)
    costs = [r.held_out or r.costs for r in results]
    before, after = (fmean(c[name].c_t for c in costs) for name in ("contiguous", wanted.method))
    saved = fmean(r.saved[0] for r in results)
    error = math.sqrt(sum(r.saved[1] ** 2 for r in results)) / len(results)
    words = f"{-saved / before:+.1%} ± {error / before:.2%}{', held out' if held_out else ''}"
    text = f"D={devices}: C_T {before:.3f} → {after:.3f} ({words})"
    if not (saved >= MIN_GAIN * before and saved > 2 * error):
        text += f": placement is not worth it, it saves less than {MIN_GAIN:.0%}"
        if devices <= top_k / 2:
            text += f" ({top_k} experts a token are on nearly all of {devices} devices anyway)"
    lines = [text]
    worse = ", ".join(str(r.layer) for r in results if r.over_best[0] > 2 * r.over_best[1])
    if worse:
        lines.append(f"D={devices}: over two standard errors above greedy or contiguous in layers {worse}")
    return lines
