"""The study of a whole host: a rank that is killed once, and what the reports say of logs and measurements."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from occult_train import runlog
from occult_train.config import Config, to_yaml
from occult_train.errors import UserError
from occult_train.jobfiles import JobFiles, RankProcess
from occult_train.tools.bench.layer_command import LAYER_COLUMNS
from occult_train.tools.bench.results import write_csv
from occult_train.tools.bench.scale_layers import lines_through, name, read, table
from occult_train.tools.bench.scale_report import Training, continuity, main, report
from occult_train.tools.bench.scale_train import KILLED, LOG_KILLED, Killed, kill, last_step
from occult_train.tools.prepare import prepare

ROOT = Path(__file__).parents[2]
SIZES = [
    *("model.hidden_size=32", "model.intermediate_size=16", "model.num_hidden_layers=2", "model.num_attention_heads=4"),
    *("model.num_experts=8", "model.num_experts_per_tok=3", "model.max_position_embeddings=64"),
    *("data.sequence_length=32", "train.precision=fp32", "train.global_batch_size=8", "train.micro_batch_size=1"),
    *("train.steps=28", "scheduler.warmup_steps=0", "eval.interval=20", "eval.sequences=8", "monitor.interval=2"),
    *("checkpoint.interval=16", "moe.replace.interval=16", "moe.replace.window=6"),
]


# ---------------------------------------------------------------- the run


def step_of(step: int, time: float, loss: float) -> dict[str, Any]:
    """A line of the log with two layers, 100 tokens a step and 50 tokens a second."""
    layers = [
        {"c_t": c_t, "intra_share": 0.25, "load_max_over_mean": load, "bytes_sent": 1_000_000}
        for c_t, load in ((3.0, 1.5), (4.0, 2.5))
    ]
    known = {"kind": "step", "step": step, "time": time, "tokens": 100 * step, "loss": loss, "tokens_per_second": 50.0}
    return known | {"layers": layers}


PLACED = {
    "kind": "replacement",
    "step": 4,
    "layers": [
        {"moved": True, "c_t": 4.0, "c_t_expected": 3.0, "load_max_over_mean": 1.5, "load_expected": 1.1},
        {"moved": False, "c_t": 3.0, "c_t_expected": 2.99, "load_max_over_mean": 1.2, "load_expected": 1.0},
    ],
    "experts_moved": 12,
    "solve_seconds": 5.0,
    "move_seconds": 0.25,
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose rank 3 was killed behind step 8 and which went on from step 4, with another loss in step 8."""
    config = Config()
    config.monitor.interval, config.parallel.expert = 2, 4
    config.model.num_experts, config.model.num_experts_per_tok = 8, 2
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    before = [step_of(step, 10.0 + step, 9.0 - step / 2) for step in (1, 2, 4, 6, 8)]
    held_out = {"kind": "evaluation", "step": 10, "loss": 4.5, "sequences": 8}
    again = [step_of(step, 100.0 + step, 9.0 - step / 2) for step in (6, 8, 10)]
    again[1]["loss"] = 5.05
    for file, log in ((LOG_KILLED, before), ("log.jsonl", [*before[:3], PLACED, *again, held_out])):
        (tmp_path / file).write_text("".join(json.dumps(record) + "\n" for record in log))
    (tmp_path / KILLED).write_text(json.dumps(asdict(Killed(rank=3, step=8, time=20.0))))
    return tmp_path


def test_a_report_tells_of_the_kill_and_how_the_curve_goes_on(run: Path, tmp_path: Path) -> None:
    found = Training.read(run)
    assert [(old.step, new.step) for old, new in found.repeated()] == [(6, 6), (8, 8)]
    assert found.missing() == []
    assert found.seconds() == pytest.approx(20)
    assert continuity(found) == (
        "Rank 3 of 4 was killed with -9 after step 8; 86 s later step 6 was logged again. Steps 6 to 8 were trained "
        "twice (2 logged): the loss was 6.0000 to 5.0000 before and 6.0000 to 5.0500 behind the kill, at most 1.0e-02 "
        "apart (relative); no logged step is missing up to step 10."
    )
    lines = report(found).splitlines()
    assert lines[0].startswith("EP=4, 2 experts a token: 10 steps, 0.0 M tokens, 0.3 minutes of steps, 50 tokens/s")
    assert "| 8 | 0.00 | 5.0500 | 3.500 | 25.0% | 2.00 | 2.00 | 50 |" in lines
    assert "Held-out loss: 4.5000 at step 10." in lines
    assert lines[-1] == "| 4 | 1 of 2 | 12 | 3.500 | 3.000 | 1.35 | 1.15 | 5.0 | 0.25 |"


def test_a_report_tells_of_gaps_and_of_no_kill(run: Path) -> None:
    log = [record for record in runlog.read(run / "log.jsonl") if record["step"] != 6]
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    assert "steps [6] are missing up to step 10." in continuity(Training.read(run))
    (run / "log.jsonl").write_text((run / LOG_KILLED).read_text())
    assert continuity(Training.read(run)).endswith("after step 8; no step has been logged since.")
    (run / KILLED).unlink()
    assert continuity(Training.read(run)) == "No rank was killed."
    (run / "log.jsonl").unlink()
    with pytest.raises(UserError, match="has no logged step"):
        Training.read(run)


def test_files_of_a_report(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["scale_report", str(run), str(tmp_path / "out")])
    main()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["training.csv", "training.md", "training.png"]
    with (tmp_path / "out" / "training.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["c_t"], row["bytes_sent"]) for row in rows][-1] == ("10", "3.5", "2000000")


def test_the_last_rank_is_killed_once_and_the_log_kept(tmp_path: Path) -> None:
    sleepers = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)]
    try:
        files = JobFiles(tmp_path, "launch")
        files.create()
        for rank, sleeper in enumerate(sleepers):
            started = psutil.Process(sleeper.pid).create_time()
            files.enter(RankProcess(rank, os.uname().nodename, sleeper.pid, started))
        assert (last_step(tmp_path), kill(tmp_path, 3)) == (0, False)
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(step_of(s, 0.0, 1.0)) + "\n" for s in (1, 2)))
        assert not kill(tmp_path, 3)
        assert kill(tmp_path, 2)
        assert sleepers[1].wait(timeout=10) == -9
        assert kill(tmp_path, 2)
        assert sleepers[0].poll() is None
        assert (tmp_path / LOG_KILLED).read_text() == (tmp_path / "log.jsonl").read_text()
        killed = json.loads((tmp_path / KILLED).read_text())
        assert (killed["rank"], killed["step"]) == (1, 2)
    finally:
        for sleeper in sleepers:
            sleeper.kill()
            sleeper.wait()


@pytest.mark.slow
def test_the_script_trains_through_a_kill(tmp_path: Path) -> None:
    """On CPUs the steps that are trained twice have the same losses, bit for bit."""
    lines = [{"text": f"def f{i}(x):\n    return x + {i % 7} * {i % 11}\n" * 3} for i in range(80)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare([str(tmp_path / "text.jsonl")], tmp_path / "corpus", vocab_size=290, workers=1, valid_fraction=0.2)
    environment = {"KILL_STEP": "22", "RANKS": "4", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["tools/bench/scale_study.sh", tmp_path, tmp_path / "out", "train", tmp_path / "corpus", *SIZES],
        **{"cwd": ROOT, "env": os.environ | environment, "capture_output": True, "text": True, "timeout": 580},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = Training.read(tmp_path / "run")
    assert run.killed is not None
    assert run.killed.rank == 3
    assert run.repeated()[0][0].step == 18
    assert all(old.loss == new.loss for old, new in run.repeated())
    assert (run.missing(), run.points[-1].step) == ([], 28)


# ---------------------------------------------------------------- layers


def test_layers_and_the_line_through_their_times(tmp_path: Path) -> None:
    shared = {"p2p": "off", "shape": "olmoe", "routing": "chosen:/a/b/statistics.safetensors:4", "sent_bytes": 2e6}
    ours = [("", 4.0), (",placement=/a/b.json", 3.0), (",prune=2", 2.0), (",prune=1", 1.0)]
    rows = [
        {"system": f"ours:transport=host{more}", "c_t": c_t, "forward_ms": 2 * c_t + 0.5, "train_ms": 3 * c_t + 1.0}
        for more, c_t in ours
    ]
    rows.append({"system": "autoep", "c_t": 4.0, "forward_ms": 20.0, "train_ms": 26.0})
    failed = {"system": "ours:prune=3", "error": "Traceback\nno memory", **shared}
    few = [
        {**rows[0], "p2p": "on", "shape": "a", "routing": "uniform", "c_t": c_t, "sent_bytes": 1.0}
        for c_t in (1.0, 2.0)
    ]
    write_csv(tmp_path / "a.csv", LAYER_COLUMNS, [*(row | shared for row in rows), failed])
    write_csv(tmp_path / "b.csv", LAYER_COLUMNS, few)
    found = read([tmp_path / "a.csv", tmp_path / "b.csv"])
    head = "| off | olmoe | statistics.safetensors:4 |"
    lines = table(found).splitlines()
    assert lines[3] == f"{head} ours, placed | 3.000 | 6.500 | 10.000 | 2.60 | 2.0 |"
    assert lines[6] == f"{head} autoep | 4.000 | 20.000 | 26.000 | 1.00 | 2.0 |"
    assert lines[7] == f"{head} ours, pruned to 3 | no memory | | | | |"
    assert lines[8].startswith("| on | a | uniform | ours | 1.000 | 8.500 | 13.000 |  | 0.0 |")
    assert lines_through(found).splitlines()[2:] == [
        "| off | olmoe | forward | 2.000 | 0.500 | 1.0000 | 4 |",
        "| off | olmoe | forward + backward | 3.000 | 1.000 | 1.0000 | 4 |",
    ]
    assert name("ours:matmul=joint,placement=p,prune=2") == "ours, placed, pruned to 2"
