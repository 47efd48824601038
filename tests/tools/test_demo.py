"""`occult demo` and so `make train`, with a smaller model: from nothing to a report, and again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = ["model.hidden_size=32", "model.num_hidden_layers=2", "data.sequence_length=64", "eval.sequences=8"]
WORDS = [sys.executable, "-m", "occult_train.launcher.cli", "demo"]


def _demo(folder: Path, steps: int) -> str:
    """Run it from another folder than the repository's, and return what it printed."""
    words = [*WORDS, "--folder", "runs", *SMALL, f"train.steps={steps}"]
    done = subprocess.run(
        words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
def test_the_demo_runs_from_nothing_and_then_goes_on(tmp_path: Path) -> None:
    first = _demo(tmp_path, 3)
    run = tmp_path / "runs" / "demo"
    for row in ("training loss", "held-out loss", "unigram loss", "tokens/s", "C_T", "rows sent (dedup)", "sample"):
        assert row in first, row
    assert "transformers' logits agree with ours" in first
    assert json.loads((run / "hf" / "config.json").read_text())["architectures"] == ["OlmoeForCausalLM"]
    assert (run / "sample.txt").read_text().startswith("def read_")
    corpus = (tmp_path / "runs" / "corpus" / "train.bin").stat()
    assert corpus.st_size > 2 * 2_000_000
    second = _demo(tmp_path, 5)
    assert "corpus is there already" in second
    assert "continuing runs/demo/checkpoints/step-00000003 at step 3" in second
    assert "5 (5,120 tokens)" in second
    assert (tmp_path / "runs" / "corpus" / "train.bin").stat().st_mtime_ns == corpus.st_mtime_ns
