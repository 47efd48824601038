"""lm-eval on an exported model, as a user types it, without a network: its likelihoods are those of our own model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import making
import pytest
import torch

from occult_train.checkpoint.store import open_checkpoint
from occult_train.data.tokenizer import load_tokenizer
from occult_train.hub.source import open_model
from occult_train.inference import load_model, run_tokenizer
from occult_train.tools.export import export
from occult_train.tools.import_ import import_model

TASKS = Path(__file__).parents[2] / "tools" / "lm_eval"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def test_likelihoods_are_those_of_our_model(tmp_path: Path) -> None:
    """Of a family whose texts begin with a token of their own."""
    making.make("mixtral", tmp_path / "model")
    making.add_tokenizer(tmp_path / "model", begins=True)
    import_model(open_model(tmp_path / "model"), tmp_path / "run")
    checkpoint = open_checkpoint(tmp_path / "run")
    export(checkpoint, tmp_path / "hf", "auto", 10**9, run_tokenizer(checkpoint))
    words = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={tmp_path}/hf"]
    words += ["--include_path", str(TASKS), "--tasks", "python_lines", "--device", "cpu", "--batch_size", "24"]
    words += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    done = subprocess.run(words, cwd=tmp_path, env=os.environ | OFFLINE, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    (lines,) = (tmp_path / "out").rglob("samples_python_lines_*.jsonl")
    samples = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(samples) == 24
    model, tokenizer, right = load_model(checkpoint), load_tokenizer(tmp_path / "hf"), 0
    for sample in samples:
        doc = sample["doc"]
        before = doc["start"].rstrip()  # lm-eval counts blanks between the two as part of the ending
        start = [*tokenizer.begin, *tokenizer.encode(before)]
        expected = []
        for ending in doc["endings"]:
            ids = torch.tensor([start + tokenizer.encode(doc["start"][len(before) :] + ending)])
            with torch.no_grad():
                logs = model(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            expected.append(float(logs[len(start) - 1 :].sum()))
        assert [float(response[0]) for response in sample["filtered_resps"]] == pytest.approx(expected, rel=1e-4)
        right += int(max(range(3), key=expected.__getitem__) == doc["right"])
    found = json.loads(results.read_text())["results"]["python_lines"]
    assert found["acc,none"] == pytest.approx(right / 24)
    assert {sample["doc"]["right"] for sample in samples} == {0, 1, 2}
