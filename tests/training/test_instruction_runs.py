"""Fine-tuning on prompts and responses, end to end: the loss is that of each response behind its own prompt alone."""

import json
from pathlib import Path

import pytest
import torch
from small_runs import records, train
from torch.nn import functional as F

from occult_train.checkpoint.store import open_checkpoint
from occult_train.data.tokenizer import load_tokenizer
from occult_train.inference import load_model
from occult_train.testing import run_distributed
from occult_train.tools.prepare import prepare

LINES = [{"prompt": f"Say {'very ' * (i % 6)}{i}.", "response": f" {i}{' again' * (i % 4)}!"} for i in range(80)]
UNBALANCED = ["moe.balance=none", "moe.z_loss_coef=0", "data.mask_documents=true"]
"""Balancing losses depend on how a batch is divided; what is learnt of the responses must not."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("instructions")
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    prepare([str(folder / "lines.jsonl")], folder / "corpus", vocab_size=290, instructions=True, valid_fraction=0.3)
    return folder


def run(prepared: Path, name: str, ranks: int, *more: str) -> Path:
    arguments = [f"data.path={prepared}/corpus", f"output={prepared}/{name}", *UNBALANCED, *more]
    run_distributed(train, ranks, arguments, timeout=240)
    return prepared / name


def test_the_held_out_loss_is_that_of_responses_one_by_one(prepared: Path) -> None:
    """Nothing of packing is left in it: each response is read behind its prompt, in a forward of its own."""
    made = run(prepared, "still", 2, "train.steps=1", "eval.sequences=0")
    model, tokenizer = load_model(open_checkpoint(made)), load_tokenizer(prepared / "corpus")
    held_out = set()
    valid = [record for record in records(made) if record["kind"] == "evaluation"]
    from occult_train.data.indexed import IndexedReader

    reader = IndexedReader(prepared / "corpus" / "valid", examples=True)
    for number in range(len(reader)):
        held_out.add(tuple(reader.document(number).tolist()))
    total, count = 0.0, 0
    for line in LINES:
        prompt = tokenizer.encode(line["prompt"])
        ids = [*prompt, *tokenizer.encode(line["response"]), tokenizer.eod_id]
        if tuple(ids) not in held_out or len(prompt) >= 33:
            continue
        ids = ids[:33]
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]]))[0, len(prompt) - 1 :]
        total += float(F.cross_entropy(logits, torch.tensor(ids[len(prompt) :]), reduction="sum"))
        count += len(ids) - len(prompt)
    assert count > 100
    assert valid[-1]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_batch_is_learnt_the_same_however_it_is_divided(prepared: Path) -> None:
    """Micro-batches of one sequence on two ranks, whose labels are never as many, against the whole batch at once."""
    divided = run(prepared, "divided", 2, "train.steps=3", "train.micro_batch_size=1")
    whole = run(prepared, "whole", 1, "train.steps=3", "train.micro_batch_size=8", "parallel.expert=1")
    for one, other in zip(records(divided), records(whole), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        if one["kind"] == "step":
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert len(records(whole)) == 4


def test_it_learns_to_answer(prepared: Path) -> None:
    steps = ["train.steps=60", "optimizer.lr=0.01", "train.global_batch_size=4", "eval.sequences=0", "eval.interval=59"]
    log = records(run(prepared, "learnt", 1, *steps, "parallel.expert=1"))
    losses = [record["loss"] for record in log if record["kind"] == "evaluation"]
    assert losses[-1] < 2.5 < 5 < log[0]["loss"]
