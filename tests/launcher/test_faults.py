"""Stop signals and reports of a single process, and the files that ranks share."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from occult_train.errors import ConfigError, UserError
from occult_train.jobfiles import Failure, JobFiles, RankProcess, new_launch
from occult_train.launcher.faults import explain

LISTEN = """
import time
from occult_train.faults import StopSignal
stop = StopSignal()
stop.install(grace={grace})
print("ready", flush=True)
end = time.monotonic() + {seconds}
while time.monotonic() < end and not ({look} and stop.requested):
    time.sleep(0.05)
time.sleep({saving})
print("saved", flush=True)
"""


def _listener(**values: float) -> subprocess.Popen[str]:
    code = LISTEN.format(**values)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_saving_may_take_longer_than_the_grace(number: int) -> None:
    process = _listener(grace=0.5, seconds=20, look=1, saving=2)
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "saved\n")


def test_a_process_that_does_not_look_is_ended() -> None:
    process = _listener(grace=1, seconds=60, look=0, saving=0)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (143, "")
    assert err == "rank 0 did not stop within 1 s of the signal and was ended\n"


def test_ctrl_c_again_ends_at_once() -> None:
    process = _listener(grace=60, seconds=60, look=1, saving=60)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)  # as launchers do on top
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == 130


def test_a_rank_whose_starter_is_gone_is_asked_to_stop(tmp_path: Path) -> None:
    starter = subprocess.Popen(["sleep", "60"])
    files = JobFiles(tmp_path, "launch")
    files.create()
    files.expect(RankProcess(-1, socket.gethostname(), starter.pid, psutil.Process(starter.pid).create_time()))
    code = "import sys, time\nfrom occult_train import faults\nfrom occult_train.jobfiles import JobFiles\n"
    code += "stop = faults.StopSignal(); stop.install(); faults.join(JobFiles(sys.argv[1], 'launch'))\n"
    code += "time.sleep(1); print(stop.requested, flush=True)\nwhile not stop.requested: time.sleep(0.05)"
    rank = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    assert rank.stdout.readline() == "False\n"
    starter.kill()
    starter.wait()
    assert rank.wait(timeout=10) == 0


def test_a_forked_child_keeps_its_signals_to_itself() -> None:
    code = "import os, signal, time\nfrom occult_train.faults import StopSignal\nstop = StopSignal()\nstop.install()\n"
    code += "child = os.fork()\nif not child: os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)\n"
    code += "print(os.waitpid(child, 0)[1]); time.sleep(1); print(stop.requested)\n"
    code += "stop.uninstall(); print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout.split() == ["15", "False", "True"]


def test_a_mistake_before_the_ranks_meet_is_said_by_one_rank_of_a_host(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "occult_train.train", "--local_rank=1", "nowhere.yaml"]
    said = []
    for local in ("LOCAL_RANK", "MPI_LOCALRANKID"):
        ranks = [
            subprocess.Popen(words, env={**os.environ, local: str(r)}, stderr=subprocess.PIPE, text=True)
            for r in (0, 1)
        ]
        said += [rank.communicate(timeout=20)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [2, 2]
    assert said == 2 * ["error: config file nowhere.yaml does not exist\n", ""]


def test_a_mistake_that_the_first_rank_of_a_host_does_not_see_is_said(tmp_path: Path) -> None:
    """The first rank lives on, so another must speak."""
    first = subprocess.Popen(["sleep", "60"], env={**os.environ, "LOCAL_RANK": "0"})
    words = [sys.executable, "-m", "occult_train.train", "nowhere.yaml"]
    second = subprocess.run(
        words, env={**os.environ, "LOCAL_RANK": "1"}, capture_output=True, text=True, timeout=20, check=False
    )
    first.kill()
    first.wait()
    assert (second.returncode, second.stderr) == (2, "error: config file nowhere.yaml does not exist\n")


def test_a_port_in_use_is_a_users_matter(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        words = [sys.executable, "-m", "occult_train.train", f"output={tmp_path}/run"]
        done = subprocess.run(words, env={**os.environ, **ranks}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"error: port {port} is in use; choose another with --master-port" in done.stderr.splitlines()


def _failure(rank: int = 3) -> Failure:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        return Failure.of(error, rank, 12)


def test_a_report_reads_back(tmp_path: Path) -> None:
    failure = _failure()
    assert failure.message == "ValueError: two lines"
    assert Failure.from_text(failure.to_text()) == failure
    assert Failure.of(ConfigError("a: b"), 0, None).exit_code == 2
    assert Failure.from_text("").message == "the report is empty (disk full?)"


def test_only_the_first_failure_is_reported(tmp_path: Path) -> None:
    files = JobFiles(tmp_path / "run", new_launch())
    files.create()
    assert files.failure() is None
    assert files.claim(_failure(3)) is None
    assert files.claim(_failure(1)) == _failure(3) == files.failure()
    words = explain(1, files).splitlines()
    assert words[0].startswith("occult: rank 3 on host")
    assert words[0].endswith("at step 12 failed: ValueError: two lines")
    assert words[1] == f"occult: full report: {files.report}"
    assert JobFiles(tmp_path / "run", "another").failure() is None


def test_a_users_mistake_leaves_no_report(tmp_path: Path) -> None:
    files = JobFiles(tmp_path / "run", new_launch())
    files.create()
    files.claim(Failure.of(ConfigError("a: b"), 0, None))
    files.remove()
    assert list((tmp_path / "run").iterdir()) == []


def test_success_needs_the_word_of_rank_0(tmp_path: Path) -> None:
    files = JobFiles(tmp_path / "run", new_launch())
    files.create()
    process = RankProcess.of_this_process(0)
    assert files.starter() is None
    files.expect(process)
    assert files.starter() == process
    files.enter(process)
    assert files.ranks() == [process]
    assert process.is_alive()
    assert not RankProcess(0, process.host, process.pid, process.started - 100).is_alive()
    files.leave(process, well=False)
    assert not files.ended_well()
    files.leave(process, well=True)
    assert files.ended_well()


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output=.*file/run cannot be written: Not a directory"):
        JobFiles(tmp_path / "file" / "run", new_launch()).create()
    if Path("/dev/full").exists():
        with pytest.raises(UserError, match=r"output=/dev/full cannot be written"):
            JobFiles("/dev/full", new_launch()).create()


@pytest.mark.parametrize(
    "code, words",
    [
        (2, ""),
        (247, "occult: the job ended without a report from a rank: exit code 247, killed by SIGKILL (out of memory?)"),
        (137, "occult: the job ended without a report from a rank: exit code 137, killed by SIGKILL (out of memory?)"),
        (1, "occult: the job ended without a report from a rank: exit code 1"),
    ],
)
def test_a_job_without_a_report(tmp_path: Path, code: int, words: str) -> None:
    assert explain(code, JobFiles(tmp_path, "none")) == words


def test_a_report_finds_room_on_a_disk_that_fills_up_later(tmp_path: Path) -> None:
    """The room is there while the launch runs, gives way to the report, and is gone when a rank ends well."""
    files = JobFiles(tmp_path / "run", "launch")
    files.create()
    (room,) = (tmp_path / "run" / ".launch" / "launch").iterdir()
    assert room.stat().st_blocks * 512 >= len(_failure().to_text())
    assert files.claim(_failure()) is None
    assert not room.exists()
    assert files.failure() == _failure()
    again = JobFiles(tmp_path / "run", "again")
    again.create()
    again.leave(RankProcess.of_this_process(0), well=True)
    assert not (tmp_path / "run" / ".launch" / "again").exists()
