"""Text to train on, and things that are not as they should be."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from small_runs import train

from occult_train.testing import run_distributed
from occult_train.tools.prepare import prepare


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A corpus of generated sentences."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "seven", "dogs", "run", "home"]
    for i in range(40):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(words, 300)) + f"\nfile {i}\n")
    prepare([str(folder)], folder / "corpus", vocab_size=300, tokenizer=None, workers=1, valid_fraction=0.2)
    return str(folder / "corpus")


CONFIG = """
model: {hidden_size: 32, intermediate_size: 16, num_hidden_layers: 2, num_attention_heads: 4,
        num_experts: 8, num_experts_per_tok: 3, max_position_embeddings: 64}
data: {path: corpus, sequence_length: 32}
train: {global_batch_size: 8, micro_batch_size: 2, precision: fp32, steps: 1}
parallel: {expert: 2}
eval: {interval: 0, sequences: 7}
checkpoint: {interval: 0}
monitor: {interval: 1}
"""
FAKE_SSH = '#!/bin/sh\necho "ssh: Could not resolve hostname node7: Name or service not known" >&2\nexit 255\n'


@pytest.fixture(scope="package")
def mess(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> Path:
    """A folder with configs, text, corpora and runs, good ones and bad ones."""
    folder = tmp_path_factory.mktemp("mess")
    (folder / "a.yaml").write_text(CONFIG)
    (folder / "broken.yaml").write_text("train: [1\n")
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "hosts").write_text("localhost slots=2\nnode7 slots=2\n")
    (folder / "hosts.typo").write_text("node7 slots=2\nnode8 slot=2\n")
    slots = {"num_experts": 16, "slot_to_expert": {"0": list(range(16)), "1": list(range(16))}}
    (folder / "sixteen.json").write_text(json.dumps(slots))
    for name in ("text", "binary", "empty", "foreign", "bin"):
        (folder / name).mkdir()
    (folder / "binary" / "weights.txt").write_bytes(b"PK\0\0")
    (folder / "foreign" / "pytorch_model.bin").write_bytes(b"")
    for name, content in (("pdsh", "#!/bin/sh\n"), ("ssh", FAKE_SSH)):
        (folder / "bin" / name).write_text(content)
        (folder / "bin" / name).chmod(0o755)
    _make_corpora(folder, corpus)
    arguments = [f"data.path={corpus}", f"output={folder}/run", "train.steps=1"]
    run_distributed(train, 2, arguments, timeout=240)
    _make_damaged_runs(folder)
    return folder


def _make_corpora(folder: Path, corpus: str) -> None:
    """`corpus`, `other` with another tokenizer, `unlike` with other's, and Megatron pairs."""
    rng = np.random.default_rng(1)
    for i in range(5):
        (folder / "text" / f"{i}.txt").write_text(" ".join(map("".join, rng.choice(list("abcdefgh"), (300, 4)))))
    shutil.copytree(corpus, folder / "corpus")
    prepare([str(folder / "text")], folder / "other", vocab_size=350, workers=1)
    shutil.copytree(corpus, folder / "unlike")
    shutil.copy(folder / "other" / "tokenizer.model", folder / "unlike" / "tokenizer.model")
    for name, ids in (("pair", np.arange(4000) % 500 + 100), ("short", np.arange(9)), ("broken", np.arange(9))):
        header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 1, 2)
        (folder / f"{name}.idx").write_bytes(header + struct.pack("<iqqq", len(ids), 0, 0, 1))
        (folder / f"{name}.bin").write_bytes(ids.astype("<u2").tobytes())
    (folder / "broken.idx").write_bytes(b"not an index")


def _make_damaged_runs(folder: Path) -> None:
    """Copies of `run` in which something is wrong."""
    steps = {}
    for name in ("damaged", "cut", "junk", "bare", "logless"):
        shutil.copytree(folder / "run", folder / name)
        (steps[name],) = (folder / name / "checkpoints").glob("step-*")
    weights = steps["damaged"] / "model-00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    moments = steps["cut"] / "optimizer-00000.safetensors"
    moments.write_bytes(moments.read_bytes()[:-100])
    (steps["junk"] / "checkpoint.json").write_text('{"format"')
    (folder / "bare" / "tokenizer.model").unlink()
    (folder / "logless" / "log.jsonl").write_text("step 1: loss 8\nstep 2: loss 7\n")
