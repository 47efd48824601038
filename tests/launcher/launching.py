"""Commands that launch for real, with ranks that run `fake_rank`."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
CONFIG = "train: {global_batch_size: 8}\nmodel: {num_experts: 8}\nparallel: {expert: 2}\n"


@dataclass
class Ended:
    """A command that has ended."""

    code: int
    out: str
    seconds: float
    """From its start, or from the signal sent last."""


class Command:
    """A command running in `folder`, which holds `a.yaml`; the run's output goes to `folder/run`."""

    def __init__(self, folder: Path, words: list[str], environment: dict[str, str] | None = None) -> None:
        self.folder = folder
        paths = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        python_path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH", "")])])
        given = {**os.environ, "PATH": paths, "PYTHONPATH": python_path, **(environment or {})}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"):
            given.pop(name, None)
        self._log = folder / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                words, cwd=folder, env=given, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._start = time.monotonic()

    def wait_for(self, name: str, seconds: float = 180) -> None:
        """Wait until a file of the run's folder exists."""
        deadline = time.monotonic() + seconds
        while not (self.folder / "run" / name).exists():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.05)

    def wait_for_text(self, text: str, seconds: float = 180) -> None:
        """Wait until the output holds a text, and count the time from then."""
        deadline = time.monotonic() + seconds
        while text not in self._log.read_text():
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.05)
        self._start = time.monotonic()

    def signal(self, number: int) -> None:
        """Send a signal to the command alone, as a terminal does, and count the time from then."""
        self._start = time.monotonic()
        self._process.send_signal(number)

    def end(self, seconds: float = 180) -> Ended:
        """Wait for the end."""
        try:
            code = self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self._log.read_text()}") from None
        return Ended(code, self._log.read_text(), time.monotonic() - self._start)

    def left_behind(self) -> list[str]:
        """Processes whose command line names this run."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            words = " ".join(process.info["cmdline"] or [])
            if str(self.folder) in words and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(words)
        return found

    def kill(self) -> None:
        """End whatever is left, for tests that fail."""
        for process in psutil.process_iter(["cmdline"]):
            if str(self.folder) in " ".join(process.info["cmdline"] or []):
                process.kill()


Start = Callable[..., Command]
