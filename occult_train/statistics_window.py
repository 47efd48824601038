"""Routing statistics of a window of training steps, written into the run's folder when it closes."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from occult_train.config import Config
from occult_train.moe.collecting import RoutingCollector
from occult_train.moe.layer import MoELayer
from occult_train.moe.statistics import FILE_NAME, RoutingStatistics, merge
from occult_train.monitor import Monitor


class StatisticsWindow:
    """Counts the routing of the optimizer steps that `moe.statistics` names, and of nothing else.

    While it is open, checkpoints carry what was counted so far, so that a resumed run counts each token once, whatever
    its number of ranks. A run that starts inside of the window from a checkpoint without such a part counts the rest.

    Args:
        config: of the run.
        layers: with experts, by index.
        device: of the layers.
        monitor: is told when the window closes.
    """

    def __init__(self, config: Config, layers: dict[int, MoELayer], device: torch.device, monitor: Monitor) -> None:
        self.wanted, self.seed, self.output = config.moe.statistics, config.train.seed, config.output
        self.layers, self.device, self.monitor = layers, device, monitor
        self.start, self.end = self.wanted.start, self.wanted.start + self.wanted.steps
        self._collector: RoutingCollector | None = None
        self._earlier: RoutingStatistics | None = None
        """Counted before this process began."""

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint's folder.

        Raises:
            StatisticsError: its statistics are damaged.
        """
        path = folder / FILE_NAME
        if path.exists():
            found = RoutingStatistics.load(path)
            if found.provenance.get("window") == [self.start, self.end]:
                self._earlier = found

    @contextmanager
    def counting(self, step: int) -> Iterator[None]:
        """Around the optimizer step after `step` of them: counts if it lies in the window."""
        if self.start <= step < self.end and self._collector is None:
            self._collector = RoutingCollector(self.layers, self.wanted.sample, self.seed, self.device)
        with self._collector.counting() if self._collector is not None else nullcontext():
            yield

    def finish_step(self, step: int) -> None:
        """After `step` steps: at the window's end write the file and forget. Collective then."""
        if step >= self.end and self._collector is not None:
            self.close(step)
            self._collector = self._earlier = None

    def close(self, step: int) -> None:
        """Write what was counted so far, if anything. Collective."""
        statistics = self._gather()
        if statistics is None:
            return
        path = Path(self.output) / FILE_NAME
        if self.monitor.main:
            statistics.save(path)
        self.monitor.collaboration(step, statistics)
        self.monitor.say(f"step {step}: routing statistics of {statistics.tokens:,} tokens are in {path}")

    def files(self) -> dict[str, bytes]:
        """What a checkpoint has to carry. Collective."""
        statistics = self._gather()
        return {} if statistics is None or not self.monitor.main else {FILE_NAME: statistics.to_bytes()}

    def _gather(self) -> RoutingStatistics | None:
        """Everything counted in the window, of all ranks; None if nothing is being counted."""
        if self._collector is None:
            return self._earlier
        provenance = {"source": "training", "run": self.output, "window": [self.start, self.end]}
        found = self._collector.gather(provenance)
        if self._earlier is not None:
            found = merge([self._earlier, found], self.wanted.sample, self.seed)
        return replace(found, provenance=provenance)
