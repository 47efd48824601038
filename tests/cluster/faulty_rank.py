"""`occult_train.train` in which a rank meets with something at a step, as `fault.json` of the run's folder says."""

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

from occult_train.checkpoint.shards import ShardWriter
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
    *_, parameter = trainer.model.parameters()  # of the head, all of which every token meets
    with torch.no_grad():
        for values in (parameter, getattr(parameter, "ds_tensor", parameter)):  # ZeRO-3 keeps this rank's part there
            values.fill_(float("nan"))


def dawdle(trainer: Any) -> None:
    """Alive, but not getting anywhere."""
    time.sleep(600)


def carry_on(trainer: Any) -> None:
    """Nothing; what happens then is done from outside."""


def kill_writing(trainer: Any) -> None:
    """While the next checkpoint is written."""
    _while_writing(trainer, lambda: kill(trainer))


def disk(trainer: Any) -> None:
    """The disk takes no more of the next checkpoint, and has room again for the one after."""

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _while_writing(trainer, full)


def _while_writing(trainer: Any, fault: Callable[[], None]) -> None:
    """After some pieces, or at the last."""
    append, close, left = ShardWriter.append, ShardWriter.close, [trainer.fault["after"]]

    def counted(self: ShardWriter, name: str, data: memoryview) -> None:
        if left[0] == 0:
            fault()
        left[0] -= 1
        append(self, name, data)

    def at_the_end(self: ShardWriter) -> None:
        if left[0] >= 0:
            fault()
        close(self)

    ShardWriter.append, ShardWriter.close = counted, at_the_end  # type: ignore[method-assign]


FAULTS = {f.__name__: f for f in (kill, stop, fail, memory, nan, dawdle, carry_on, kill_writing, disk)}


def run(config: Config) -> int:
    """Train; the fault happens once, also if the run is started again."""
    from occult_train import trainer

    output = Path(config.output)
    told = output / "fault.json"
    told_fault = json.loads(told.read_text()) if told.exists() else {"rank": -1}

    class Faulty(trainer.Trainer):
        fault: ClassVar[dict[str, Any]] = told_fault

        def _train_step(self, batches: Any) -> None:
            if self.grid.rank == self.fault["rank"] and self.step == self.fault["step"]:
                told.unlink(missing_ok=True)
                (output / "reached").touch()
                FAULTS[self.fault["kind"]](self)
            if "pause" in self.fault:
                time.sleep(self.fault["pause"])
            super()._train_step(batches)

    Faulty(config).train()
    return 0


if __name__ == "__main__":
    sys.exit(main(run=run))
