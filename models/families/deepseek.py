"""DeepSeek-MoE (arXiv 2401.06066; the layout of DeepSeek-MoE-16B): first layer dense, ungated shared experts."""

from typing import Any

from occult_train.models.config import ModelConfig
from occult_train.models.families.family import (
    ATTENTION_BIASES,
    DENSE_LAYERS,
    EXPERTS,
    GATE_UP_DOWN,
    SHARED_TENSORS,
    Family,
)
from occult_train.models.families.rules import (
    Rule,
    Unfit,
    always,
    attention_bias,
    deepseek_dense_layers,
    kv_heads,
    ours_only,
    rope,
    same,
    shared_experts,
    usual_head_dim,
)

NORMALISE = same("norm_topk_prob", default=False)


def _read_normalise(hub: dict[str, Any]) -> dict[str, Any]:
    """One expert's weight stays its probability."""
    return {"norm_topk_prob": NORMALISE.read(hub)["norm_topk_prob"] and hub.get("num_experts_per_tok") != 1}


def _write_normalise(model: ModelConfig) -> dict[str, Any]:
    if model.norm_topk_prob and model.num_experts_per_tok == 1:
        raise Unfit("model.norm_topk_prob=true with model.num_experts_per_tok=1")
    return NORMALISE.write(model)


DEEPSEEK = Family(
    architecture="DeepseekForCausalLM",
    model_type="deepseek",
    rules=(
        same("intermediate_size", "moe_intermediate_size"),
        same("num_experts", "n_routed_experts", alias="num_experts"),
        Rule(("norm_topk_prob",), _read_normalise, _write_normalise),
        same("max_position_embeddings", default=2048),
        same("rms_norm_eps", default=1e-6),
        kv_heads(),
        usual_head_dim(),
        attention_bias("attention_bias", "all", default=False),
        rope(10000.0),
        deepseek_dense_layers(),
        shared_experts(),
        always("scoring_func", "softmax"),
        always("routed_scaling_factor", 1.0, write=False),
        ours_only(qk_norm="none", clip_qkv=0.0),
    ),
    tensors={
        **SHARED_TENSORS,
        **ATTENTION_BIASES,
        **DENSE_LAYERS,
        **EXPERTS,
        **{
            f"layers.{{i}}.moe.shared_expert.{ours}.weight": f"model.layers.{{i}}.mlp.shared_experts.{theirs}.weight"
            for ours, theirs in GATE_UP_DOWN.items()
        },
    },
    aux_key="aux_loss_alpha",
    aux_loss="sequence",
    modelling="modeling_deepseek.py",
)
