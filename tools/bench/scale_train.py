"""Train for a limited time, and kill a rank on the way.

python -m occult_train.tools.bench.scale_train RUN --seconds N --kill-at STEP CONFIG.yaml ... path=value ...

The same command goes on, with no further kill. RUN/killed.json tells of it, and RUN/log-killed.jsonl is the log of that
moment: the run's own log drops what came after the checkpoint that it goes on from.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from occult_train import runlog
from occult_train.jobfiles import JobFiles, RankProcess

KILLED, LOG_KILLED = "killed.json", "log-killed.jsonl"
POLL = 0.2


@dataclass(frozen=True)
class Killed:
    """A rank that was killed."""

    rank: int
    step: int
    """The last one in the log."""
    time: float
    """Seconds since 1970."""


def last_step(run: Path) -> int:
    """The last logged step of a run; 0 without any."""
    path = run / "log.jsonl"
    records = runlog.read(path) if path.exists() else []
    return max((int(record["step"]) for record in records if record["kind"] == "step"), default=0)


def ranks(run: Path) -> list[RankProcess]:
    """The ranks that are training, in order."""
    launches = sorted((run / ".launch").glob("*"))
    found = [process for launch in launches for process in JobFiles(run, launch.name).ranks()]
    return sorted((process for process in found if process.is_alive()), key=lambda process: process.rank)


def kill(run: Path, at: int) -> bool:
    """Kill the last rank once the log has reached step `at`; whether that has happened, now or before."""
    if (run / KILLED).exists():
        return True
    step = last_step(run)
    if step < at or not (running := ranks(run)):
        return False
    os.kill(running[-1].pid, signal.SIGKILL)
    shutil.copy(run / "log.jsonl", run / LOG_KILLED)
    (run / KILLED).write_text(json.dumps(asdict(Killed(running[-1].rank, step, time.time()))))
    return True


def train(run: Path, seconds: float, at: int, settings: list[str]) -> int:
    """`occult train` with one restart, asked to save and stop after `seconds`; its exit code.

    Args:
        at: step at which a rank is killed; 0 for none.
    """
    words = ["train", "--restarts", "1", *settings, f"output={run}"]
    process = subprocess.Popen([sys.executable, "-m", "occult_train.launcher.cli", *words])
    deadline = time.monotonic() + seconds
    done = at == 0
    while process.poll() is None:
        done = done or kill(run, at)
        if time.monotonic() > deadline:
            process.terminate()
            deadline = float("inf")
        time.sleep(POLL)
    return process.returncode


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--kill-at", type=int, default=0)
    parser.add_argument("settings", nargs="+")
    given = parser.parse_intermixed_args()
    sys.exit(train(given.run, given.seconds, given.kill_at, given.settings))


if __name__ == "__main__":
    main()
