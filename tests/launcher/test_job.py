"""What `occult train` does around the `deepspeed` command, with a small command in its place."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from occult_train.jobfiles import JobFiles, new_launch
from occult_train.launcher.job import Job

DRIVER = """
import os, sys
from occult_train.jobfiles import JobFiles
from occult_train.launcher.job import Job
files = JobFiles(sys.argv[1], "launch")
files.create()
sys.exit(Job([sys.executable, "-c", sys.argv[2], sys.argv[1]], dict(os.environ), files, multi_host=False).run())
"""

STUBBORN = """
import signal, subprocess, sys, time
from occult_train.jobfiles import JobFiles, RankProcess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", sys.argv[1]])
if {enters}:
    JobFiles(sys.argv[1], "launch").enter(RankProcess.of_this_process(0))
open(sys.argv[1] + "/ready", "w").close()
time.sleep(300)
"""


def _start(folder: Path, enters: bool) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", DRIVER, str(folder), STUBBORN.format(enters=enters)]
    driver = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not (folder / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return driver


def _left(folder: Path) -> list[int]:
    words = [(p.pid, " ".join(p.info["cmdline"] or [])) for p in psutil.process_iter(["cmdline"])]
    return [pid for pid, line in words if str(folder) in line and pid != os.getpid()]


def test_a_second_signal_ends_everything(tmp_path: Path) -> None:
    driver = _start(tmp_path, enters=True)
    driver.send_signal(signal.SIGINT)
    driver.send_signal(signal.SIGINT)  # one key press, told to the process and to its group
    time.sleep(1)
    assert driver.poll() is None
    assert (tmp_path / ".launch" / "launch" / "stop").exists()
    driver.send_signal(signal.SIGINT)
    _, said = driver.communicate(timeout=15)
    assert (driver.returncode, said) == (130, "stopping: saving a checkpoint; press Ctrl-C again to stop at once\n")
    assert not _left(tmp_path)
    assert not (tmp_path / ".launch").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_any_rank_listens_ends_everything(tmp_path: Path, number: int) -> None:
    driver = _start(tmp_path, enters=False)
    driver.send_signal(number)
    _, said = driver.communicate(timeout=15)
    assert (driver.returncode, said) == (128 + number, "stopping: no rank had started training\n")
    assert not _left(tmp_path)


@pytest.mark.parametrize(
    "script, code",
    [
        ("pass", 1),  # DeepSpeed's runner exits with 0 when the process that starts the ranks was killed
        ("import sys; sys.exit(7)", 7),
        ("import os; os.kill(os.getpid(), 9)", 137),
    ],
)
def test_exit_codes(tmp_path: Path, script: str, code: int) -> None:
    files = JobFiles(tmp_path / "run", new_launch())
    files.create()
    assert Job([sys.executable, "-c", script], dict(os.environ), files, multi_host=False).run() == code
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
