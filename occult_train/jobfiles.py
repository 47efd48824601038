"""What the ranks of one launch write into the run's folder, for each other and for `occult train`.

    <output>/errors/<launch>.txt        the first failure; creating this file is the right to report
    <output>/.launch/<launch>/rank-3    the process of a rank that is set up, removed when it ends of its own accord
    <output>/.launch/<launch>/running   the process of `occult train`, removed by rank 0 when it ends well
    <output>/.launch/<launch>/stop      a request to save and stop
    <output>/.launch/<launch>/hosts     the hosts that are used, for launchers that know no filters
    <output>/.launch/<launch>/room-HOST-PID    some bytes that give way to the report where the disk is full

On several hosts the folder must be shared, as checkpoints need it to be anyway. Nothing here imports torch.
"""

import contextlib
import json
import os
import secrets
import shutil
import socket
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from occult_train.errors import TrainingDiverged, UserError, writing

MESSAGE_LENGTH = 500
ROOM_BYTES = 16 << 10
"""Of a report: message and traceback."""


def new_launch() -> str:
    """A name for one launch that sorts by time and no other launch has."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


@dataclass(frozen=True)
class RankProcess:
    """The process of a rank."""

    rank: int
    host: str
    pid: int
    started: float
    """Start time in seconds since 1970, which tells it from a later process of the same pid."""

    @staticmethod
    def of_this_process(rank: int) -> "RankProcess":
        """The calling process as `rank`."""
        return RankProcess(rank, socket.gethostname(), os.getpid(), psutil.Process().create_time())

    @property
    def is_local(self) -> bool:
        """Whether it runs on this host."""
        return self.host == socket.gethostname()

    def is_alive(self) -> bool:
        """Whether it still runs, for a process of this host."""
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


@dataclass(frozen=True)
class Failure:
    """Why a launch ended."""

    kind: str
    """user (the message is for whoever typed the command), error, diverged (training has no numbers any more), lost (a
    rank died without a word) or stopped."""
    rank: int
    host: str
    step: int | None
    message: str
    """One line."""
    details: str = ""
    """Traceback."""

    @staticmethod
    def of(error: BaseException, rank: int, step: int | None) -> "Failure":
        """The failure of this process by an exception."""
        user = isinstance(error, UserError)
        line = str(error) if user else "".join(traceback.format_exception_only(error))
        details = "" if user else "".join(traceback.format_exception(error))
        message = " ".join(line.split())[:MESSAGE_LENGTH]
        kind = "user" if user else "diverged" if isinstance(error, TrainingDiverged) else "error"
        return Failure(kind, rank, socket.gethostname(), step, message, details)

    @property
    def where(self) -> str:
        """Rank, host and step in words."""
        return f"rank {self.rank} on host {self.host}" + (f" at step {self.step}" if self.step is not None else "")

    @property
    def may_pass(self) -> bool:
        """Whether the same job, started again, may end otherwise."""
        return self.kind in ("error", "lost")

    @property
    def exit_code(self) -> int:
        """What a process that ends because of it exits with."""
        return 2 if self.kind == "user" else 1

    def to_text(self) -> str:
        """The report: one line `name: value` each, an empty line, the traceback."""
        head = {**asdict(self), "time": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        details = head.pop("details")
        return "".join(f"{key}: {value}\n" for key, value in head.items() if value is not None) + f"\n{details}"

    @staticmethod
    def from_text(text: str) -> "Failure":
        """Read what `to_text` wrote. Missing lines, as after a full disk, leave placeholders."""
        head, _, details = text.partition("\n\n")
        values = dict(line.split(": ", 1) for line in head.splitlines() if ": " in line)
        step = values.get("step")
        return Failure(
            values.get("kind", "error"),
            int(values.get("rank", -1)),
            values.get("host", "?"),
            None if step is None else int(step),
            values.get("message", "the report is empty (disk full?)"),
            details,
        )


class JobFiles:
    """The files of one launch.

    Args:
        output: folder of the run.
        launch: name of the launch, the same on all ranks.
    """

    def __init__(self, output: str | Path, launch: str) -> None:
        self.output = Path(output)
        self.launch = launch
        self.report = self.output / "errors" / f"{launch}.txt"
        self._folder = self.output / ".launch" / launch
        self._room = self._folder / f"room-{socket.gethostname()}-{os.getpid()}"

    @property
    def hostfile(self) -> Path:
        """Where `occult train` writes the hosts that are used, if it has to."""
        return self._folder / "hosts"

    def create(self) -> None:
        """Make the folders, check that they can be written, and keep some room for this process's report.

        Raises:
            UserError: they cannot.
        """
        with writing(f"output={self.output}"):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._room.write_bytes(os.urandom(ROOM_BYTES))  # a file system that compresses would keep none for zeros

    def claim(self, failure: Failure) -> Failure | None:
        """Report a failure unless another rank has; then return that rank's."""
        try:
            self._room.unlink(missing_ok=True)
            self.report.parent.mkdir(exist_ok=True)
            handle = os.open(self.report, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return self.failure()
        except OSError:
            return None
        try:
            os.write(handle, failure.to_text().encode())
        except OSError:
            return None  # a full disk: the claim stands, the report is on the screen alone
        finally:
            os.close(handle)
        return None

    def failure(self) -> Failure | None:
        """The first failure of this launch, if there is one."""
        deadline = time.monotonic() + 0.5
        try:
            while not (text := self.report.read_text(errors="replace")) and time.monotonic() < deadline:
                time.sleep(0.02)  # just claimed, not yet written
        except OSError:
            return None
        return Failure.from_text(text)

    def enter(self, process: RankProcess) -> None:
        """Record that a rank is set up and listens for `request_stop`."""
        with writing(f"output={self.output}"):
            (self._folder / f"rank-{process.rank}").write_text(json.dumps(asdict(process)))

    def leave(self, process: RankProcess, well: bool) -> None:
        """Record that a rank ends of its own accord: well, or after what `claim` or a signal has explained."""
        with contextlib.suppress(OSError):  # others are still in it
            self._room.unlink(missing_ok=True)
            (self._folder / f"rank-{process.rank}").unlink(missing_ok=True)
            if well and process.rank == 0:
                self._running.unlink(missing_ok=True)
            self._folder.rmdir()
            self._folder.parent.rmdir()

    def has_left(self, process: RankProcess) -> bool:
        """Whether a rank has said that it ends."""
        return not (self._folder / f"rank-{process.rank}").exists()

    def ranks(self) -> list[RankProcess]:
        """The ranks that are set up and have not left."""
        found = [_read_process(path) for path in sorted(self._folder.glob("rank-*"))]
        return [process for process in found if process is not None]

    @property
    def _running(self) -> Path:
        return self._folder / "running"

    def expect(self, starter: RankProcess) -> None:
        """Record that a process begins a launch whose rank 0 has to end well."""
        self._running.write_text(json.dumps(asdict(starter)))

    def starter(self) -> RankProcess | None:
        """Who called `expect`, if anybody."""
        return _read_process(self._running)

    def ended_well(self) -> bool:
        """Whether rank 0 ended well after `expect`."""
        return not self._running.exists()

    def request_stop(self) -> None:
        """Ask all ranks to save and stop."""
        (self._folder / "stop").touch()

    def stop_requested(self) -> bool:
        """Whether `request_stop` was called on any host."""
        return (self._folder / "stop").exists()

    def remove(self) -> None:
        """Forget the launch. Its report stays, unless it is of a mistake whose one line has been said."""
        shutil.rmtree(self._folder, ignore_errors=True)
        failure = self.failure()
        if failure is not None and failure.kind == "user":
            self.report.unlink(missing_ok=True)
        for folder in (self._folder.parent, self.report.parent):
            with contextlib.suppress(OSError):  # other launches are in it
                folder.rmdir()


def _read_process(path: Path) -> RankProcess | None:
    """The process recorded in a file, unless that is just being written or removed."""
    try:
        return RankProcess(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
