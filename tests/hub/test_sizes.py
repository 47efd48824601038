"""Shapes at random: one expert or as many as a token takes, one key/value head, dense layers anywhere, both layouts."""

import random
from pathlib import Path
from typing import Any

import making
import pytest
import torch
import transformers

from occult_train.hub.source import open_model
from occult_train.hub.verify import compare

CLASSES = {
    "olmoe": transformers.OlmoeConfig,
    "mixtral": transformers.MixtralConfig,
    "qwen2_moe": transformers.Qwen2MoeConfig,
    "qwen3_moe": transformers.Qwen3MoeConfig,
}


def common(rng: random.Random) -> dict[str, Any]:
    heads, layers, experts = rng.choice([1, 2, 3, 6]), rng.randint(1, 4), rng.choice([1, 2, 3, 5, 16])
    return {
        "vocab_size": rng.choice([3, 17, 101]),
        "hidden_size": heads * rng.choice([2, 6, 10]),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        "num_experts": experts,
        "num_local_experts": experts,
        "num_experts_per_tok": rng.randint(1, experts),
        "intermediate_size": rng.choice([3, 8, 13]),
        "max_position_embeddings": 16,
        "initializer_range": 0.3,
        "tie_word_embeddings": rng.random() < 0.4,
        "rms_norm_eps": rng.choice([1e-6, 1e-3]),
        "rope_parameters": {"rope_type": "default", "rope_theta": rng.choice([100.0, 1e6])},
        "eos_token_id": 1,
        "pad_token_id": None,
    }


def own(name: str, rng: random.Random, layers: int) -> dict[str, Any]:
    if name == "olmoe":
        flags = {"attention_bias": rng.random() < 0.5, "norm_topk_prob": rng.random() < 0.5}
        return {**flags, "clip_qkv": rng.choice([None, 0.5])}
    if name == "mixtral":
        return {"head_dim": rng.choice([None, 4, 12])}
    keys = {"moe_intermediate_size": rng.choice([2, 7]), "norm_topk_prob": rng.random() < 0.5}
    keys["mlp_only_layers"] = rng.sample(range(layers), rng.randint(0, layers - 1))
    if name == "qwen2_moe":
        return {**keys, "shared_expert_intermediate_size": rng.choice([1, 9]), "qkv_bias": rng.random() < 0.5}
    return {**keys, "head_dim": rng.choice([4, 14]), "attention_bias": rng.random() < 0.5}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", CLASSES)
def test_any_shape_is_read_as_transformers_computes_it(name: str, seed: int, tmp_path: Path) -> None:
    rng = random.Random(f"{name} {seed}")
    shape = common(rng)
    config = CLASSES[name](**shape, **own(name, rng, shape["num_hidden_layers"]))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path, save_original_format=rng.random() < 0.5)
    assert open_model(tmp_path).config.remarks() == []
    compared = compare(making.ours(tmp_path), tmp_path)
    assert compared.logits < 1e-5
    assert compared.differing == 0
