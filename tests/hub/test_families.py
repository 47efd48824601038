"""Every family, read from what its own code saved: the same logits, the same losses, the same gradients."""

import json
from pathlib import Path

import making
import pytest
import torch
import transformers

from occult_train.checkpoint.store import open_checkpoint
from occult_train.hub.source import open_model
from occult_train.hub.verify import compare
from occult_train.inference import load_model
from occult_train.models.families import FAMILIES, family_named
from occult_train.models.gpt import Runtime
from occult_train.tools.export import export, verify_export
from occult_train.tools.import_ import import_model

TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=making.NAMES)
def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> making.Theirs:
    return making.make(request.param, tmp_path_factory.mktemp("hub") / "model")


def tokens(theirs: making.Theirs, length: int = 13) -> torch.Tensor:
    return torch.randint(theirs.vocab_size, (2, length), generator=torch.Generator().manual_seed(5))


def test_logits_both_ways(theirs: making.Theirs, tmp_path: Path) -> None:
    """Read, imported, and exported again, where each tensor has the bits that it began with."""
    ids = tokens(theirs)
    with torch.no_grad():
        expected = theirs.logits(ids)
        assert making.difference(making.ours(theirs.folder)(ids), expected) < TOLERANCE
        import_model(open_model(theirs.folder), tmp_path / "run")
        checkpoint = open_checkpoint(tmp_path / "run")
        assert making.difference(load_model(checkpoint)(ids), expected) < TOLERANCE
    assert not checkpoint.has_optimizer
    export(checkpoint, tmp_path / "hf", "auto", 20_000, None)
    again = making.read_all(tmp_path / "hf")
    assert again.keys() == theirs.saved.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in theirs.saved.items())
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    compared = verify_export(checkpoint, tmp_path / "hf")
    assert compared.logits < TOLERANCE
    assert compared.differing == 0
    assert compared.choices > 0


def test_what_comes_back_has_the_config_it_had(theirs: making.Theirs, tmp_path: Path) -> None:
    """Through a checkpoint alone, without the files that a run keeps: the table knows all that computes."""
    first = open_model(theirs.folder).config
    family = family_named(first.raw)
    assert family in FAMILIES
    (tmp_path / "config.json").write_text(json.dumps(first.family.hub_config(first.model)))
    assert first.family.read_config(json.loads((tmp_path / "config.json").read_text())) == first.fields


def test_loss_and_gradients_are_the_family_s(theirs: making.Theirs) -> None:
    """Cross-entropy and balancing loss as the family defines it, and every gradient of what has one name in both."""
    config = open_model(theirs.folder).config
    moe = config.settings()["moe"]
    model = making.ours(
        theirs.folder,
        Runtime(balance=moe["balance"], aux_loss=moe["aux_loss"], aux_loss_coef=moe["aux_loss_coef"]),
    ).train()
    data = tokens(theirs)
    ids, labels = data[:, :-1].contiguous(), data[:, 1:].contiguous()
    loss = model(ids, labels)
    expected = theirs.loss(ids, labels)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=TOLERANCE)
    assert float(loss.detach()) > float(model.last_losses.cross_entropy) * (1 + 10 * TOLERANCE), "balancing counts"
    loss.backward()
    for weight in theirs.weights.values():
        weight.grad = None
    expected.backward()
    compared = 0
    for name, parameter in model.named_parameters():
        if "moe.experts" in name:
            continue
        hub = config.family.to_hub(name)
        weight = theirs.weights.get(hub, theirs.weights.get(hub.replace("block_sparse_moe", "mlp")))
        assert making.difference(parameter.grad, weight.grad) < 2 * TOLERANCE, name
        compared += 1
    assert compared > 20


def test_deepseek_exports_with_its_class(tmp_path: Path) -> None:
    """What a user types: transformers runs the file beside the weights, also step by step with its cache."""
    making.make("deepseek", tmp_path / "model")
    import_model(open_model(tmp_path / "model"), tmp_path / "run")
    export(open_checkpoint(tmp_path / "run"), tmp_path / "hf", "auto", 10**9, None)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules")
    ids = torch.randint(131, (2, 9), generator=torch.Generator().manual_seed(1))
    ours = load_model(open_checkpoint(tmp_path / "run"))
    with torch.no_grad():
        assert making.difference(model(ids).logits, ours(ids)) < TOLERANCE
        made = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, eos_token_id=None)
        for step in range(9, 14):
            assert torch.equal(ours(made[:, :step])[:, -1].argmax(-1), made[:, step])


@pytest.mark.parametrize("name", ["mixtral", "deepseek"])
def test_half_precision_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    made = making.make(name, tmp_path / "model", torch.bfloat16)
    import_model(open_model(tmp_path / "model"), tmp_path / "run")
    export(open_checkpoint(tmp_path / "run"), tmp_path / "hf", "auto", 10**9, None)
    again = making.read_all(tmp_path / "hf")
    assert {tensor.dtype for tensor in again.values()} == {torch.bfloat16}
    assert all(torch.equal(again[key], tensor) for key, tensor in made.saved.items())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", making.CONFIGS)
def test_stacked_experts_are_read(name: str, tmp_path: Path) -> None:
    """The layout that transformers has in memory, in several files."""
    made = making.make(name, tmp_path, save_original_format=False, max_shard_size="60KB")
    assert any(key.endswith("experts.gate_up_proj") for key in made.saved)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = tokens(made)
    with torch.no_grad():
        assert making.difference(making.ours(tmp_path)(ids), made.logits(ids)) < TOLERANCE
    assert compare(making.ours(tmp_path), tmp_path).differing == 0
