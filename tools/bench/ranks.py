"""Tasks on a set of rank processes under a watchdog: a rank that fails or hangs costs its task, not the run.

`run_tasks` starts one process a rank, which do the tasks in order. When a rank dies, or a task outlasts its limit, all
are killed, the task is reported as failed, and new ranks go on with the next one.
"""

import contextlib
import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from occult_train import distributed

POLL = 0.1
READY = "ready"
"""The line that rank 0 writes before its first result."""
TAIL = 15
"""Lines of a rank's log that are shown when it dies without a traceback."""


@dataclass(frozen=True)
class Launch:
    """How ranks run."""

    ranks: int
    cpu: bool = False
    """gloo on CPU; otherwise NCCL, one GPU a rank."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables on top of this process's."""
    task_seconds: float = 120.0
    """How long one task may take."""
    start_seconds: float = 180.0
    """How long importing and joining may take."""
    prefixes: tuple[tuple[str, ...], ...] = ()
    """Of each rank's command, such as what starts it on a network of its own; empty for none."""
    address: str = "127.0.0.1"
    """Of rank 0, for the others."""


@dataclass(frozen=True)
class Job:
    """What rank processes read: the function `module:name`, called as function(task) on every rank."""

    function: str
    tasks: list[tuple[int, Any]]
    cpu: bool
    timeout: float


def run_tasks(function: str, tasks: Sequence[Any], launch: Launch) -> Iterator[tuple[int, Any, str]]:
    """Do `function` (module:name) of each task on all ranks.

    Under torchrun the ranks are there already: they do the tasks, unwatched, and only rank 0 yields.

    Yields:
        (index of the task, what rank 0 returned (JSON), error); one of the two is None or empty. In order.
    """
    left = list(enumerate(tasks))
    if "RANK" in os.environ:
        yield from _run_here(function, left, launch)
        return
    while left:
        with tempfile.TemporaryDirectory(prefix="occult-bench-") as name, _Ranks(function, left, launch, name) as ranks:
            for index, result, error in ranks.results():
                left = [(i, task) for i, task in left if i != index]
                yield index, result, error


def _run_here(function: str, tasks: list[tuple[int, Any]], launch: Launch) -> Iterator[tuple[int, Any, str]]:
    os.environ.update(launch.environment)
    distributed.initialize("gloo" if launch.cpu else "nccl")
    for index, task in tasks:
        result = call(function)(task)
        if os.environ["RANK"] == "0":
            yield index, result, ""
    distributed.shutdown()


class _Ranks:
    """One set of rank processes; `results` ends when they have done everything, or with the first failure."""

    def __init__(self, function: str, tasks: list[tuple[int, Any]], launch: Launch, folder: str) -> None:
        self.folder, self.launch, self.tasks = Path(folder), launch, tasks
        job = Job(function, tasks, launch.cpu, launch.task_seconds)
        (self.folder / "job").write_bytes(pickle.dumps(job))
        (self.folder / "results").touch()
        environment = dict(os.environ) | launch.environment
        environment |= {"MASTER_ADDR": launch.address, "MASTER_PORT": str(distributed.free_port())}
        environment |= {"WORLD_SIZE": str(launch.ranks), "LOCAL_SIZE": str(launch.ranks)}
        if launch.cpu:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        self.processes = [self._start(rank, environment) for rank in range(launch.ranks)]

    def _start(self, rank: int, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
        prefix = self.launch.prefixes[rank] if self.launch.prefixes else ()
        with (self.folder / f"log-{rank}").open("wb") as log:
            return subprocess.Popen(
                [*prefix, sys.executable, "-m", __name__, str(self.folder)],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "_Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def results(self) -> Iterator[tuple[int, Any, str]]:
        """As `run_tasks`."""
        waiting, read, limit = [index for index, _ in self.tasks], 0, self.launch.start_seconds
        since = time.monotonic()
        while waiting:
            failure = self._failure()  # before reading: results of a rank that has died count
            *lines, _ = (self.folder / "results").read_text().split("\n")
            for line in lines[read:]:
                if line != READY:
                    yield waiting.pop(0), json.loads(line), ""
                since, limit = time.monotonic(), self.launch.task_seconds
            read = len(lines)
            if waiting and (failure or time.monotonic() > since + limit):
                yield waiting[0], None, failure or f"no result within {limit:.0f} s"
                return
            time.sleep(POLL)

    def _failure(self) -> str:
        """What ended the first rank; empty while all run."""
        if not any(process.poll() for process in self.processes):
            return ""
        time.sleep(5 * POLL)  # peers may be about to report
        codes = {rank: process.poll() for rank, process in enumerate(self.processes)}
        report = self.folder / "error"
        # a rank that reports ends with 1; one that was killed comes before the peers that miss it
        killed = [rank for rank, code in codes.items() if code not in (None, 0, 1)]
        if not killed and report.exists():
            return report.read_text()
        rank = killed[0] if killed else next(rank for rank, code in codes.items() if code)
        log = (self.folder / f"log-{rank}").read_text(errors="replace").splitlines()[-TAIL:]
        return "\n".join((f"rank {rank} ended with exit code {codes[rank]}", *log))


def call(function: str) -> Callable[[Any], Any]:
    """The function that `module:name` names."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def main(folder: Path) -> None:
    """The life of one rank."""
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    distributed.prepare_environment()
    rank, code = int(os.environ["RANK"]), 0
    try:
        job: Job = pickle.loads((folder / "job").read_bytes())
        backend = "gloo" if job.cpu else "nccl"
        distributed.initialize(backend, timeout=timedelta(seconds=max(job.timeout, 60)))
        function = call(job.function)
        with (folder / "results").open("a") as results:
            if rank == 0:
                print(READY, file=results, flush=True)
            for _, task in job.tasks:
                result = function(task)
                if rank == 0:
                    print(json.dumps(result), file=results, flush=True)
    except BaseException:
        code = 1
        _report(folder / "error", f"rank {rank}: {traceback.format_exc()}")
    sys.stdout.flush()
    # a collective broken by a peer must not hold it up
    os._exit(code)


def _report(path: Path, text: str) -> None:
    """Write what went wrong, unless another rank has before."""
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        pass


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
