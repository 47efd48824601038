"""A job that failed goes on from its last checkpoint, on the hosts that are left, as if nothing had happened."""

import json
from pathlib import Path

import pytest
from host_runs import FAULTY, left_on, typed, with_fault

from occult_train.tools.bench.hosts import Host

pytestmark = pytest.mark.cluster
STEPS = 9
SETTINGS = ["a.yaml", f"train.steps={STEPS}", "checkpoint.interval=3", "parallel.lost_after=10", "eval.interval=4"]
SETTINGS += ["checkpoint.background=false"]  # so that one of step 6 is complete at step 7
AGAIN = ["--hostfile", "hosts", "--restarts", "2"]


def records(run: Path) -> list[dict[str, object]]:
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "tokens_per_second")} for line in lines]


def undisturbed(host: Host, folder: Path, settings: list[str]) -> list[dict[str, object]]:
    """What the run logs if nothing happens to it, on two ranks of one host."""
    ended = typed(host, [*FAULTY, "train", "--num-gpus", "2", *settings, "output=calm"], folder)
    assert ended.code == 0, ended.out
    return records(folder / "calm")


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(
    two: list[Host],
    one_rank_each: Path,
) -> None:
    settings = [*SETTINGS, "parallel.expert=2"]
    words = [*FAULTY, "train", *AGAIN, *settings, "output=run"]
    ended = with_fault(two[0], words, one_rank_each, {"kind": "kill", "rank": 1, "step": 7}, 200)
    assert ended.code == 0, ended.out
    assert "occult: starting again from the last complete checkpoint (1 of 2)" in ended.out
    assert "continuing run/checkpoints/step-00000006 at step 6" in ended.out
    assert records(one_rank_each / "run") == undisturbed(two[0], one_rank_each, settings)
    assert left_on(two) == []


def test_a_lost_host_is_done_without_if_the_config_allows(
    two: list[Host],
    one_rank_each: Path,
) -> None:
    """Half the ranks accumulate twice as much; sums are in another order then."""
    settings = [*SETTINGS, "parallel.expert=1"]
    words = [*FAULTY, "train", *AGAIN, *settings, "output=run"]
    fault = {"kind": "carry_on", "rank": 0, "step": 4, "pause": 1.0}
    ended = with_fault(two[0], words, one_rank_each, fault, 300, two[1].lose)
    assert ended.code == 0, ended.out
    assert "occult: without node1, which cannot be reached" in ended.out
    got, expected = records(one_rank_each / "run"), undisturbed(two[0], one_rank_each, settings)
    assert [(line["kind"], line["step"]) for line in got] == [(line["kind"], line["step"]) for line in expected]
    for one, other in zip(got, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert left_on(two[:1]) == []


def test_a_lost_host_that_the_config_needs_ends_the_run(
    two: list[Host],
    one_rank_each: Path,
) -> None:
    words = [*FAULTY, "train", *AGAIN, *SETTINGS, "parallel.expert=2", "output=run"]
    fault = {"kind": "carry_on", "rank": 0, "step": 4, "pause": 1.0}
    ended = with_fault(two[0], words, one_rank_each, fault, 150, two[1].lose)
    assert ended.code == 1, ended.out
    assert ended.out.splitlines()[-1] == "occult: not started again: 1 ranks are not divisible by parallel.expert=2"
