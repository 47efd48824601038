"""The trainer on a real corpus: a resumed run is the run that was never stopped, and held-out loss is what it says."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import SMALL, records, train
from torch.nn import functional as F

from occult_train.checkpoint.store import Checkpoint, open_checkpoint
from occult_train.inference import load_model
from occult_train.testing import RankError, run_distributed


def assert_same(left: Checkpoint, right: Checkpoint) -> None:
    assert left.entries.keys() == right.entries.keys()
    for name in left.entries:
        assert torch.equal(left.read(name), right.read(name)), name
    for name in ("step", "consumed_samples", "adam_step", "expert_bias", "loss_scale", "rng"):
        assert left.state[name] == right.state[name], name


@pytest.mark.parametrize(
    "extra",
    [
        ["zero.stage=1", "moe.balance=bias", "moe.bias_update_rate=0.01"],
        [
            *("zero.stage=3", "moe.aux_loss_scope=global_batch", "train.activation_checkpointing=selective"),
            "model.tie_word_embeddings=true",
        ],
        ["zero.stage=2", "train.precision=bf16", "data.mask_documents=true"],
    ],
    ids=["stage 1, bias", "stage 3, global aux loss, tied", "stage 2, bf16, documents"],
)
def test_resumed_run_is_the_undisturbed_run(tmp_path: Path, corpus: str, extra: list[str]) -> None:
    common = [f"data.path={corpus}", "train.steps=6", *extra]
    run_distributed(train, 2, [*common, f"output={tmp_path}/whole"], timeout=240)
    halves = [*common, f"output={tmp_path}/halves", "checkpoint.interval=2"]
    run_distributed(train_until, 2, halves, 3, timeout=240)
    assert open_checkpoint(tmp_path / "halves").step in (4, 5)  # the ranks agree one step later
    run_distributed(train, 2, halves, timeout=240)
    assert_same(open_checkpoint(tmp_path / "whole"), open_checkpoint(tmp_path / "halves"))
    assert records(tmp_path / "whole") == records(tmp_path / "halves")


def train_until(rank: int, arguments: list[str], step: int) -> int:
    """Train; in step `step` + 1 rank 1 gets a SIGTERM, as from a scheduler."""
    from occult_train import trainer
    from occult_train.faults import StopSignal

    StopSignal().install()
    train_step = trainer.Trainer._train_step

    def interrupted(self: Any, batches: Any) -> None:
        if rank == 1 and self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        train_step(self, batches)

    trainer.Trainer._train_step = interrupted  # type: ignore[method-assign]
    return train(rank, arguments)


def test_sigterm_on_one_rank_saves_and_ends_all_well(tmp_path: Path, corpus: str) -> None:
    arguments = [f"data.path={corpus}", "train.steps=1000", f"output={tmp_path}/run"]
    assert run_distributed(train_until, 2, arguments, 2, timeout=240) == [0, 0]
    step = open_checkpoint(tmp_path / "run").step
    assert 3 <= step <= 5, "saved as soon as the ranks agreed"


def test_sigterm_to_the_command_saves_and_exits_0(tmp_path: Path, corpus: str) -> None:
    """As a batch system does it: `occult train`, DeepSpeed's launcher and the ranks in processes of their own."""
    run = tmp_path / "run"
    settings = [*SMALL, f"data.path={corpus}", "train.steps=100000", f"output={run}"]
    command = [sys.executable, "-m", "occult_train.launcher.cli", "train", *settings]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while not (run / "log.jsonl").exists() or not records(run):
            assert process.poll() is None, (tmp_path / "out").read_text()
            assert time.monotonic() < deadline, (tmp_path / "out").read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, (tmp_path / "out").read_text()
    finally:
        process.kill()
    checkpoint = open_checkpoint(run)
    assert checkpoint.step == records(run)[-1]["step"] < 100000
    for name in checkpoint.entries:
        checkpoint.read(name)


def test_finished_run_trains_no_further(tmp_path: Path, corpus: str) -> None:
    arguments = [f"data.path={corpus}", "train.steps=2", f"output={tmp_path}/run"]
    run_distributed(train, 2, arguments, timeout=240)
    before = (tmp_path / "run" / "checkpoints" / "step-00000002" / "checkpoint.json").read_bytes()
    first = records(tmp_path / "run")
    run_distributed(train, 2, arguments, timeout=240)
    assert (tmp_path / "run" / "checkpoints" / "step-00000002" / "checkpoint.json").read_bytes() == before
    assert records(tmp_path / "run")[: len(first)] == first


def test_held_out_loss_is_that_of_the_first_sequences(tmp_path: Path, corpus: str) -> None:
    """7 sequences over 2 ranks and micro-batches of 2, against one process that reads the .bin file itself."""
    arguments = [f"data.path={corpus}", "train.steps=2", f"output={tmp_path}/run"]
    run_distributed(train, 2, arguments, timeout=240)
    (line,) = [r for r in records(tmp_path / "run") if r["kind"] == "evaluation"]
    model = load_model(open_checkpoint(tmp_path / "run"))
    tokens = torch.from_numpy(np.fromfile(f"{corpus}/valid.bin", dtype="<u2").astype(np.int64))
    losses = []
    for i in range(7):
        piece = tokens[i * 32 : i * 32 + 33]
        with torch.no_grad():
            losses.append(F.cross_entropy(model(piece[None, :-1])[0], piece[1:]).item())
    assert line["sequences"] == 7
    assert abs(line["loss"] - np.mean(losses)) < 1e-5


def test_monitor_counts_what_routing_predicts(tmp_path: Path, corpus: str) -> None:
    """Rows by pass are equal in sum over ranks, dedup sends no more than K copies, and C_T is within its bounds."""
    for dispatcher in ("dedup", "all_to_all"):
        arguments = [f"data.path={corpus}", "train.steps=2", f"output={tmp_path}/{dispatcher}"]
        run_distributed(train, 2, [*arguments, f"moe.dispatcher={dispatcher}"], timeout=240)
    dedup, copies = (records(tmp_path / d) for d in ("dedup", "all_to_all"))
    for ours, theirs in zip(dedup, copies, strict=True):
        if ours["kind"] != "step":
            continue
        assert abs(ours["loss"] - theirs["loss"]) < 1e-5
        for a, b in zip(ours["layers"], theirs["layers"], strict=True):
            assert len(set(a["rows_sent"].values())) == 1
            assert sum(b["rows_sent"].values()) == b["copies_rows"] == a["copies_rows"]
            assert b["bytes_sent"] == b["copies_bytes"]
            assert sum(a["rows_sent"].values()) < a["copies_rows"]
            assert 1 <= a["c_t"] <= 2


def fill_disk(rank: int, arguments: list[str]) -> str:
    """Train on a disk that takes no second log line; the message of the error on rank 0."""
    import errno

    from occult_train import runlog
    from occult_train.errors import UserError

    append, taken = runlog.append, []

    def append_once(path: Path, record: dict[str, Any]) -> None:
        if taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        taken.append(1)
        append(path, record)

    runlog.append = append_once
    with pytest.raises(UserError) as raised:
        train(rank, arguments)
    return str(raised.value)


def test_a_disk_that_is_full_of_logs_is_a_users_matter(tmp_path: Path, corpus: str) -> None:
    arguments = ["parallel.expert=1", f"data.path={corpus}", f"output={tmp_path}/run", "train.steps=3"]
    (message,) = run_distributed(fill_disk, 1, arguments, timeout=240)
    assert message == f"output={tmp_path}/run cannot be written: No space left on device"


def test_a_run_that_began_with_another_s_checkpoint_goes_on_with_its_own(tmp_path: Path, corpus: str) -> None:
    """The same command continues; a folder's own older checkpoint can be gone back to. Names may hold a "="."""
    base, run = tmp_path / "lr=1e-3", tmp_path / "run"
    common = ["parallel.expert=1", f"data.path={corpus}", "checkpoint.keep=0"]
    run_distributed(train, 1, [*common, f"output={base}", "train.steps=2"], timeout=240)
    mine = [*common, f"output={run}", f"checkpoint.resume={base}"]
    run_distributed(train, 1, [*mine, "train.steps=3"], timeout=240)
    assert [record["step"] for record in records(run)] == [3, 3]
    (run / "checkpoints" / "step-00000003" / "mark").touch()
    run_distributed(train, 1, [*mine, "train.steps=4"], timeout=240)
    assert [record["step"] for record in records(run)] == [3, 3, 4, 4]
    assert (run / "checkpoints" / "step-00000003" / "mark").exists(), "not made again"
    back = [*common, f"output={run}", f"checkpoint.resume={run}/checkpoints/step-00000003", "train.steps=4"]
    run_distributed(train, 1, back, timeout=240)
    assert [record["step"] for record in records(run)] == [3, 3, 4, 4]
    assert load_model(open_checkpoint(base)).config == load_model(open_checkpoint(run)).config


@pytest.mark.parametrize("stage", [0, 1])
def test_weights_that_are_no_numbers_are_not_saved(stage: int, tmp_path: Path, corpus: str) -> None:
    """The first step throws the weights far off; what follows is not finite, and no log line would have told."""
    settings = [f"data.path={corpus}", f"output={tmp_path}/run", f"zero.stage={stage}", "train.steps=9"]
    settings += ["optimizer.lr=1e30", "scheduler.warmup_steps=0", "checkpoint.interval=1", "monitor.interval=100"]
    with pytest.raises(RankError, match=r"gradient norm is (nan|inf) at step [23], which is not saved"):
        run_distributed(train, 2, settings, timeout=240)
    saved = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert saved in (["step-00000001"], ["step-00000001", "step-00000002"])
    assert open_checkpoint(tmp_path / "run" / "checkpoints" / saved[-1]).step == len(saved)


def train_and_listen(rank: int, arguments: list[str]) -> list[str]:
    """Train on a slow disk; what the user was told about checkpoints."""
    from occult_train.checkpoint.shards import ShardWriter
    from occult_train.monitor import Monitor

    said, append = [], ShardWriter.append

    def slowly(self: ShardWriter, name: str, data: memoryview) -> None:
        time.sleep(0.02)
        append(self, name, data)

    Monitor.say = lambda _self, text: said.append(text)  # type: ignore[method-assign]
    ShardWriter.append = slowly  # type: ignore[method-assign]
    train(rank, arguments)
    return [re.sub(r"[\d.]+ s\b", "N s", line) for line in said if re.search("saved|waited", line)]


def test_what_had_to_wait_for_the_disk_is_said(tmp_path: Path, corpus: str) -> None:
    """A second save begins before the first is written; a part of each is more than its memory takes."""
    wide = ["model.hidden_size=64", "model.intermediate_size=128", "train.steps=3", "checkpoint.interval=1"]
    common = [*wide, f"data.path={corpus}", f"output={tmp_path}/run", "checkpoint.buffer_gib=0.002"]
    said = run_distributed(train_and_listen, 2, common, timeout=240)[0]
    places = [f"{tmp_path}/run/checkpoints/step-0000000{step}" for step in (1, 2, 3)]
    assert said == [
        "step 1: checkpoint.buffer_gib=0.002 holds less than the 0.00253 GiB that a rank saves; training waited for "
        "the rest to be written",
        "step 2: waited N s for the checkpoint of step 1",
        f"step 1: saved {places[0]} in N s, beside training but for N s",
        "step 3: waited N s for the checkpoint of step 2",
        f"step 2: saved {places[1]} in N s, beside training but for N s",
        f"step 3: saved {places[2]} in N s, beside training but for N s",
    ]
    said = run_distributed(train_and_listen, 2, [*common, "checkpoint.background=false", "train.steps=4"], timeout=240)[
        0
    ]
    assert said == [f"step 4: saved {tmp_path}/run/checkpoints/step-00000004 in N s"]
