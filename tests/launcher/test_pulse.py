"""Signs of life: who is missed, after how long, and what is said of it. Ranks are threads of this process here."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from occult_train import pulse
from occult_train.distributed import free_port
from occult_train.jobfiles import Failure, RankProcess
from occult_train.pulse import Limits, Pulse

RANKS = [RankProcess(rank, f"node{rank // 2}", 100 + rank, 0.0) for rank in range(4)]
STORE = """
import time
from datetime import timedelta
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", {port}, is_master=True, timeout=timedelta(seconds=30), wait_for_workers=False)
print("ready", flush=True)
time.sleep(300)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats are ten times as fast."""
    monkeypatch.setattr(pulse, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(pulse, "SUSPECT_SECONDS", 0.5)
    monkeypatch.setattr(pulse, "LEAVING_SECONDS", 0.3)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))


@pytest.fixture
def store() -> TCPStore:
    """The one that torch.distributed would hold in rank 0's process."""
    seconds = timedelta(seconds=30)
    return TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), None, True, seconds, wait_for_workers=False)


class Job:
    """Four ranks on two hosts, at step 7."""

    def __init__(self, lost_after: float = 2.0, stuck_after: float = 60.0, ranks: int = 4) -> None:
        self.heard: dict[int, Failure] = {}
        self.steps = [7] * ranks
        limits = Limits(lost_after, stuck_after)
        self.pulses = [Pulse(rank, limits, self._step(rank), self._end(rank)) for rank in range(ranks)]
        for one in self.pulses:
            one.watch(RANKS[:ranks])

    def _step(self, rank: int) -> Callable[[], int]:
        return lambda: self.steps[rank]

    def _end(self, rank: int) -> Callable[[Failure], None]:
        return lambda failure: self.heard.update({rank: failure})

    def wait(self, ranks: set[int], seconds: float = 15.0) -> Failure:
        """Until these ranks have heard of a failure, the same one."""
        deadline = time.monotonic() + seconds
        while set(self.heard) != ranks:
            assert time.monotonic() < deadline, self.heard
            time.sleep(0.02)
        assert len({json.dumps(vars(failure)) for failure in self.heard.values()}) == 1
        return self.heard[min(ranks)]


@pytest.fixture
def job(store: TCPStore) -> Iterator[Job]:
    """With all ranks alive."""
    made = Job()
    yield made
    for one in made.pulses:
        one.close()


def test_a_silent_rank_is_missed(job: Job) -> None:
    started = time.monotonic()
    job.pulses[3].close()
    failure = job.wait({0, 1, 2})
    assert 2.0 < time.monotonic() - started < 10
    assert failure.where == "rank 3 on host node1 at step 7"
    assert failure.message == "no sign of life for 2 s from process 103: killed, out of memory or stopped?"


def test_a_silent_host_is_missed(job: Job) -> None:
    for rank in (2, 3):
        job.pulses[rank].close()
    failure = job.wait({0, 1})
    # unless rank 0 looked between the moments at which the two count as silent
    assert failure.where == "rank 2 on host node1 at step 7"
    assert failure.message.startswith(("no sign of life for 2 s from any rank of host node1: host down", "no sign of"))


def test_less_silence_is_enough_once_a_connection_has_broken(job: Job) -> None:
    started = time.monotonic()
    job.pulses[3].close()
    job.pulses[1].suspect()
    job.wait({0, 1, 2})
    assert time.monotonic() - started < 1.9


def test_the_first_failure_is_everybodys(job: Job) -> None:
    first, second = (Failure("error", rank, "node0", 7, f"rank {rank}") for rank in (1, 0))
    assert job.pulses[1].claim(first) == first
    assert job.pulses[0].claim(second) == first
    assert job.wait({0, 1, 2, 3}) == first


def test_ranks_that_live_are_not_missed(job: Job) -> None:
    time.sleep(3)
    assert not job.heard


def test_a_step_that_does_not_end_is_laid_to_the_rank_that_others_wait_for(
    store: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pulse, "_waits", lambda self: self._rank != 2)
    made = Job(lost_after=30, stuck_after=1.0)
    for step in range(8, 14):
        time.sleep(0.3)
        made.steps = [step] * 4
        assert not made.heard
    failure = made.wait({0, 1, 2, 3})
    assert failure.where == "rank 2 on host node1 at step 13"
    assert failure.message == ("no step has ended for 1 s (parallel.stuck_after); 3 of 4 ranks wait for this one")


@pytest.mark.parametrize(
    "number, message",
    [
        (signal.SIGKILL, "process 100 is gone: killed, or out of memory?"),
        (signal.SIGSTOP, "no sign of life for 2 s: host down, cut off or process stopped?"),
    ],
)
def test_rank_0_is_missed_by_all(number: int, message: str) -> None:
    code = STORE.format(port=os.environ["MASTER_PORT"])
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        made = Job(ranks=3)
        made.pulses[0].close()
        process.send_signal(number)
        try:
            failure = made.wait({1, 2})
        finally:
            process.kill()
    assert (failure.where, failure.message) == ("rank 0 on host node0 at step 7", message)
