"""Our own class for transformers: every shape in logits, step by step with its cache, padded, and read back."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_scmoe import SHAPES, SMALL, build, relative, tokens

from occult_train.checkpoint.logical import logical_tensors
from occult_train.hub.source import open_model
from occult_train.hub.verify import compare
from occult_train.inference import fill_model
from occult_train.models.config import ModelConfig
from occult_train.models.families.modeling_occult import OccultForCausalLM
from occult_train.models.families.occult import OCCULT
from occult_train.models.gpt import GPT
from occult_train.models.scmoe_config import ScMoEConfig
from occult_train.parallel.grid import Grid

NONE = ScMoEConfig()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are computed fastest by one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


OTHERS = {
    "heads": replace(SMALL, scmoe=NONE, qk_norm="head", head_dim=6, num_key_value_heads=2, shared_expert_gate=True),
    "dense": replace(SMALL, scmoe=NONE, dense_layers=[1, 2], attention_bias="qkv", qk_norm="none", clip_qkv=1.0),
    "tied": replace(
        SMALL,
        scmoe=NONE,
        tie_word_embeddings=True,
        attention_bias="all",
        rope_theta=500.0,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        shared_expert_intermediate_size=0,
    ),
}
CASES = {**SHAPES, **OTHERS}


def save(model: GPT, folder: Path) -> OccultForCausalLM:
    """Write a folder by our table of names and the safetensors library, and load it as transformers does."""
    tensors = {}
    for tensor in logical_tensors(model, Grid()):
        for number, piece in enumerate(tensor.pieces):
            part = tensor.parameter[number] if tensor.expert else tensor.parameter
            tensors[OCCULT.to_hub(piece)] = part.detach().clone()
    (folder / "config.json").write_text(json.dumps(OCCULT.hub_config(model.config)))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    theirs, info = OccultForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return theirs.eval()


@torch.no_grad()
@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_transformers_computes_what_we_do(config: ModelConfig, tmp_path: Path) -> None:
    model = build(config, dtype=torch.float32).eval()
    theirs, ids = save(model, tmp_path), tokens(2, 21)
    assert relative(theirs(ids).logits, model(ids).double()) < 1e-6
    made = theirs.generate(ids[:, :9], max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None)
    for step in range(9, 15):
        assert torch.equal(model(made[:, :step])[:, -1].argmax(-1), made[:, step])
    assert compare(model, tmp_path).differing == 0
    loss = theirs(ids, labels=ids).loss
    assert float(loss) == pytest.approx(float(model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())), rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("config", [CASES["pos2-cg1"], CASES["dgmoe"], CASES["heads"]], ids=["scmoe", "dgmoe", "heads"])
def test_padding_changes_nothing_and_what_was_written_is_read(config: ModelConfig, tmp_path: Path) -> None:
    model = build(config, dtype=torch.float32).eval()
    theirs, short = save(model, tmp_path), tokens(1, 5)
    batch = torch.cat((tokens(1, 9, seed=1), torch.cat((torch.zeros(1, 4, dtype=torch.long), short), dim=1)))
    mask = (torch.arange(9) >= torch.tensor([[0], [4]])).long()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = theirs.generate(batch, attention_mask=mask, **options)
    assert torch.equal(made[1, 4:], theirs.generate(short, attention_mask=torch.ones_like(short), **options)[0])
    again = open_model(tmp_path)
    assert asdict(again.config.model) == asdict(replace(config, num_key_value_heads=config.kv_heads,
                                                        head_dim=config.dim_per_head))  # fmt: skip
    ours = fill_model(again.config.model, again)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), model.parameters(), strict=True))


@torch.no_grad()
def test_eager_attention_is_the_same(tmp_path: Path) -> None:
    """Which makes transformers hand a mask of numbers down."""
    model = build(CASES["two-experts"], dtype=torch.float32).eval()
    theirs, ids = save(model, tmp_path), tokens(2, 9)
    theirs.config._attn_implementation = "eager"
    assert relative(theirs(ids).logits, model(ids).double()) < 1e-6
