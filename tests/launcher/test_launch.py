"""Launches from start to end: how ranks are found, how a failure ends them all, how a stop is answered."""

import re
import signal
import sys
import time
from pathlib import Path

import pytest
from launching import BIN, Start

from occult_train.distributed import free_port

BOUND = 30.0
"""Seconds within which a job must end after a rank failed. It takes 2 to 4 on an idle machine."""

FAKE_PDSH = """#!/bin/bash
# pdsh -S -f N -w HOSTS COMMAND...: run COMMAND once for each host, here, with %n replaced by the host's number
while [ "$1" != "-w" ]; do shift; done
count=$(echo "$2" | tr ',' '\\n' | wc -l); shift 2; code=0; words="$*"
for ((n = 0; n < count; n++)); do bash -c "${words//%n/$n}" & done
for job in $(jobs -p); do wait "$job" || code=$?; done
exit $code
"""


def test_ctrl_c_saves_and_ends_well(start: Start, occult: list[str]) -> None:
    command = start(occult, "steps")
    command.wait_for("started-1")
    command.signal(signal.SIGINT)
    ended = command.end(BOUND)
    assert ended.code == 0, ended.out
    run = command.folder / "run"
    assert (run / "saved-0").read_text() == (run / "saved-1").read_text()
    assert ended.out.splitlines() == [
        "starting 2 ranks on CPU (parallel.expert=2)",
        "stopping: saving a checkpoint; press Ctrl-C again to stop at once",
    ]
    assert not command.left_behind()
    assert not (run / ".launch").exists()
    assert not (run / "errors").exists()


@pytest.mark.slow
def test_ctrl_c_twice_ends_ranks_that_do_not_listen(start: Start, occult: list[str]) -> None:
    command = start(occult, "deaf")
    command.wait_for("started-1")
    command.signal(signal.SIGINT)
    command.wait_for_text("stopping: saving")
    time.sleep(1)
    assert command.left_behind()
    command.signal(signal.SIGINT)
    ended = command.end(BOUND)
    assert ended.code == 130
    assert ended.seconds < 10
    assert not command.left_behind()
    assert "Traceback" not in ended.out


@pytest.mark.slow
def test_ranks_save_and_stop_when_the_command_is_killed(start: Start, occult: list[str]) -> None:
    command = start(occult, "steps")
    command.wait_for("started-1")
    command.signal(signal.SIGKILL)
    assert command.end(BOUND).code == -signal.SIGKILL
    deadline = time.monotonic() + BOUND
    while command.left_behind() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not command.left_behind()
    assert (command.folder / "run" / "saved-1").exists()


def test_sigterm_before_any_rank_is_set_up(start: Start, occult: list[str]) -> None:
    command = start(occult, "deaf")
    command.wait_for_text("starting 2 ranks")
    time.sleep(1)
    command.signal(signal.SIGTERM)
    ended = command.end(BOUND)
    assert ended.code == 143
    assert ended.seconds < 10
    assert ended.out.splitlines()[1:] == ["stopping: no rank had started training"]
    assert not command.left_behind()


def test_a_killed_rank_ends_the_job(start: Start, occult: list[str]) -> None:
    command = start(occult, "kill")
    command.wait_for("dying")
    ended = command.end(BOUND)
    assert ended.code not in (0, 2)
    lines = ended.out.splitlines()
    assert re.fullmatch(
        r"occult: rank 1 on host \S+ at step 7: process \d+ ended without a report: killed, or out of memory\?",
        lines[-2],
    )
    assert "Traceback" not in ended.out
    assert not command.left_behind()


def test_a_job_that_failed_is_started_again(start: Start, occult: list[str]) -> None:
    command = start([*occult, "--restarts", "3"], "kill_once")
    ended = command.end()
    assert ended.code == 0, ended.out
    said = [line for line in ended.out.splitlines() if line.startswith(("occult: ", "starting "))]
    assert [said[0], *said[2:]] == [
        "starting 2 ranks on CPU (parallel.expert=2)",
        f"occult: full report: {next(iter((command.folder / 'run' / 'errors').iterdir()))}",
        "occult: starting again from the last complete checkpoint (1 of 3)",
        "starting 2 ranks on CPU (parallel.expert=2)",
    ]
    assert "rank 1 on host" in said[1]


def test_a_failing_rank_ends_all_hosts_and_is_shown_first(start: Start, occult: list[str], tmp_path: Path) -> None:
    """DeepSpeed itself leaves rank 0 in its barrier, for its launcher on another host sees nothing amiss."""
    (tmp_path / "pdsh").write_text(FAKE_PDSH)
    (tmp_path / "pdsh").chmod(0o755)
    (tmp_path / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    hosts = ["--hostfile", str(tmp_path / "hosts"), "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command = start([*occult, *hosts], "raise", {"PATH": f"{tmp_path}:{BIN}:/usr/bin:/bin"})
    command.wait_for_text("failed:")
    ended = command.end(BOUND)
    assert ended.code == 1, ended.out
    ours = [line for line in ended.out.splitlines() if "rank 1 on" in line or "rank 0" in line or "Error:" in line]
    assert re.fullmatch(r"rank 1 on host \S+ failed:", ours[0])
    assert ours[1] == "ValueError: expert 5 is on fire"
    assert re.fullmatch(r"occult: rank 1 on host \S+ at step 7 failed: ValueError: expert 5 is on fire", ours[-1])
    assert ended.out.count("Traceback") == 1
    (report,) = (tmp_path / "run" / "errors").iterdir()
    assert ended.out.splitlines()[-1] == f"occult: full report: {report}"
    assert 'raise ValueError("expert 5 is on fire")' in report.read_text()
    assert not command.left_behind()


def test_the_deepspeed_command_by_hand_says_a_users_mistake_once(start: Start, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    local = ["--no_ssh_check", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    hosts = ["--hostfile", str(tmp_path / "hosts"), *local]
    ended = start([str(BIN / "deepspeed"), *hosts, "--module", "fake_rank"], "user").end()
    assert ended.code == 2
    assert ended.out.count("data.path=user does not exist") == 1
    assert "error: data.path=user does not exist" in ended.out.splitlines()
    assert "Traceback" not in ended.out


def test_mpirun_finds_its_ranks(start: Start) -> None:
    command = start([str(BIN / "mpirun"), "-n", "2", sys.executable, "-m", "fake_rank"], "succeed")
    ended = command.end()
    assert ended.code == 0, ended.out
    run = command.folder / "run"
    assert [(run / f"note-{rank}").read_text() for rank in (0, 1)] == ["0 2 1 0", "1 2 1 1"]


def test_a_plain_module_is_one_rank(start: Start) -> None:
    words = [sys.executable, "-m", "fake_rank", "--local_rank=0"]
    command = start(words, "succeed", settings=["parallel.expert=1"])
    ended = command.end()
    assert ended.code == 0, ended.out
    assert (command.folder / "run" / "note-0").read_text() == "0 1 0 0"
