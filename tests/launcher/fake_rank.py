"""A module that ranks run in place of `occult_train.train`. `data.path` of the config names what they do."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from occult_train import faults
from occult_train.config import Config
from occult_train.errors import DataError
from occult_train.train import main


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _last() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def succeed(config: Config) -> int:
    """Sum the ranks and leave a note of it."""
    total = torch.tensor([dist.get_rank()], device=_device())
    dist.all_reduce(total)
    note = f"{dist.get_rank()} {dist.get_world_size()} {total.item()} {os.environ['LOCAL_RANK']}"
    (Path(config.output) / f"note-{dist.get_rank()}").write_text(note)
    return 0


def wait(config: Config) -> int:
    """All ranks but the last sit in a collective, with the main thread inside gloo."""
    faults.set_step(7)
    dist.barrier()
    if _last():
        _misbehave(config)
    dist.barrier()
    return 0


def _misbehave(config: Config) -> None:
    time.sleep(1)
    if config.data.path == "raise":
        raise ValueError("expert 5 is on fire")
    if config.data.path == "kill":
        (Path(config.output) / "dying").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if config.data.path == "kill_once" and not (Path(config.output) / "dying").exists():
        (Path(config.output) / "dying").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if config.data.path == "user":
        raise DataError("data.path=user does not exist")


def steps(config: Config) -> int:
    """Short steps until asked to stop, agreed over ranks; then something like a checkpoint."""
    stop = faults.StopSignal()
    for step in range(1200):
        flag = torch.tensor([int(stop.requested)], device=_device())
        dist.all_reduce(flag)
        if flag.item():
            time.sleep(0.5)
            (Path(config.output) / f"saved-{dist.get_rank()}").write_text(str(step))
            return 0
        (Path(config.output) / f"started-{dist.get_rank()}").touch()
        time.sleep(0.1)
    return 1


def deaf(config: Config) -> int:
    """Neither look at the flag nor end."""
    (Path(config.output) / f"started-{dist.get_rank()}").touch()
    time.sleep(300)
    return 1


def run(config: Config) -> int:
    """Do what `data.path` says."""
    behaviours = {"succeed": succeed, "steps": steps, "deaf": deaf}
    return behaviours.get(config.data.path, wait)(config)


if __name__ == "__main__":
    sys.exit(main(run=run))
