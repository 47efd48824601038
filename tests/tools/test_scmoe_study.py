"""The ScMoE study: variants of one size, runs that differ by seed and go on where they stopped; its table."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from occult_train.config import load
from occult_train.errors import UserError
from occult_train.parallel.grid import Grid
from occult_train.testing import run_distributed
from occult_train.tools.bench.scmoe_report import table
from occult_train.tools.bench.scmoe_study import CONFIG, Row, Study, parse_share, variants
from occult_train.tools.bench.study import append, read_rows
from occult_train.tools.prepare import prepare

ROOT = Path(__file__).parents[2]
TINY = [
    *("model.hidden_size=32", "model.intermediate_size=14", "model.dense_intermediate_size=16"),
    *("model.num_hidden_layers=2", "model.dense_layers=[0]", "moe.matmul=auto", "moe.backend=reference"),
    *("train.steps=3", "train.global_batch_size=4", "train.micro_batch_size=2", "train.precision=fp32"),
    *("data.sequence_length=16", "eval.sequences=3", "scheduler.warmup_steps=0", "optimizer.lr=0.01"),
]
VARIANTS = [
    *("top-2", "shared expert"),
    *(f"scmoe {position} {combine}" for position in ("pos1", "pos2", "pos3") for combine in ("add", "cg1")),
    "dgmoe",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small one."""
    folder = tmp_path_factory.mktemp("study")
    lines = [{"text": f"def f{i}(x):\n    return x + {i % 7} * {i % 11}\n" * 3} for i in range(80)]
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare([str(folder / "text.jsonl")], folder / "corpus", vocab_size=290, workers=1, valid_fraction=0.2)
    return folder / "corpus"


def test_variants_have_equal_sizes() -> None:
    """Beside norms and gates of a row a layer, and dgmoe's second routing."""
    base = load([CONFIG, "model.vocab_size=16384"]).model
    settings = {name: [CONFIG, "model.vocab_size=16384", *changes] for name, changes in variants(base).items()}
    models = {name: load(arguments).model for name, arguments in settings.items()}
    assert list(models) == VARIANTS
    rows = len(base.moe_layers) * base.hidden_size
    for name, model in models.items():
        extra = 0 if name in VARIANTS[:2] else rows * (2 if "cg1" in name else 1)
        assert model.num_params() == base.num_params() + extra
        assert model.active_params() == base.active_params() + extra
        flops = {"cg1": 2 * rows, "dgmoe": 2 * rows * base.num_experts}
        assert model.flops_per_token(512) == base.flops_per_token(512) + flops.get(name.split()[-1], 0)
        assert model.moe_layers == base.moe_layers == [1, 3, 5]
    with pytest.raises(UserError, match=r"intermediate_size=450 must be a multiple of model\.num_experts=8 less 1"):
        variants(replace(base, intermediate_size=450))


def make_runs(_rank: int, corpus: Path) -> tuple[list[Row], float]:
    """Two seeds of the study, the first again, another variant; and the trainer's loss with the first's settings."""
    from occult_train import trainer

    study = Study([CONFIG, f"data.path={corpus}", *TINY], Grid.create(1))
    rows = [study.run(variant, seed) for variant, seed in (("top-2", 1), ("top-2", 2), ("dgmoe", 1), ("top-2", 1))]
    output = corpus.parent / "trained"
    trainer.run(load([CONFIG, f"data.path={corpus}", *TINY, "train.seed=1", f"output={output}"]))
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return rows, log[-1]["loss"]


def test_a_run_is_the_trainer_s_and_leaves_no_trace(corpus: Path) -> None:
    ((rows, trained),) = run_distributed(make_runs, 1, corpus, timeout=240)
    first, other, dgmoe, again = rows
    assert replace(again, step_ms=0) == replace(first, step_ms=0)
    assert first.loss == pytest.approx(trained, abs=1e-6)
    assert len({first.loss, other.loss, dgmoe.loss}) == 3
    assert first.loss < 5.6, "less than a uniform guess's"
    assert (first.tokens, first.steps, first.study) == (3 * 4 * 16, 3, dgmoe.study)
    assert 0 < first.passes < 1


ROW = Row("abc", "top-2", 1, 5, 80, 1.5, 1000, 500, 900, 3.0, 7.0, "CPU")


def test_what_is_left_goes_by_share_and_csv(corpus: Path, tmp_path: Path) -> None:
    study, path = Study([CONFIG, f"data.path={corpus}", *TINY], Grid()), tmp_path / "runs.csv"
    everything = study.left(path, 3, (1, 1))
    assert everything == [(variant, seed) for seed in (1, 2, 3) for variant in VARIANTS]
    shares = [study.left(path, 3, (first, 4)) for first in (1, 2, 3, 4)]
    assert sorted(run for share in shares for run in share) == sorted(everything)
    assert [len(share) for share in shares] == [7, 7, 7, 6]
    append(path, replace(ROW, study=study.digest, variant="dgmoe", seed=2))
    assert ("dgmoe", 2) not in study.left(path, 3, (2, 4)) == [run for run in shares[1] if run != ("dgmoe", 2)]
    append(path, ROW)
    with pytest.raises(UserError, match=rf"runs\.csv has runs of the settings abc, these are {study.digest}; "):
        study.left(path, 3, (1, 1))
    assert parse_share("2/4") == (2, 4)
    for wrong in ("0/2", "3/2", "2", "a/b"):
        with pytest.raises(ValueError):
            parse_share(wrong)


def test_table() -> None:
    seconds = [replace(ROW, seed=2, loss=3.5), replace(ROW, variant="dgmoe", seed=2, loss=3.25)]
    lines = table([ROW, *seconds, replace(ROW, variant="dgmoe", loss=3.0)]).splitlines()
    assert lines[2] == "| top-2 | 1,000 | 500 | 900 | 3.2500 ± 0.3536 |  | 2 |"
    assert lines[3] == "| dgmoe | 1,000 | 500 | 900 | 3.1250 ± 0.1768 | -0.1250 ± 0.1768 | 2 |"
    assert lines[-1].startswith("5 steps of 16 tokens, 0.0 M in all, the text read 1.50 times; CPU; ")
    with pytest.raises(UserError, match="the runs are of 2 studies, abc, xyz"):
        table([ROW, replace(ROW, study="xyz", seed=2)])
    with pytest.raises(UserError, match="twice"):
        table([ROW, ROW])
    with pytest.raises(UserError, match="0 studies, none"):
        table([])


def test_the_command_stops_in_time_and_goes_on(corpus: Path, tmp_path: Path) -> None:
    """A call that has no time, and one that makes its share."""

    def call(*options: str) -> str:
        words = ["-m", "occult_train.tools.bench.scmoe_study", corpus, tmp_path / "b.csv", *TINY, "train.steps=1"]
        done = subprocess.run([sys.executable, *words, *options], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    share = ("--seeds", "1", "--share", "4/4")
    assert "2 runs are left; the same command goes on" in call(*share, "--seconds", "0")
    text = call(*share)
    assert text.count("seed 1: loss ") == 2
    assert [row.variant for row in read_rows(Row, tmp_path / "b.csv")] == ["scmoe pos1 cg1", "scmoe pos3 cg1"]
