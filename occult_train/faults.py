"""How a rank ends before its time: asked to stop, because it failed, or because another rank did.

A thread watches, because Python runs signal handlers in the main thread alone, and that may sit in a collective whose
peer is gone. Signals reach the thread through a pipe; the first failure of the job, a request to stop and the death
of a neighbour it finds in the files of the launch. Signals belong to the process, and so does the state here.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import NoReturn

from occult_train.distributed import first_on_host_lives
from occult_train.jobfiles import Failure, JobFiles, RankProcess
from occult_train.pulse import Pulse

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE_SECONDS = 25.0
"""DeepSpeed's launcher kills 30 s after its SIGTERM."""
POLL_SECONDS = 0.5
REPEAT_SECONDS = 0.5
LOST_PEER_PHRASES = (
    *("closed by peer", "reset by peer", "broken pipe", "remote process exited", "connection refused"),
    "connection was likely closed",  # a store's
)
LOST_PEER_SECONDS = 3.0
MISSED_PEER_SECONDS = 12.0
"""Within which the pulse of a job finds out who is gone."""


@dataclass
class _State:
    """What the thread, the main thread and `StopSignal` share. Each field is written by one of them."""

    requested: bool = False
    noticed: bool = False
    failing: bool = False
    step: int | None = None
    rank: int = 0
    files: JobFiles | None = None
    process: RankProcess | None = None
    peers: list[RankProcess] = field(default_factory=list)
    starter: RankProcess | None = None
    pulse: Pulse | None = None
    deadline: float | None = None
    interrupted_at: float | None = None
    exit_code: int = 1


_state = _State()
_watcher: "_Watcher | None" = None


class StopSignal:
    """Whether this process was asked to stop, by SIGTERM, Ctrl-C or `occult train`. All instances tell the same.

    The training loop looks at `requested` every step, agrees on it with the other ranks, saves and returns. A process
    that has not looked `grace` seconds after a signal, or gets Ctrl-C again, exits at once.
    """

    def install(self, grace: float = GRACE_SECONDS) -> None:
        """Begin to listen; main thread only. A second call changes nothing."""
        global _watcher
        if _watcher is None:
            _watcher = _Watcher(grace)
            _watcher.start()

    def uninstall(self) -> None:
        """Give the signals back to whoever had them."""
        global _watcher, _state
        if _watcher is not None:
            _watcher.close()
            _watcher, _state = None, _State()

    @property
    def requested(self) -> bool:
        """True once asked to stop. Seeing True stops the clock: saving may take as long as it takes."""
        if _state.requested:
            _state.noticed = True
        return _state.requested


def set_step(step: int) -> None:
    """Note the step that training is at, for the report of a failure."""
    _state.step = step


def set_rank(rank: int) -> None:
    """Note which rank this process is."""
    _state.rank = rank


def join(
    files: JobFiles,
    process: RankProcess | None = None,
    peers: Sequence[RankProcess] = (),
    pulse: Pulse | None = None,
) -> None:
    """Report failures in these files and end when another rank does.

    Args:
        files: of this launch.
        process: this one, entered in the files so that a stop can be asked for.
        peers: processes of all ranks; those on this host are watched.
        pulse: what tells the ranks of other hosts of a failure; `end` is what it is to call.
    """
    _state.peers = [peer for peer in peers if peer.is_local and peer.pid != os.getpid()]
    _state.starter = files.starter()
    _state.files, _state.pulse = files, pulse
    _state.process = process
    if process is not None:
        files.enter(process)


def end(failure: Failure) -> None:
    """End this process because of another rank's failure, which the pulse has told of. It is noted on this host too."""
    files = _state.files
    if files is not None and files.claim(failure) is None and failure.kind == "lost" and _state.starter is None:
        _say(f"{failure.where}: {failure.message}")  # nobody else will
    if not _state.failing:
        _exit(failure.exit_code)


def step() -> int | None:
    """The step that training is at."""
    return _state.step


def fail(error: BaseException, first_on_host: bool = True) -> NoReturn:
    """Report an exception, once for all ranks, and exit: 2 for a user's mistake, else 1.

    It leaves through `os._exit`, since collectives that a peer has left may hold up an orderly end.

    Args:
        error: what was raised.
        first_on_host: before `join` only: whether this rank speaks for its host if all ranks fail alike.
    """
    _state.failing = True
    failure = Failure.of(error, _state.rank, _state.step)
    if _state.files is not None:
        _report_among_ranks(failure, _state.files)
    elif failure.kind == "user" and not first_on_host:
        _await_first_on_host(failure.exit_code)
    if failure.kind == "user":
        _say(f"error: {failure.message}")
    else:
        _say(f"rank {failure.rank} on host {failure.host} failed:\n{failure.details.rstrip()}")
    _exit(failure.exit_code)


def _await_first_on_host(code: int) -> None:
    """Exit in silence once the rank that speaks for this host has ended; return if it lives on, and so has no error."""
    deadline = time.monotonic() + LOST_PEER_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.1)
        if not first_on_host_lives():
            _exit(code)


def _report_among_ranks(failure: Failure, files: JobFiles) -> None:
    """Return if this rank is the first to fail, else exit with a line that names the first."""
    if failure.kind == "error" and any(phrase in failure.message.lower() for phrase in LOST_PEER_PHRASES):
        _await_other_report(files)
        failure = replace(failure, message=f"{failure.message} (another rank is gone: killed, or out of memory?)")
    told = _state.pulse.claim(failure) if _state.pulse is not None else failure
    first = files.claim(told) or told
    if (first.rank, first.message) == (failure.rank, failure.message):
        return
    if first.kind != "user":
        _say(f"rank {failure.rank} stopped: rank {first.rank} failed first")
    _exit(first.exit_code)


def _await_other_report(files: JobFiles) -> None:
    """Give the rank whose loss broke a connection, or the thread that sees it dead, the time to report."""
    if _state.pulse is not None:
        _state.pulse.suspect()
    deadline = time.monotonic() + (LOST_PEER_SECONDS if _state.pulse is None else MISSED_PEER_SECONDS)
    while time.monotonic() < deadline and not files.report.exists() and not _claim_for_dead_peer(files):
        time.sleep(0.1)


def _claim_for_dead_peer(files: JobFiles) -> bool:
    """Report a rank of this host that is gone without having ended well. True if there is one."""
    for peer in _state.peers:
        if not peer.is_alive() and not files.has_left(peer) and not files.report.exists():
            message = f"process {peer.pid} ended without a report: killed, or out of memory?"
            files.claim(Failure("lost", peer.rank, peer.host, _state.step, message))
            return True
    return False


def _orphaned() -> bool:
    """Whether `occult train` has started this rank from this host and is gone. Then nobody else would end it."""
    starter = _state.starter
    return starter is not None and starter.is_local and not starter.is_alive()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _exit(code: int) -> NoReturn:
    if _state.files is not None and _state.process is not None:
        _state.files.leave(_state.process, well=False)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the reader is gone
            stream.flush()
    os._exit(code)


def _ignore(signum: int, frame: FrameType | None) -> None:
    """Python's part of a handler: the thread has read the signal from the pipe."""


class _Watcher(threading.Thread):
    """Reads signals from a pipe and looks at the launch's files twice a second."""

    def __init__(self, grace: float) -> None:
        super().__init__(name="occult-watcher", daemon=True)
        self._grace = grace
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._closed = False
        self._pid = os.getpid()
        self._handlers = {number: signal.signal(number, _ignore) for number in STOP_SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._restore_in_child)

    def close(self) -> None:
        """Stop watching and restore the handlers."""
        self._closed = True
        self._restore()
        self.join()
        os.close(self._read)
        os.close(self._write)

    def run(self) -> None:
        """Watch until closed."""
        while not self._closed:
            ready, _, _ = select.select([self._read], [], [], POLL_SECONDS)
            for number in os.read(self._read, 64) if ready else b"":
                self._on_signal(number)
            if not _state.failing:
                self._look()

    def _on_signal(self, number: int) -> None:
        """Only Ctrl-C again means at once: launchers send SIGTERM on top of what the terminal has sent."""
        if number not in STOP_SIGNALS or _state.failing:
            return
        now = time.monotonic()
        if number == signal.SIGINT:
            if _state.interrupted_at is not None and now - _state.interrupted_at > REPEAT_SECONDS:
                _exit(128 + number)
            _state.interrupted_at = _state.interrupted_at or now
        if not _state.requested:
            _state.deadline = now + self._grace
            _state.exit_code = 128 + number
            _state.requested = True

    def _look(self) -> None:
        """End the process if another rank has failed or died, or if nobody heeds the signal."""
        files = _state.files
        if files is not None:
            if files.report.exists() or _claim_for_dead_peer(files):
                failure = files.failure()
                if not _state.failing:
                    _exit(failure.exit_code if failure else 1)
            if not _state.requested:
                _state.requested = files.stop_requested() or _orphaned()
        if _state.deadline is not None and not _state.noticed and time.monotonic() > _state.deadline:
            _say(f"rank {_state.rank} did not stop within {self._grace:.0f} s of the signal and was ended")
            _exit(_state.exit_code)

    def _restore(self) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _restore_in_child(self) -> None:
        """A forked data worker must not write its signals into the parent's pipe."""
        if not self._closed and os.getpid() != self._pid:
            self._restore()
