"""Qwen2-MoE (Qwen1.5-MoE-A2.7B): a gated shared expert, biases on queries, keys and values."""

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
    QWEN_RULES,
    Rule,
    Unfit,
    attention_bias,
    head_dim,
    kv_heads,
    ours_only,
    same,
)

WIDTH = "shared_expert_intermediate_size"


def _write_width(model: ModelConfig) -> dict[str, int]:
    if not model.shared_expert_intermediate_size:
        raise Unfit(f"model.{WIDTH}=0 (it has a shared expert)")
    return {WIDTH: model.shared_expert_intermediate_size}


QWEN2_MOE = Family(
    architecture="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    rules=(
        *QWEN_RULES,
        kv_heads(default=16),
        head_dim(write_always=False),
        attention_bias("qkv_bias", "qkv", default=True),
        Rule((WIDTH,), same(WIDTH).read, _write_width),
        ours_only(qk_norm="none", shared_expert_gate=True, clip_qkv=0.0),
    ),
    tensors={
        **SHARED_TENSORS,
        **ATTENTION_BIASES,
        **DENSE_LAYERS,
        **EXPERTS,
        **{
            f"layers.{{i}}.moe.shared_expert.{ours}.weight": f"model.layers.{{i}}.mlp.shared_expert.{theirs}.weight"
            for ours, theirs in GATE_UP_DOWN.items()
        },
        "layers.{i}.moe.shared_expert_gate.weight": "model.layers.{i}.mlp.shared_expert_gate.weight",
    },
)
