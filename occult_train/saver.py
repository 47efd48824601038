"""A run's checkpoints, written while it goes on."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from occult_train import config as configs
from occult_train.checkpoint.blocks import BLOCK_BYTES, Blocks
from occult_train.checkpoint.saving import Saving
from occult_train.checkpoint.state import begin_save
from occult_train.config import Config
from occult_train.monitor import Monitor
from occult_train.parallel.grid import Grid


class Saver:
    """Saves an engine, one checkpoint at a time, into memory that is used again.

    Args:
        config: of the run.
        engine: DeepSpeed's.
        monitor: is told what was saved, and what had to wait.
        root: folder of the run's checkpoints.
    """

    def __init__(self, config: Config, engine: Any, grid: Grid, monitor: Monitor, root: Path) -> None:
        self.config, self.engine, self.grid, self.monitor, self.root = config, engine, grid, monitor, root
        self._yaml, setting = configs.to_yaml(config), config.checkpoint
        self.blocks = Blocks(int(setting.buffer_gib * 2**30) if setting.background else 2 * BLOCK_BYTES)
        self._saving: Saving | None = None
        self._began = self._paused = 0.0
        self._said_bound = not setting.background

    def save(self, step: int, state: dict[str, Any], files: Mapping[str, bytes]) -> None:
        """Begin to save this moment; an earlier save is waited for. Collective. Arguments as of `begin_save`.

        Raises:
            CheckpointError: the earlier one or this one cannot be written.
        """
        self.finish(f"step {step}: ")
        self._began = time.perf_counter()
        setting = self.config.checkpoint
        given = (state, self._yaml, setting.keep, files, self.blocks, setting.background)
        self._saving = begin_save(self.engine, self.grid, self.root, step, *given)
        self._paused = time.perf_counter() - self._began
        if self._saving.copier.waited and not self._said_bound:
            self._said_bound = True
            self.monitor.say(
                f"step {step}: checkpoint.buffer_gib={setting.buffer_gib:g} holds less than the "
                f"{self._saving.nbytes / 2**30:.3g} GiB that a rank saves; training waited for the rest to be written"
            )
        if not setting.background:
            self.finish()

    def look(self) -> None:
        """Between steps: say that a checkpoint is complete, or raise CheckpointError if it cannot be."""
        if self._saving is None or not self._saving.done():
            return
        seconds = time.perf_counter() - self._began
        pause = f", beside training but for {self._paused:.1f} s" if self.config.checkpoint.background else ""
        self.monitor.say(f"step {self._saving.step}: saved {self._saving.folder} in {seconds:.1f} s{pause}")
        self._saving = None

    def finish(self, waits: str = "") -> None:
        """Wait for the checkpoint that is being written, if there is one.

        Args:
            waits: what a line begins with that says for how long training waited; empty for no line.
        """
        if self._saving is None:
            return
        began, waited = time.perf_counter(), not self._saving.done()
        self._saving.wait()
        if waits and waited:
            seconds = time.perf_counter() - began
            self.monitor.say(f"{waits}waited {seconds:.1f} s for the checkpoint of step {self._saving.step}")
        self.look()
