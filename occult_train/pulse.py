"""Signs of life between the ranks of a job, over the store in which torch.distributed met: no further port is opened.

Every second each rank says that it lives, at which step it is and whether it waits for others, and asks whether a rank
has failed. Rank 0 misses those that fall silent, and steps that do not end. Rank 0 itself, whose process holds the
store, is missed by everybody. No rank needs another's disk for this.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from occult_train.jobfiles import Failure, RankProcess

BEAT_SECONDS = 1.0
SUSPECT_SECONDS = 5.0
"""Silence that is enough once a connection has broken."""
LEAVING_SECONDS = 3.0
"""Between the end of rank 0 and the last rank's."""


@dataclass(frozen=True)
class Limits:
    """Of patience, in seconds."""

    lost_after: float
    """Without a sign of life."""
    stuck_after: float
    """Without the end of a step."""


class _NoAnswer(RuntimeError):
    """The store's owner has not answered in time."""


@dataclass
class _Seen:
    """What rank 0 has heard of a rank."""

    beat: str
    since: float

    @property
    def step(self) -> int | None:
        """At which it said it was."""
        return json.loads(self.beat)[1]

    @property
    def waits(self) -> bool:
        """Whether it said that it waits for others."""
        return bool(json.loads(self.beat)[2])


class Pulse:
    """This rank's signs of life, in a thread of its own.

    Args:
        rank: of this process.
        limits: of patience.
        step: says at which step it is.
        end: called once with the job's first failure, from the thread.
    """

    def __init__(
        self, rank: int, limits: Limits, step: Callable[[], int | None], end: Callable[[Failure], None]
    ) -> None:
        from torch.distributed import TCPStore

        self._rank, self._limits, self._step, self._end = rank, limits, step, end
        self._main = threading.main_thread().ident
        self._store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=limits.lost_after),
            wait_for_workers=False,
        )
        self._ranks: list[RankProcess] = []
        self._seen: list[_Seen] = []
        self._moved = time.monotonic()
        self._beats = 0
        self._answered = True
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="occult-pulse", daemon=True)
        self._beat()

    def watch(self, ranks: Sequence[RankProcess]) -> None:
        """Begin, once all ranks have been constructed.

        Args:
            ranks: processes of all ranks, in order.
        """
        self._ranks = list(ranks)
        self._moved = time.monotonic()
        self._thread.start()

    def close(self) -> None:
        """End well: silence and broken connections mean nothing from now on."""
        self._closed.set()

    def claim(self, failure: Failure) -> Failure:
        """Tell all ranks of a failure, and return the first that was told of. Without the store, it is this one."""
        if not self._answered:
            return failure
        text = json.dumps(asdict(failure))
        try:
            return Failure(**json.loads(self._ask(lambda: self._store.compare_set(_key("failed"), "", text))))
        except (RuntimeError, ValueError, TypeError):
            return failure

    def suspect(self) -> None:
        """Tell rank 0 that a connection to some rank has broken."""
        try:
            self._ask(lambda: self._store.set(_key("broken"), "1"))
        except RuntimeError:
            return  # rank 0 is the one that is gone, as the thread finds too

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            try:
                found = self._ask(self._round)
            except RuntimeError as error:  # torch's errors of stores are of this class
                found = self._without_store(error)
            if found is not None and not self._closed.is_set():
                self._end(self.claim(found))
                return

    def _round(self) -> Failure | None:
        """One beat, and what is heard."""
        self._beat()
        if self._store.check([_key("failed")]):
            return Failure(**json.loads(self._store.get(_key("failed"))))
        return self._missed() if self._rank == 0 else None

    def _ask(self, question: Callable[[], Any]) -> Any:
        """Ask the store, in a thread: against an owner that is stopped or cut off it has no time-out that works.

        Raises:
            _NoAnswer: none came in time.
            RuntimeError: the store's.
        """
        answers: list[Any] = []
        errors: list[RuntimeError] = []

        def run() -> None:
            try:
                answers.append(question())
            except RuntimeError as error:
                errors.append(error)

        thread = threading.Thread(target=run, name="occult-pulse-question", daemon=True)
        thread.start()
        thread.join(self._limits.lost_after)
        if errors:
            raise errors[0]
        if not answers:
            raise _NoAnswer
        return answers[0]

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(_key(f"beat/{self._rank}"), json.dumps([self._beats, self._step(), self._waits()]))

    def _waits(self) -> bool:
        """Whether the main thread is in a collective, where it waits for whoever is late."""
        frame: Any = sys._current_frames().get(self._main or 0)
        while frame is not None:
            if "/torch/distributed/" in frame.f_code.co_filename:
                return True
            frame = frame.f_back
        return False

    def _without_store(self, error: RuntimeError) -> Failure | None:
        """Rank 0 does not answer. It is gone well if this rank is about to end too."""
        self._answered = False
        if self._closed.wait(LEAVING_SECONDS):
            return None
        first = self._ranks[0]
        text = f"process {first.pid} is gone: killed, or out of memory?"
        if isinstance(error, _NoAnswer):
            text = f"{_silence(self._limits.lost_after)}: host down, cut off or process stopped?"
        return Failure("lost", 0, first.host, self._step(), text)

    def _missed(self) -> Failure | None:
        """What rank 0 makes of everybody's last words."""
        now = time.monotonic()
        beats = [
            beat.decode() for beat in self._store.multi_get([_key(f"beat/{rank}") for rank in range(len(self._ranks))])
        ]
        if not self._seen:
            self._seen = [_Seen(beat, now) for beat in beats]
        steps = [seen.step for seen in self._seen]
        for seen, beat in zip(self._seen, beats, strict=True):
            if beat != seen.beat:
                seen.beat, seen.since = beat, now
        if steps != [seen.step for seen in self._seen]:
            self._moved = now
        patience = (
            min(SUSPECT_SECONDS, self._limits.lost_after)
            if self._store.check([_key("broken")])
            else self._limits.lost_after
        )
        silent = [rank for rank, seen in enumerate(self._seen) if now - seen.since > patience]
        if silent:
            return self._lost(silent, patience)
        return self._stuck() if now - self._moved > self._limits.stuck_after else None

    def _lost(self, silent: list[int], patience: float) -> Failure:
        rank = silent[0]
        host = self._ranks[rank].host
        there = [other for other, process in enumerate(self._ranks) if process.host == host]
        whole = len(there) > 1 and set(there) <= set(silent)
        why = "host down, cut off or stopped?" if whole else "killed, out of memory or stopped?"
        text = (
            f"{_silence(patience)} from {f'any rank of host {host}' if whole else f'process {self._ranks[rank].pid}'}"
        )
        return Failure("lost", rank, host, self._step(), f"{text}: {why}")

    def _stuck(self) -> Failure:
        """Named after the rank for which the others wait, if there is one."""
        working = [rank for rank, seen in enumerate(self._seen) if not seen.waits]
        late = f"no step has ended for {self._limits.stuck_after:.0f} s (parallel.stuck_after)"
        if not 0 < len(working) < len(self._ranks):
            return Failure("lost", 0, self._ranks[0].host, self._seen[0].step, late)
        rank, others = working[0], len(self._ranks) - len(working)
        waiting = f"{late}; {others} of {len(self._ranks)} ranks wait for this one"
        return Failure("lost", rank, self._ranks[rank].host, self._seen[rank].step, waiting)


def _key(name: str) -> str:
    """In the store, which torchrun keeps when it starts ranks anew."""
    return f"occult/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"


def _silence(seconds: float) -> str:
    return f"no sign of life for {seconds:.0f} s"
