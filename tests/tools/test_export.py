"""Export to Hugging Face: the same model, experts under their own ids, nothing dropped silently."""

import errno
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from occult_train.checkpoint import state, store
from occult_train.checkpoint.store import Checkpoint
from occult_train.config import load, to_yaml
from occult_train.data.sentencepiece_training import train_sentencepiece
from occult_train.data.tokenizer import Tokenizer, load_tokenizer
from occult_train.engine import build_engine
from occult_train.errors import ConfigError, UserError
from occult_train.hub import writing
from occult_train.hub.verify import Comparison
from occult_train.moe.placement import Placement, to_json
from occult_train.moving import move
from occult_train.parallel.grid import Grid
from occult_train.testing import run_distributed
from occult_train.tools.export import export, verify_export

SHAPE = [
    "model.vocab_size=320",
    "model.hidden_size=32",
    "model.intermediate_size=24",
    "model.num_hidden_layers=3",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.num_experts=8",
    "model.num_experts_per_tok=3",
    "model.max_position_embeddings=64",
    "model.initializer_range=0.2",
    "data.sequence_length=64",
    "train.precision=fp32",
    "parallel.expert=2",
]


def save(rank: int, overrides: list[str], root: str) -> None:
    config = load(SHAPE + overrides)
    grid = Grid.create(config.parallel.expert)
    engine = build_engine(config, grid)
    if "moe.balance=bias" in overrides:
        engine.module.layers[0].moe.router.expert_bias += 0.5
    state.save(engine, grid, Path(root), 1, {}, to_yaml(config), keep=1)


def save_moved(rank: int, overrides: list[str], root: str) -> None:
    """Save after two steps, move experts, and save the same again elsewhere."""
    config = load(SHAPE + overrides)
    grid = Grid.create(config.parallel.expert)
    engine = build_engine(config, grid)
    engine.module.train()
    tokens = torch.randint(320, (1, 9), generator=torch.Generator().manual_seed(rank))
    for _ in range(2 * config.accumulation_steps(grid.world_size)):
        engine.backward(engine(tokens, tokens))
        engine.step()
    state.save(engine, grid, Path(root, "unmoved"), 2, {}, to_yaml(config), keep=1)
    placements = {i: Placement(tuple(random.Random(i).sample(range(8), 8))) for i in range(3)}
    assert move(engine, placements).experts > 0
    state.save(engine, grid, Path(root, "moved"), 2, {}, to_yaml(config), keep=1)


def checkpoint(folder: Path, *overrides: str) -> Checkpoint:
    run_distributed(save, 2, list(overrides), str(folder / "checkpoints"), timeout=120)
    return store.open_checkpoint(folder)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_sentencepiece(["the cat sat on the mat and saw seven dogs run home\n" * 3], 290)


@pytest.mark.parametrize(
    "overrides",
    [["zero.stage=1"], ["zero.stage=3", "model.tie_word_embeddings=true", "model.norm_topk_prob=true"]],
    ids=["stage 1", "stage 3, tied, normalised"],
)
def test_transformers_computes_the_same_logits(tmp_path: Path, tokenizer: Tokenizer, overrides: list[str]) -> None:
    rng, placements = random.Random(1), {}
    for layer in range(3):
        slots = list(range(8))
        rng.shuffle(slots)
        placements[layer] = Placement(tuple(slots))
    (tmp_path / "placement.json").write_text(to_json(placements))
    opened = checkpoint(tmp_path, f"moe.placement={tmp_path}/placement.json", *overrides)
    export(opened, tmp_path / "hf", "auto", 100_000, tokenizer)
    compared = verify_export(opened, tmp_path / "hf")
    assert compared.logits < 1e-5
    assert compared == Comparison(compared.logits, 3 * 128, 0, 0)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert type(model).__name__ == "OlmoeForCausalLM"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1, "several shards"
    name = "model.layers.1.mlp.experts.5.gate_proj.weight"
    shard = load_file(tmp_path / "hf" / index["weight_map"][name])
    assert torch.equal(shard[name], opened.read("layers.1.moe.experts.w1.5"))
    ours, theirs = load_tokenizer(tmp_path / "hf"), AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (ours.fingerprint(), ours.eod_id) == (tokenizer.fingerprint(), tokenizer.eod_id)
    assert theirs.eos_token_id == model.generation_config.eos_token_id == tokenizer.eod_id
    for text in ("the cat sat", " a", "def  read(x):\n\treturn x1234\n\n", "é 日本 ok", Path(__file__).read_text()):
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text


def test_a_wrong_export_is_noticed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    opened = checkpoint(tmp_path)
    export(opened, tmp_path / "hf", "bf16", 10**9, tokenizer)
    compared = verify_export(opened, tmp_path / "hf")
    assert compared.logits < 1e-5
    assert compared == Comparison(compared.logits, 3 * 128, 0, 0)
    (shard,) = (tmp_path / "hf").glob("*.safetensors")
    weights = load_file(shard)
    a, b = (f"model.layers.1.mlp.experts.{e}.gate_proj.weight" for e in (2, 3))
    weights[a], weights[b] = weights[b], weights[a]
    from safetensors.torch import save_file

    save_file(weights, shard, metadata={"format": "pt"})
    compared = verify_export(opened, tmp_path / "hf")
    assert compared.logits > 1e-3
    with pytest.raises(UserError, match="logits differ"):
        compared.check(tmp_path / "hf")


def test_what_no_family_holds_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    cases = {
        "bias": (["moe.balance=bias"], "balancing bias"),
        "shared": (["model.shared_expert_intermediate_size=8"], "shared_expert_intermediate_size=8"),
        "clip": (["model.qk_norm=head", "model.clip_qkv=2"], "clip_qkv=2.0 .it has none"),
    }
    for name, (overrides, message) in cases.items():
        opened = checkpoint(tmp_path / name, *overrides)
        with pytest.raises(ConfigError, match=message):
            export(opened, tmp_path / name / "hf", "auto", 10**9, tokenizer)
        assert not (tmp_path / name / "hf").exists()


def test_other_folders_are_left_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    opened = checkpoint(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        export(opened, tmp_path / "mine", "auto", 10**9, tokenizer)
    with pytest.raises(UserError, match="is a file"):
        export(opened, tmp_path / "mine" / "thesis.tex", "auto", 10**9, tokenizer)
    with pytest.raises(ConfigError, match="--dtype=fp8"):
        export(opened, tmp_path / "hf", "fp8", 10**9, tokenizer)
    export(opened, tmp_path / "hf", "auto", 10**9, tokenizer)
    export(opened, tmp_path / "hf", "auto", 10**9, tokenizer)  # its own work it replaces


def test_an_export_that_a_full_disk_cut_short_can_be_made_again(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    opened = checkpoint(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_file", full)
        with pytest.raises(UserError, match=r"--output=.*/hf cannot be written: No space left on device"):
            export(opened, tmp_path / "hf", "auto", 10**9, tokenizer)
    export(opened, tmp_path / "hf", "auto", 10**9, tokenizer)
    compared = verify_export(opened, tmp_path / "hf")
    assert compared.logits < 1e-5
    assert compared == Comparison(compared.logits, 3 * 128, 0, 0)


def test_an_export_does_not_tell_where_experts_lived(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Byte for byte, in files small enough to be cut between any two tensors."""
    run_distributed(save_moved, 2, ["zero.stage=1", "train.global_batch_size=4"], str(tmp_path), timeout=120)
    exported = {}
    for name in ("unmoved", "moved"):
        export(store.open_checkpoint(tmp_path / name), tmp_path / f"{name}-hf", "auto", 4000, tokenizer)
        exported[name] = {p.name: p.read_bytes() for p in (tmp_path / f"{name}-hf").iterdir()}
    assert len([file for file in exported["moved"] if file.endswith(".safetensors")]) > 50
    assert exported["moved"] == exported["unmoved"]
