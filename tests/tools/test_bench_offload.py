"""`occult bench offload` on CPU: every mode is right and measured, and what the lines behind the table say."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from occult_train.tools.bench.offload_command import check_tokens, compare
from occult_train.tools.bench.results import Row
from occult_train.tools.bench.shapes import AHEAD, BLOCKING, OFFLOAD_MODES, RESIDENT, SINGLY

CONFIG = str(Path(__file__).parents[2] / "configs" / "scmoe" / "gpt2_moe_small.yaml")
MODEL = ["model.vocab_size=128", "model.hidden_size=32", "model.num_attention_heads=2", "model.num_hidden_layers=4"]
MODEL += [f"model.{name}=48" for name in ("intermediate_size", "dense_intermediate_size")]
MODEL += ["model.shared_expert_intermediate_size=40", "model.num_experts=8"]
EXPERT = 3 * 32 * 48 * 4


def bench(*words: str) -> "subprocess.CompletedProcess[str]":
    program = [sys.executable, "-m", "occult_train.launcher.cli", "bench", "offload", CONFIG, *MODEL, *words]
    return subprocess.run(
        program, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200
    )


def test_every_mode_is_right_and_measured(tmp_path: Path) -> None:
    """Room for five of a layer's eight experts: enough for one text, too little for a long prompt."""
    where = tmp_path / "a.csv"
    words = ["--expert-budget", str(5 * EXPERT / 1e9), "--decode", "1", "--context", "3", "--new", "16"]
    done = bench("--cpu", *words, "--prefill", "60", "--seconds", "0.01", "--csv", str(where))
    assert done.returncode == 1, done.stderr
    with where.open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["system"], line["stage"]) for line in lines] == [
        (mode, stage) for mode in OFFLOAD_MODES for stage in ("decode 1", "prefill 1x60")
    ]
    whole = int(lines[0]["weights_bytes"])
    for line in lines:
        resident = line["system"] in (RESIDENT, SINGLY)
        assert int(line["weights_bytes"]) == whole - (0 if resident else 11 * EXPERT)
        if not resident and line["stage"] != "decode 1":
            assert "has room for 5 experts (0.1 MB), and layer 1 needs 8 experts (0.1 MB)" in line["error"]
            continue
        assert not line["error"]
        assert float(line["error_logits"]) < 1e-5
        assert float(line["tokens_per_second"]) > 0
    drawn = {line["system"]: line["made"] for line in lines if line["stage"] == "decode 1"}
    assert len(set(drawn.values())) == 1
    copied = {line["system"]: line["copied"] for line in lines if line["stage"] == "decode 1"}
    assert copied[RESIDENT] == ""
    assert float(copied[SINGLY]) < 0.1 < 0.2 < float(copied[BLOCKING]) == float(copied[AHEAD])
    assert "decode 1: weights on the device -" in done.stdout


def test_a_mistake_is_one_line() -> None:
    done = bench("--cpu", "--prefill", "9000")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: 9000 tokens of --prefill or --context and --new, model.max_position_embeddings=1024\n"


def test_what_copies_cost_and_what_of_it_is_hidden() -> None:
    times = {RESIDENT: 10.0, SINGLY: 12.0, BLOCKING: 18.0, AHEAD: 12.0}
    rows: list[Row] = [
        {"system": mode, "stage": "decode 1", "ms": ms, "weights_bytes": 100 if mode in (RESIDENT, SINGLY) else 35}
        for mode, ms in times.items()
    ]
    assert compare(rows) == [
        "decode 1, against resident: blocking +80%, ahead +20%; 75% of the difference hidden",
        "decode 1, against resident, expert by expert: blocking +50%, ahead +0%; 100% of the difference hidden",
        "decode 1: weights on the device -65%",
    ]
    assert compare([row for row in rows if row["system"] != AHEAD]) == []


@pytest.mark.parametrize("mode, other", [(SINGLY, False), (BLOCKING, True)])
def test_other_tokens_are_an_error(mode: str, other: bool) -> None:
    """But not other ones than those of the kernels, which round otherwise."""
    rows: list[Row] = [
        {"system": RESIDENT, "stage": "decode 1", "made": 1},
        {"system": SINGLY, "stage": "decode 8", "made": 2},
        {"system": SINGLY, "stage": "decode 1", "made": 3},
        {"system": BLOCKING, "stage": "decode 1", "made": 4},
        {"system": AHEAD, "stage": "decode 1", "error": "no room"},
    ]
    upto = rows[: next(i for i, row in enumerate(rows) if (row["system"], row["stage"]) == (mode, "decode 1")) + 1]
    check_tokens(upto)
    assert ("error" in upto[-1]) == other
    check_tokens(rows)
    assert rows[-1]["error"] == "no room"
