"""Training a part of the model: the rest keeps its bits at every ZeRO stage, and runs resume bit for bit."""

import re
from pathlib import Path

import pytest
import torch
from small_runs import records, train
from test_pruned_runs import refusals
from test_trainer import assert_same, train_until

from occult_train.checkpoint.store import Checkpoint, open_checkpoint
from occult_train.testing import run_distributed


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> Path:
    run = tmp_path_factory.mktemp("trainable") / "base"
    run_distributed(train, 2, [f"data.path={corpus}", f"output={run}", "train.steps=2"], timeout=240)
    return run


def settings(base: Path, corpus: str, run: Path, *extra: str) -> list[str]:
    return [f"data.path={corpus}", f"checkpoint.resume={base}", f"output={run}", "train.steps=4", *extra]


def weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.read(name) for name in checkpoint.entries if "/" not in name}


@pytest.fixture(scope="module")
def tuned(base: Path, corpus: str) -> Path:
    """The experts of `base` trained on, at stage 1."""
    run = base.parent / "tuned"
    run_distributed(train, 2, settings(base, corpus, run, "train.trainable=moe", "zero.stage=1"), timeout=240)
    return run


def test_what_is_frozen_keeps_its_bits_and_has_no_moments(base: Path, tuned: Path) -> None:
    before, after = weights(open_checkpoint(base)), weights(open_checkpoint(tuned))
    assert before.keys() == after.keys()
    for name, value in before.items():
        inside = re.match(r"layers\.\d+\.moe\.", name) is not None
        assert torch.equal(value, after[name]) != inside, name
        assert (f"exp_avg/{name}" in open_checkpoint(tuned).entries) == inside, name


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_stage_trains_the_same(stage: int, base: Path, tuned: Path, corpus: str, tmp_path: Path) -> None:
    extra = ["train.trainable=moe", f"zero.stage={stage}", "train.activation_checkpointing=selective"]
    run_distributed(train, 2, settings(base, corpus, tmp_path / "run", *extra), timeout=240)
    ours, right = weights(open_checkpoint(tmp_path / "run")), weights(open_checkpoint(tuned))
    for name, value in right.items():
        assert float((ours[name] - value).norm() / value.norm()) < 1e-5, name
    for one, two in zip(records(tmp_path / "run"), records(tuned), strict=True):
        assert abs(one["loss"] - two["loss"]) < 1e-5
        assert abs(one.get("grad_norm", 0) - two.get("grad_norm", 0)) < 1e-4


def test_a_resumed_run_is_the_undisturbed_one_and_may_thaw(base: Path, corpus: str, tmp_path: Path) -> None:
    pattern = ["train.trainable=w2$|router", "zero.stage=3", "train.precision=bf16", "train.steps=6"]
    run_distributed(train, 2, settings(base, corpus, tmp_path / "whole", *pattern), timeout=240)
    run_distributed(train_until, 2, settings(base, corpus, tmp_path / "halves", *pattern), 3, timeout=240)
    assert open_checkpoint(tmp_path / "halves").step in (4, 5)
    run_distributed(train, 2, settings(base, corpus, tmp_path / "halves", *pattern), timeout=240)
    assert_same(open_checkpoint(tmp_path / "whole"), open_checkpoint(tmp_path / "halves"))
    thawed = settings(base, corpus, tmp_path / "whole", "train.steps=7", "train.trainable=all", "zero.stage=2")
    run_distributed(train, 2, thawed, timeout=240)
    entries = open_checkpoint(tmp_path / "whole").entries
    assert all(f"exp_avg/{name}" in entries for name in entries if "/" not in name)


def test_mistakes_are_one_line(corpus: str, tmp_path: Path) -> None:
    common = [f"data.path={corpus}", f"output={tmp_path}/run", "parallel.expert=1", "train.steps=1"]
    cases = {
        "train.trainable=experst": "train.trainable=experst is found in no parameter's name, such as layers.0.moe",
        "train.trainable=(a": "train.trainable=(a is not all, moe or a regular expression: missing )",
    }
    (messages,) = run_distributed(refusals, 1, [[*common, words] for words in cases], timeout=240)
    for message, start in zip(messages, cases.values(), strict=True):
        assert message.startswith(start)
