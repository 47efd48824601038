"""The pruning study: its runs begin alike, are those of `occult train`, and go on where they stopped; its table."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from occult_train.config import load
from occult_train.errors import UserError
from occult_train.testing import run_distributed
from occult_train.tools.bench.pruning_report import draw, table
from occult_train.tools.bench.pruning_tune import RECIPE, Row, Study, Variant, left, variants
from occult_train.tools.bench.study import append, read_rows
from occult_train.tools.prepare import prepare

ROOT = Path(__file__).parents[2]
SIZES = [
    *("model.hidden_size=32", "model.intermediate_size=16", "model.num_hidden_layers=2", "model.num_attention_heads=4"),
    *("model.num_experts=8", "model.num_experts_per_tok=2", "model.max_position_embeddings=64"),
]
SETTINGS = [
    *("train.precision=fp32", "data.sequence_length=32", "train.global_batch_size=8", "train.micro_batch_size=4"),
    *("scheduler.warmup_steps=0", "eval.sequences=6", "eval.interval=0", "moe.placement=contiguous"),
]
TUNING = ["train.steps=8", "optimizer.lr=0.03", "data.mask_documents=false", "moe.prune.policy=none"]
TUNING += ["moe.prune.devices=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus."""
    folder = tmp_path_factory.mktemp("study")
    lines = [{"text": f"def f{i}(x):\n    return x + {i % 7} * {i % 11}\n" * 3} for i in range(80)]
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare([str(folder / "text.jsonl")], folder / "corpus", vocab_size=290, workers=1, valid_fraction=0.2)
    return folder


def make_runs(_rank: int, folder: Path) -> tuple[list[Row], float]:
    """A base; runs of the study in turn; and the held-out loss of the trainer's run of the first one's settings."""
    from occult_train import trainer

    where = [f"data.path={folder}/corpus", *SETTINGS]
    trainer.run(load([*SIZES, *where, f"output={folder}/base", "train.steps=2"]))
    begin = [RECIPE, f"model.from_pretrained={folder}/base", *where, *TUNING]
    study = Study(load([*begin, f"output={folder}/none"]), groups=2, shared=folder)
    ways = (Variant("none", 2), Variant("similarity", 1), Variant("router", 1), Variant("none", 2))
    rows = [study.run(variant, seed=3) for variant in ways]
    trainer.run(load([*begin, f"output={folder}/trained", "train.seed=3"]))
    log = [json.loads(line) for line in (folder / "trained" / "log.jsonl").read_text().splitlines()]
    return rows, log[-1]["loss"]


def test_runs_begin_alike_and_are_the_trainer_s(folder: Path) -> None:
    """Weights, optimizer and routing of the runs between leave no trace."""
    ((rows, trained),) = run_distributed(make_runs, 1, folder, timeout=240)
    first, similar, router, again = rows
    assert replace(again, step_ms=0) == replace(first, step_ms=0)
    assert first.loss == pytest.approx(trained, abs=1e-6)
    assert first.loss < first.loss_before - 0.3
    assert similar.loss_before != first.loss_before
    assert (similar.c_t, similar.bytes_token) == (1.0, 4 * 1 / 2 * 2 * 32)
    assert 1 < first.c_t < 2
    assert router.c_t == 1
    assert len({row.loss_before for row in rows}) == 3
    assert {row.steps * 8 * 32 for row in rows} == {row.tokens for row in rows}


ROW = Row("abc", "none", 8, 8, 1, 5, 80, 3.0, 2.0, 5.0, 100.0, 7.0, "CPU")


def test_rows_come_back_and_what_is_left_follows(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    assert len(left(read_rows(Row, path), 8, 2, "abc", path)) == 14
    append(path, ROW)
    append(path, replace(ROW, policy="router", devices=1, seed=2, loss=2.25))
    done = read_rows(Row, path)
    assert [asdict(row) for row in done] == [
        asdict(ROW),
        asdict(ROW) | {"policy": "router", "devices": 1, "seed": 2, "loss": 2.25},
    ]
    runs = left(done, 8, 2, "abc", path)
    assert len(runs) == 12
    assert [seed for _, seed in runs] == [1] * 6 + [2] * 6, "all ways with one seed before the next"
    assert (Variant("none", 8), 1) not in runs
    parts = [left(done, 8, 2, "abc", path, (i, 3)) for i in (1, 2, 3)]
    assert sorted(str(run) for part in parts for run in part) == sorted(map(str, runs))
    assert all(parts)
    assert [v.devices for v in variants(8)] == [8, 1, 1, 2, 2, 4, 4]
    with pytest.raises(UserError, match=r"runs\.csv has runs of the base abc, this one is other; name another file"):
        left(done, 8, 2, "other", path)


def test_table_and_figure(tmp_path: Path) -> None:
    rows = [
        ROW,
        replace(ROW, seed=2, loss=2.5),
        replace(ROW, policy="similarity", devices=1, c_t=1.0, bytes_token=20.0),
    ]
    lines = table(rows).splitlines()
    assert lines[2] == "| by similarity | 1 | 1.00 | 20 | 3.0000 | 2.0000 ± 0.0000 | 1 | 7.0 |"
    assert lines[3] == "| not pruned | 8 | 5.00 | 100 | 3.0000 | 2.2500 ± 0.3536 | 2 | 7.0 |"
    assert lines[-1].startswith("base abc, 8 devices, 5 steps of 16 tokens, CPU; spread: ")
    draw(rows, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_the_script_stops_in_time_and_goes_on(folder: Path, tmp_path: Path) -> None:
    """As on a GPU, at a tiny size: base, a call that has time for nothing more, and the rest."""
    for side in ("prose", "code"):
        (tmp_path / "corpora").mkdir(exist_ok=True)
        subprocess.run(["cp", "-r", folder / "corpus", tmp_path / "corpora" / side], check=True)
    subprocess.run(["tar", "cJf", "c.tar.xz", "corpora"], cwd=tmp_path, check=True)

    def call(stage: str, *settings: str, seconds: int = 300) -> str:
        words = ["tools/bench/pruning_study.sh", tmp_path / "c.tar.xz", tmp_path / "work", tmp_path / "out", stage]
        env = {"PYTHON": sys.executable, "CALL_SECONDS": str(seconds), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([*words, *settings], cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    sizes = [*SIZES[:4], "model.num_experts=16", "model.num_experts_per_tok=2"]
    call("base", *sizes, *SETTINGS, "train.steps=2")
    tiny = [*SETTINGS[:-1], "train.steps=2", "moe.matmul=auto"]
    assert "21 runs are left" in call("tune", *tiny, seconds=1)
    text = call("tune", *tiny)
    assert len(read_rows(Row, tmp_path / "out" / "runs1.csv")) == 21
    assert text.count("| by ") == 6
    assert (tmp_path / "out" / "table.md").read_text() in text
