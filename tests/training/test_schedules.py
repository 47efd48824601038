"""Whole runs of shortcut-connected experts: their schedule changes no bit of what is trained, at any ZeRO stage."""

import re
from itertools import product
from pathlib import Path

import pytest
import torch
from small_runs import records, train

from occult_train.checkpoint.store import Checkpoint, open_checkpoint
from occult_train.moe.overlap import MEASURED, WARMUP
from occult_train.monitor import Monitor
from occult_train.testing import run_distributed

SHORTCUT = [
    *("model.scmoe.block=scmoe", "model.scmoe.position=pos2", "model.scmoe.combine=cg1", "model.num_experts_per_tok=2"),
    *("model.shared_expert_intermediate_size=24", "model.dense_intermediate_size=24", "data.sequence_length=13"),
    *("model.num_hidden_layers=4", f"train.steps={WARMUP + MEASURED + 2}"),
]
CASES = {
    "stage 0": ["zero.stage=0"],
    "stage 1": ["zero.stage=1", "moe.dispatcher=all_to_all", "train.activation_checkpointing=selective"],
    "stage 2": ["zero.stage=2", "model.scmoe.position=pos3"],
    "stage 3": ["zero.stage=3", "train.activation_checkpointing=selective"],
}
SCHEDULES = ("none", "auto")


def train_all(_rank: int, folder: str, corpus: str, *settings: str) -> dict[str, list[str]]:
    """What each run said of its experts' schedule, by its output."""
    said: dict[str, list[str]] = {}
    say = Monitor.say

    def noted(self: Monitor, text: str) -> None:
        said[str(self.path.parent)].append(text)
        say(self, text)

    Monitor.say = noted  # type: ignore[method-assign]
    for (name, extra), schedule in product(CASES.items(), SCHEDULES):
        output = f"{folder}/{name}/{schedule}"
        said[output] = []
        case = [*extra, f"moe.schedule={schedule}", f"data.path={corpus}", f"output={output}"]
        train(0, [*SHORTCUT, *case, *settings])
    return {output: [line for line in lines if "shortcut experts" in line] for output, lines in said.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> tuple[Path, dict[str, list[str]]]:
    """A folder with a run for each case and schedule, and what rank 0 said."""
    folder = tmp_path_factory.mktemp("schedules")
    return folder, run_distributed(train_all, 2, str(folder), corpus, timeout=400)[0]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    checkpoint: Checkpoint = open_checkpoint(run)
    return {name: checkpoint.read(name) for name in checkpoint.entries}


@pytest.mark.parametrize("case", CASES)
def test_losses_weights_and_moments_are_the_same_bits(trained: tuple[Path, dict[str, list[str]]], case: str) -> None:
    check_same_bits(trained[0], case)


@pytest.mark.slow
@pytest.mark.parametrize("expert", [2, 4])
def test_four_ranks_train_the_same_bits(tmp_path: Path, corpus: str, expert: int) -> None:
    run_distributed(train_all, 4, str(tmp_path), corpus, f"parallel.expert={expert}", timeout=500)
    for case in CASES:
        check_same_bits(tmp_path, case)


def check_same_bits(runs: Path, case: str) -> None:
    steps, others = (
        [line for line in records(runs / case / schedule) if line["kind"] == "step"] for schedule in SCHEDULES
    )
    assert len(steps) == WARMUP + MEASURED + 2
    assert steps == others
    right, values = (tensors(runs / case / schedule) for schedule in SCHEDULES)
    assert values.keys() == right.keys()
    assert [name for name in right if not torch.equal(values[name], right[name])] == []


def test_only_auto_chooses_and_the_log_says_what(trained: tuple[Path, dict[str, list[str]]]) -> None:
    for output, lines in trained[1].items():
        assert len(lines) == (Path(output).name == "auto"), output
        last = 4 if "stage 2" in output else 3
        for line in lines:
            assert re.match(rf"step {WARMUP + MEASURED}: shortcut experts: in gap [0-{last}] of 0 to {last} ", line)
