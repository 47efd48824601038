"""`occult_train.train` in which a rank meets with something at a step, as `fault.json` of the run's folder says."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from occult_train.config import Config
from occult_train.train import main


def kill(trainer: Any) -> None:
    """As the kernel does when memory is out."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop(trainer: Any) -> None:
    """All threads stand still."""
    os.kill(os.getpid(), signal.SIGSTOP)


def fail(trainer: Any) -> None:
    """An error in our own code."""
    raise ValueError("expert 5 is on fire")


def memory(trainer: Any) -> None:
    """More than any machine has."""
    bytearray(1 << 62)


def nan(trainer: Any) -> None:
    """Weights that are no numbers any more."""
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))


def dawdle(trainer: Any) -> None:
    """Alive, but not getting anywhere."""
    time.sleep(600)


def carry_on(trainer: Any) -> None:
    """Nothing; what happens then is done from outside."""


FAULTS = {f.__name__: f for f in (kill, stop, fail, memory, nan, dawdle, carry_on)}


def run(config: Config) -> int:
    """Train; the fault happens once, also if the run is started again."""
    from occult_train import trainer

    output = Path(config.output)
    told = output / "fault.json"
    fault = json.loads(told.read_text()) if told.exists() else {"rank": -1}

    class Faulty(trainer.Trainer):
        def _train_step(self, batches: Any) -> None:
            if self.grid.rank == fault["rank"] and self.step == fault["step"]:
                told.unlink(missing_ok=True)
                (output / "reached").touch()
                FAULTS[fault["kind"]](self)
            if "pause" in fault:
                time.sleep(fault["pause"])
            super()._train_step(batches)

    Faulty(config).train()
    return 0


if __name__ == "__main__":
    sys.exit(main(run=run))
