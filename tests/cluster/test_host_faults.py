"""What goes wrong on one of two hosts ends the whole job within a bound, with one report and nothing left behind."""

import re
import subprocess
from pathlib import Path

import pytest
from host_runs import FAULTY, left_on, with_fault

from occult_train.tools.bench import hosts
from occult_train.tools.bench.hosts import Host

pytestmark = pytest.mark.cluster
LOST_AFTER = 10.0
BOUND = 75.0
"""Seconds from a fault to the end of the job: 10 until silence counts, 20 + 10 for launchers to give up a host that
does not answer; the rest is a busy machine's."""
FROM = r"from process \d+: killed, out of memory or stopped\?"
SETTINGS = ["train", "--hostfile", "hosts", "a.yaml", "output=run", "parallel.expert=2"]
SETTINGS += [f"parallel.lost_after={LOST_AFTER}"]


def headline(out: str) -> str:
    """The last words of `occult` but for where the report lies; said once."""
    lines = [line for line in out.splitlines() if line.startswith("occult: ")]
    assert re.fullmatch(r"occult: full report: run/errors/\S+\.txt", lines[-1]), out
    assert len(lines) == 2, out
    return lines[0]


@pytest.mark.parametrize(
    "kind, rank, expected",
    [
        ("fail", 1, r"rank 1 on host node1 at step 2 failed: ValueError: expert 5 is on fire"),
        ("memory", 1, r"rank 1 on host node1 at step 2 failed: MemoryError"),
        ("nan", 1, r"rank \d on host node\d at step 3 failed: .*the loss is nan at step 3; the last checkpoint is .*"),
        ("kill", 1, rf"rank 1 on host node1 at step 2: no sign of life for 5 s {FROM}"),
        ("kill", 0, r"rank 0 on host node0 at step \d: process \d+ is gone: killed, or out of memory\?"),
        ("stop", 1, rf"rank 1 on host node1 at step 2: no sign of life for 10 s {FROM}"),
        ("stop", 0, r"rank 0 on host node0 at step \d: no sign of life for 10 s: host down, .* stopped\?"),
        ("dawdle", 1, r"rank 1 on host node1 at step 2: no step has ended for 30 s .*; 1 of 2 ranks wait for this one"),
    ],
)
def test_a_rank_that_fails_ends_the_job(
    two: list[Host], one_rank_each: Path, kind: str, rank: int, expected: str
) -> None:
    words = [*FAULTY, *SETTINGS, "parallel.stuck_after=30"] if kind == "dawdle" else [*FAULTY, *SETTINGS]
    ended = with_fault(two[0], words, one_rank_each, {"kind": kind, "rank": rank, "step": 2}, BOUND)
    assert ended.code == (256 - 9 if kind == "kill" else 1), ended.out
    assert re.fullmatch(f"occult: {expected}", headline(ended.out)), ended.out
    assert ended.out.count("Traceback") == (kind in ("fail", "memory", "nan")), ended.out
    assert left_on(two) == []


@pytest.mark.parametrize("lost", [1, 0])
def test_a_host_that_is_cut_off_ends_the_job_on_both_sides(two: list[Host], one_rank_each: Path, lost: int) -> None:
    """Its own ranks end too, without anybody's help."""
    fault = {"kind": "carry_on", "rank": 1 - lost, "step": 2, "pause": 0.2}
    words = [*FAULTY, *SETTINGS, "train.steps=500"]
    ended = with_fault(two[0], words, one_rank_each, fault, BOUND, two[lost].cut_off)
    assert ended.code == 1, ended.out
    # the disk is shared even when the network is not, so either side may be the first to report the other
    assert re.match(r"occult: rank \d on host node\d at step \d+: no sign of life for 10 s", headline(ended.out)), (
        ended.out
    )
    assert left_on(two) == []


def test_a_host_that_is_down_ends_the_job(two: list[Host], one_rank_each: Path) -> None:
    fault = {"kind": "carry_on", "rank": 0, "step": 2, "pause": 0.2}
    words = [*FAULTY, *SETTINGS, "train.steps=500"]
    ended = with_fault(two[0], words, one_rank_each, fault, BOUND, two[1].lose)
    assert ended.code == 1, ended.out
    assert re.match(r"occult: rank 1 on host node1 at step \d+: no sign of life", headline(ended.out)), ended.out
    assert left_on(two[:1]) == []


def test_a_full_disk_while_saving_is_one_line_and_keeps_the_checkpoint_before(
    one_rank_each: Path, allowed: None
) -> None:
    """The disk is shared by both hosts and fills up before the second save."""
    disk = one_rank_each / "run"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], check=True)
    try:
        with hosts.cluster(2) as made:
            fault = {"kind": "carry_on", "rank": 1, "step": 3}

            def fill() -> None:
                subprocess.run(["dd", "if=/dev/zero", f"of={disk}/filler", "bs=1k"], capture_output=True, check=False)

            fault["pause"] = 0.5
            words = [*FAULTY, *SETTINGS, "train.steps=50", "checkpoint.interval=2"]
            ended = with_fault(made[0], words, one_rank_each, fault, BOUND, fill)
            assert ended.code == 2, ended.out
            said = [line for line in ended.out.splitlines() if "error: " in line]
            assert len(said) == 1, ended.out
            assert re.search(
                r"error: a checkpoint cannot be written to run/checkpoints: rank \d: No space left on device; it has "
                r"[\d,]+ bytes, [\d,]+ are free; the last complete checkpoint is run/checkpoints/step-0000000\d|"
                r"(output=run|run/log\.jsonl) cannot be written: No space left",
                said[0],
            ), ended.out
            assert left_on(made) == []
        assert list((disk / "checkpoints").glob("step-*[0-9]/checkpoint.json"))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
