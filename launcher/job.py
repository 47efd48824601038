"""The `deepspeed` process of a launch: watched to its end, stopped on request, and nothing of it left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import IO, Any

import psutil

from occult_train.jobfiles import Failure, JobFiles, RankProcess

POLL_SECONDS = 0.2
REPEAT_SECONDS = 0.5
AFTER_REPORT_SECONDS = 20.0
"""How long a job of several hosts may take to end by itself once a rank has reported why."""
SSH_SECONDS = 5
TERMINATE_SECONDS = 10.0
"""How long DeepSpeed's runner may take to end its processes on other hosts."""


class Job:
    """One launch. It runs in a session of its own, so that Ctrl-C in the terminal reaches this process alone.

    The first SIGINT, SIGTERM or SIGHUP asks the ranks to save and stop, through their files and not through
    DeepSpeed's runner, which would kill them. The second, or one before the ranks are set up, ends everything.

    Args:
        command: of `deepspeed`, whole.
        environment: of that command.
        files: of the launch.
        multi_host: whether ranks run on other hosts too.
        others: hosts beside this one on which ranks run, reached by ssh; empty for none.
        output: takes what is printed; None prints it here.
        limit: seconds after which the job is ended; None for never.
    """

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        files: JobFiles,
        multi_host: bool,
        others: Sequence[str] = (),
        output: IO[bytes] | None = None,
        limit: float | None = None,
    ) -> None:
        self._command = command
        self._environment = environment
        self._files = files
        self._multi_host = multi_host
        self._others = others
        self._output = output
        self._limit = limit
        self._received: list[int] = []
        self._received_at = 0.0
        self._stopping = False
        self.ended = False
        """Whether signals have ended the job before it could save."""

    def run(self) -> int:
        """Start, wait for the end, clean up, and return the exit code: the job's, or 128 + signal if it was ended."""
        handlers = self._install()
        process = None
        try:
            self._files.expect(RankProcess.of_this_process(-1))
            process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                start_new_session=True,
            )
            code = self._wait(process)
            if code:
                self._clear_others()
            return code
        finally:
            if process is not None:
                self._clear(process)
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _install(self) -> dict[int, Any]:
        """Collect signals. SIGHUP stays ignored under nohup."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        return {number: signal.signal(number, self._receive) for number in numbers}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Count a signal. `timeout` and batch systems send theirs twice at once, to the process and to its group."""
        now = time.monotonic()
        if not self._received or now - self._received_at > REPEAT_SECONDS:
            self._received.append(number)
            self._received_at = now

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        reported_at, began = None, time.monotonic()
        while True:
            try:
                return self._exit_code(process.wait(timeout=POLL_SECONDS))
            except subprocess.TimeoutExpired:
                pass
            if self._multi_host and reported_at is None and self._files.report.exists():
                reported_at = time.monotonic()
            if reported_at is not None and time.monotonic() - reported_at > AFTER_REPORT_SECONDS:
                return self._give_up(process)
            if self._limit is not None and time.monotonic() - began > self._limit:
                return self._give_up(process)
            if self._received and not self._stopping:
                self._stopping = self._ask_to_stop()
            if self._received and (not self._stopping or len(self._received) > 1):
                return self._end_now(process)

    def _ask_to_stop(self) -> bool:
        """Ask the ranks to save and stop. False if none is there to be asked."""
        if not self._files.ranks():
            say("stopping: no rank had started training")
            return False
        try:
            self._files.request_stop()
        except OSError as error:
            say(f"stopping without a checkpoint: {self._files.output} cannot be written: {error.strerror}")
            return False
        say("stopping: saving a checkpoint; press Ctrl-C again to stop at once")
        return True

    def _end_now(self, process: subprocess.Popen[bytes]) -> int:
        self.ended = True
        if self._multi_host:
            message = f"ended by {signal.Signals(self._received[-1]).name}"
            self._files.claim(Failure("stopped", -1, os.uname().nodename, None, message))
            process.terminate()
            self._wait_up_to(process, TERMINATE_SECONDS)
        return 128 + self._received[-1]

    def _give_up(self, process: subprocess.Popen[bytes]) -> int:
        """End a job that has failed and does not end: a host that is gone answers nobody."""
        process.terminate()
        self._wait_up_to(process, TERMINATE_SECONDS)
        failure = self._files.failure()
        return failure.exit_code if failure is not None else 1

    def _wait_up_to(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            say("the other hosts did not answer in time")

    def _exit_code(self, code: int) -> int:
        """DeepSpeed's runner exits with 0 when its own child was killed, so success needs rank 0's word as well."""
        if code < 0:
            return 128 - code
        failed = self._files.report.exists() or not (self._multi_host or self._files.ended_well())
        return 1 if code == 0 and failed else code

    def _clear(self, process: subprocess.Popen[bytes]) -> None:
        """Kill what is left on this host: the session of the command, and ranks that recorded themselves."""
        left = _session(process.pid)
        left += [psutil.Process(r.pid) for r in self._files.ranks() if r.is_local and r.is_alive()]
        for member in left:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
        process.wait()
        deadline = time.monotonic() + TERMINATE_SECONDS
        while _session(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        self._files.remove()

    def _clear_others(self) -> None:
        """Kill what is left of a job that has failed on hosts that can be reached, such as a stopped process."""
        pattern = f"[j]ob={self._files.launch}"  # which is not found in the command that looks for it
        words = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_SECONDS}"]
        running = [
            subprocess.Popen(
                [*words, host, f"pkill -KILL -f '{pattern}'"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for host in self._others
        ]
        deadline = time.monotonic() + 2 * SSH_SECONDS
        for process in running:
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _session(leader: int) -> list[psutil.Process]:
    """Living processes of a session."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
        except (OSError, psutil.Error):
            continue
    return members


def say(text: str) -> None:
    """Tell the user, beside the ranks' output."""
    print(text, file=sys.stderr, flush=True)
