"""Placing the experts anew while training, from the routing of the last steps."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from occult_train.config import Config
from occult_train.errors import CheckpointError
from occult_train.moe.collaboration import LayerStatistics, mean_devices
from occult_train.moe.collecting import DEFAULT_SAMPLE, RoutingCollector
from occult_train.moe.placement import Placement
from occult_train.moe.settling import settle
from occult_train.moe.solver import NODE_COST, device_of, load_ratio, solve
from occult_train.monitor import Monitor, Replacement
from occult_train.moving import move
from occult_train.parallel.grid import Grid


@dataclass(frozen=True)
class Proposal:
    """A layer's new placement, and what both placements make of the window's routing."""

    placement: Placement
    c_t: float
    c_t_expected: float
    """Under the new placement."""
    load_max_over_mean: float
    """Of devices."""
    load_expected: float
    nodes: float = 0.0
    """A token needs, where the dispatch sends it to each node once; else 0."""
    nodes_expected: float = 0.0

    def gains(self, share: float) -> bool:
        """Whether C_T would fall by at least this share; with nodes, what the solver minimises."""
        before, after = self.c_t + NODE_COST * self.nodes, self.c_t_expected + NODE_COST * self.nodes_expected
        return after < before and after <= (1 - share) * before

    def record(self) -> dict[str, float]:
        """Its numbers."""
        return {name: value for name, value in vars(self).items() if name != "placement"}


class Replacer:
    """Every `moe.replace.interval` steps it solves each layer's placement from the routing of the `window` steps before
    and moves the experts of those layers that gain by it.

    All ranks decide the same: counts are summed over ranks, each layer is solved by one rank, and its solution is
    shared. Checkpoints carry each rank's counts, so that a run resumed on as many ranks decides what it would have.
    On another number the counts are left aside, and a window that misses a step decides nothing.

    Args:
        engine: DeepSpeed's, around a GPT.
    """

    def __init__(self, config: Config, engine: Any, grid: Grid, monitor: Monitor) -> None:
        self.wanted, self.seed = config.moe.replace, config.train.seed
        self.last_step, self.engine, self.grid, self.monitor = config.train.steps, engine, grid, monitor
        self.layers = engine.module.moe_layers()
        self._collector: RoutingCollector | None = None
        self._counted = 0
        """Steps, in this window."""

    @contextmanager
    def counting(self, step: int) -> Iterator[None]:
        """Around the optimizer step after `step` of them: counts if it lies in a window."""
        interval = self.wanted.interval
        if interval and interval - step % interval <= self.wanted.window:
            self._collector = self._collector or self._new_collector()
            self._counted += 1
        with self._collector.counting() if self._collector is not None else nullcontext():
            yield

    def finish_step(self, step: int) -> None:
        """After `step` steps: place anew if it is time. Collective then."""
        if self._collector is None or step % self.wanted.interval:
            return
        collector, counted = self._collector, self._counted
        self._collector, self._counted = None, 0
        if counted < self.wanted.window:
            missed = f"moe.replace.window={self.wanted.window}, but only {counted} of its steps were counted"
            self.monitor.say(f"step {step}: experts stay: {missed}")
        elif step < self.last_step:
            self._replace(step, collector.gather({}).layers)

    def _new_collector(self) -> RoutingCollector:
        return RoutingCollector(self.layers, DEFAULT_SAMPLE, self.seed, self.engine.device)

    def _replace(self, step: int, statistics: dict[int, LayerStatistics]) -> None:
        started = time.perf_counter()
        proposals = self._propose(statistics)
        solved = time.perf_counter() - started
        chosen = {i: p.placement for i, p in proposals.items() if p.gains(self.wanted.min_gain)}
        moved = move(self.engine, chosen)
        self.monitor.replacement(
            Replacement(
                step=step,
                method=self.wanted.method,
                layers=[{"layer": i, "moved": i in chosen, **p.record()} for i, p in proposals.items()],
                experts_moved=moved.experts,
                bytes_moved=moved.nbytes,
                solve_seconds=solved,
                move_seconds=moved.seconds,
            )
        )

    def _propose(self, statistics: dict[int, LayerStatistics]) -> dict[int, Proposal]:
        """Of every layer, on all ranks. Collective; the layers are shared out over the ranks."""
        rank, ranks = self.grid.rank, self.grid.world_size
        own = {index: self._solve(index, statistics[index]) for index in list(statistics)[rank::ranks]}
        everyone: list[Any] = [None] * ranks
        dist.all_gather_object(everyone, own)
        found = {index: proposal for part in everyone for index, proposal in part.items()}
        return {index: found[index] for index in statistics}

    def _solve(self, index: int, statistics: LayerStatistics) -> Proposal:
        devices, layer, wanted = self.grid.expert_size, self.layers[index], self.wanted
        old = layer.placement
        # a flat dispatch sends as much over the network whatever the placement
        nodes = self.grid.nodes if layer.options.dispatcher == "hierarchical" else 1
        solved = solve(
            wanted.method, statistics, devices, load_bound=wanted.load_bound, nodes=nodes, seed=self.seed + index
        )
        new = settle(old, solved, devices, nodes)
        homes = [device_of(placement, devices) for placement in (old, new)]
        before, after = (mean_devices(statistics.sets_NK, device_E) for device_E in homes)
        loads = [load_ratio(device_E, statistics.loads_E, devices) for device_E in homes]
        needed = [mean_devices(statistics.sets_NK, e // (devices // nodes)) for e in homes] if nodes > 1 else []
        return Proposal(new, before, after, *loads, *needed)

    # ---------------------------------------------------------------- checkpoints

    def files(self) -> dict[str, bytes]:
        """What this rank has to carry over in a checkpoint."""
        if self._collector is None:
            return {}
        state = self._collector.state() | {"steps": torch.tensor([self._counted])}
        return {_file(self.grid.rank): safetensors.torch.save(state)}

    def resume(self, folder: Path, step: int) -> None:
        """Go on counting from a checkpoint's folder.

        Raises:
            CheckpointError: its counts are damaged.
        """
        interval, path = self.wanted.interval, folder / _file(self.grid.rank)
        if not interval or len(list(folder.glob("replace-*.safetensors"))) != self.grid.world_size:
            return
        try:
            state = safetensors.torch.load(path.read_bytes())
            counted = int(state["steps"])
            if counted == step % interval + self.wanted.window - interval:
                self._collector, self._counted = self._new_collector(), counted
                self._collector.load_state(state)
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"checkpoint {folder}: {path.name} is damaged ({error!r})") from None


def _file(rank: int) -> str:
    return f"replace-{rank:05d}.safetensors"
