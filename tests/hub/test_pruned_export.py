"""Pruned models and shortcut blocks in transformers: routed as trained, by the file beside the weights."""

import json
from pathlib import Path
from typing import Any

import making
import pytest
import torch
import transformers
from plain_pruning import prune_token

from occult_train.checkpoint import state
from occult_train.checkpoint.store import Checkpoint, open_checkpoint
from occult_train.config import load, to_yaml
from occult_train.data.tokenizer import Tokenizer
from occult_train.engine import build_engine
from occult_train.errors import ConfigError
from occult_train.hub.source import open_model
from occult_train.inference import load_model
from occult_train.moe.similarity import FILE_NAME, SimilarityTables
from occult_train.parallel.grid import Grid
from occult_train.testing import run_distributed
from occult_train.tools.export import command, export, verify_export
from occult_train.tools.import_ import import_model

EXPERTS, GROUPS, TOP_K, STEP = 12, 4, 4, 3
PLACED = [7, 0, 11, 3, 5, 10, 1, 8, 2, 6, 9, 4]
DEVICE_OF = [PLACED.index(expert) // (EXPERTS // GROUPS) for expert in range(EXPERTS)]
SHAPE = [
    *("model.vocab_size=320", "model.hidden_size=32", "model.intermediate_size=12", "model.num_hidden_layers=4"),
    *("model.num_attention_heads=4", f"model.num_experts={EXPERTS}", "model.max_position_embeddings=64"),
    *("model.initializer_range=0.3", "data.sequence_length=64", "train.precision=fp32", "parallel.expert=2"),
]
PRUNED = ["moe.prune.policy=router", "moe.prune.devices=2", f"moe.prune.groups={GROUPS}", "moe.balance=none"]
SHORTCUT = ["model.scmoe.block=scmoe", "model.scmoe.combine=cg1", "model.shared_expert_intermediate_size=8"]
SHORTCUT += ["model.dense_intermediate_size=20"]
CASES = {
    "similar": [*PRUNED, "moe.prune.policy=similarity", "moe.prune.layers={1: 4}", "moe.prune.schedule={2: 4, 9: 3}"],
    "inherited": [*PRUNED, "moe.prune.policy=similarity", "moe.prune.inherit=true", "model.norm_topk_prob=true"],
    "by score, biased": [*PRUNED, "model.shared_expert_intermediate_size=9", "moe.balance=bias"],
    "shortcut": [*PRUNED, *SHORTCUT, "moe.prune.policy=similarity", "moe.balance=bias"],
    "shortcut, unpruned": [*SHORTCUT, "model.scmoe.position=pos3", "moe.balance=bias"],
}
LIMITS = {"similar": {0: 3, 1: 4, 2: 3, 3: 3}}
"""m by layer where it is not 2: at step 3 the schedule still allows 3."""


def table(layer: int) -> torch.Tensor:
    """How alike experts are, with ties."""
    return torch.randn(EXPERTS, EXPERTS, generator=torch.Generator().manual_seed(layer)).round(decimals=1)


def save(rank: int, folder: str) -> None:
    """A checkpoint of every case."""
    for name, overrides in CASES.items():
        placement = "odd.json" if "shortcut" in name else "all.json"
        words = [*SHAPE, f"model.num_experts_per_tok={TOP_K}", f"moe.placement={folder}/{placement}", *overrides]
        config = load(words)
        grid = Grid.create(config.parallel.expert)
        engine = build_engine(config, grid)
        if "moe.balance=bias" in overrides:
            for i, layer in engine.module.moe_layers().items():
                noise = torch.rand(EXPERTS, generator=torch.Generator().manual_seed(90 + i))
                layer.router.expert_bias.copy_(noise * 0.2)
        tables = SimilarityTables({i: table(i) for i in config.model.moe_layers})
        files = {FILE_NAME: tables.to_bytes()} if "moe.prune.policy=similarity" in overrides and rank == 0 else {}
        root = Path(folder, name, "checkpoints")
        state.save(engine, grid, root, STEP, {}, to_yaml(config), keep=1, files=files)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for name, layers in (("all.json", range(4)), ("odd.json", (1, 3))):
        (folder / name).write_text(json.dumps({"slot_to_expert": {str(layer): PLACED for layer in layers}}))
    run_distributed(save, 2, str(folder), timeout=300)
    return folder


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return making.words()


def load_beside(folder: Path, **options: Any) -> Any:
    """What a user types."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
    assert type(model).__module__.startswith("transformers_modules")
    return model.eval()


def watch(model: Any) -> dict[int, tuple[torch.Tensor, ...]]:
    """Filled with logits, weights and experts of each layer's gate when the model runs."""
    seen: dict[int, tuple[torch.Tensor, ...]] = {}
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            layer = int(name.split(".")[2])
            module.register_forward_hook(lambda _m, _i, output, layer=layer: seen.__setitem__(layer, output))
    return seen


def check_choices(name: str, checkpoint: Checkpoint, seen: dict[int, tuple[torch.Tensor, ...]]) -> int:
    """Each token's experts and weights, by the method's words. Returns how many tokens were not as unpruned."""
    changed = 0
    for layer, (logits, weights, experts) in seen.items():
        bias = torch.tensor(checkpoint.state["expert_bias"][str(layer)])
        probs = logits.softmax(dim=1)
        similarity = None if name == "by score, biased" else table(layer).tolist()
        limit = LIMITS.get(name, {}).get(layer, 2)
        for t, scores in enumerate((probs + bias).tolist()):
            right = prune_token(scores, TOP_K, DEVICE_OF, limit, similarity, name == "inherited")
            assert experts[t].tolist() == right.experts
            expected = probs[t, right.weighed]
            expected = expected / expected.sum() if name == "inherited" else expected
            assert torch.allclose(weights[t], expected)
            changed += right.experts != prune_token(scores, TOP_K, DEVICE_OF, GROUPS).experts
    return changed


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_it_routes_as_trained_and_goes_on_with_its_cache(
    name: str, saved: Path, words: Tokenizer, tmp_path: Path
) -> None:
    checkpoint, pruned = open_checkpoint(saved / name), "unpruned" not in name
    export(checkpoint, tmp_path / "hf", "auto", 20_000, words, pruned)
    model, ours = load_beside(tmp_path / "hf"), load_model(checkpoint)
    seen, ids = watch(model), torch.randint(320, (2, 40), generator=torch.Generator().manual_seed(1))
    logits = ours(ids)
    assert making.difference(model(ids).logits, logits) < 1e-5
    assert sorted(seen) == checkpoint_layers(name)
    if pruned:
        assert check_choices(name, checkpoint, seen) > 40
        assert making.difference(load_model(checkpoint, pruned=False)(ids), logits) > 1e-2
    made = model.generate(ids[:, :9], max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None)
    for step in range(9, 15):
        assert torch.equal(ours(made[:, :step])[:, -1].argmax(-1), made[:, step])
    compared = verify_export(checkpoint, tmp_path / "hf")
    assert compared.logits < 1e-5
    assert (compared.differing, compared.choices) == (0, 128 * len(seen))


def checkpoint_layers(name: str) -> list[int]:
    return [1, 3] if "shortcut" in name else [0, 1, 2, 3]


@torch.no_grad()
def test_routing_is_exact_in_half_precision_too(saved: Path, words: Tokenizer, tmp_path: Path) -> None:
    """The bias stays fp32, and how alike experts are is kept as an order, which no rounding changes."""
    checkpoint = open_checkpoint(saved / "shortcut")
    export(checkpoint, tmp_path / "hf", "bf16", 10**9, words, pruned=True)
    model = load_beside(tmp_path / "hf", dtype=torch.bfloat16)
    seen = watch(model)
    model(torch.randint(320, (2, 40), generator=torch.Generator().manual_seed(1)))
    assert check_choices("shortcut", checkpoint, seen) > 10
    gate = model.model.layers[1].mlp.gate
    assert (gate.weight.dtype, gate.expert_bias.dtype) == (torch.bfloat16, torch.float32)
    assert verify_export(checkpoint, tmp_path / "hf").differing == 0


def test_a_wrong_table_is_noticed(saved: Path, words: Tokenizer, tmp_path: Path) -> None:
    """--verify compares chosen experts, not logits alone."""
    from safetensors.torch import load_file, save_file

    checkpoint = open_checkpoint(saved / "similar")
    export(checkpoint, tmp_path / "hf", "auto", 10**9, words, pruned=True)
    file = tmp_path / "hf" / "model-routing.safetensors"
    tensors = load_file(file)
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.int32"}
    tensors["model.layers.2.mlp.gate.likeness"] = tensors["model.layers.2.mlp.gate.likeness"].flip(1).contiguous()
    save_file(tensors, file, {"format": "pt"})
    assert verify_export(checkpoint, tmp_path / "hf").differing > 10


def test_the_command_says_what_became_of_the_routing(
    saved: Path, words: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one folder after the other, in which nothing of the first is left."""
    file = str(words.save(tmp_path))
    command(str(saved / "inherited"), tmp_path / "hf", tokenizer=file, pruned=True, verify=True)
    out = capsys.readouterr().out
    assert "it keeps each token's experts on at most 2 of 4 devices (moe.prune.policy=similarity)\n" in out
    assert "transformers' logits agree with ours" in out
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| routing | each token's experts on at most 2 of 4 devices (moe.prune.policy=similarity) |" in card
    assert "trust_remote_code=True" in card
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["pruning"]["devices"] == dict.fromkeys("0123", 2)
    command(str(saved / "inherited"), tmp_path / "hf", tokenizer=file, verify=True)
    out = capsys.readouterr().out
    assert "it routes unpruned, not as moe.prune.policy=similarity of its training does; --pruned keeps that" in out
    assert "transformers' logits agree with ours" in out
    assert "unpruned; trained with each token's experts on at most 2" in (tmp_path / "hf" / "README.md").read_text()
    assert not [*(tmp_path / "hf").glob("modeling_*"), *(tmp_path / "hf").glob("*routing*")]
    assert type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")).__name__ == "OlmoeForCausalLM"


def test_what_cannot_be_is_one_line(saved: Path, words: Tokenizer, tmp_path: Path) -> None:
    unpruned = open_checkpoint(saved / "shortcut, unpruned")
    with pytest.raises(ConfigError, match=r"^--pruned: moe\.prune\.policy=none in the training of .*step-00000003$"):
        export(unpruned, tmp_path / "hf", "auto", 10**9, words, pruned=True)
    assert not (tmp_path / "hf").exists()
    biased = open_checkpoint(saved / "by score, biased")
    with pytest.raises(ConfigError, match="no Hugging Face family holds this model"):
        export(biased, tmp_path / "hf", "auto", 10**9, words)
    export(open_checkpoint(saved / "similar"), tmp_path / "pruned", "auto", 10**9, words, pruned=True)
    with pytest.raises(ConfigError, match=r"pruned/config\.json \(occult\) has pruning=\{.*\(only trans"):
        open_model(tmp_path / "pruned")


def test_shortcut_blocks_come_back_with_their_bits(saved: Path, words: Tokenizer, tmp_path: Path) -> None:
    """Through a checkpoint without a bias, which is the one thing that is not read."""
    checkpoint = open_checkpoint(saved / "shortcut, unpruned")
    checkpoint.state["expert_bias"] = {}
    export(checkpoint, tmp_path / "hf", "auto", 10**9, words)
    again = open_model(tmp_path / "hf")
    assert all(torch.equal(again.read(name), checkpoint.read(name)) for name in again.entries)
    import_model(again, tmp_path / "run")
    ids = torch.randint(320, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(load_model(open_checkpoint(tmp_path / "run"))(ids), load_model(checkpoint)(ids))
