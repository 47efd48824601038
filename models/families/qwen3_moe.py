"""Qwen3-MoE (arXiv 2505.09388): queries and keys normed head by head, heads of their own width."""

from occult_train.models.families.family import (
    ATTENTION_BIASES,
    DENSE_LAYERS,
    EXPERTS,
    QK_NORMS,
    SHARED_TENSORS,
    Family,
)
from occult_train.models.families.rules import (
    QWEN_RULES,
    attention_bias,
    head_dim,
    kv_heads,
    ours_only,
)

QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    rules=(
        *QWEN_RULES,
        kv_heads(default=4),
        head_dim(write_always=True),
        attention_bias("attention_bias", "all", default=False),
        ours_only(qk_norm="head", shared_expert_intermediate_size=0, shared_expert_gate=False, clip_qkv=0.0),
    ),
    tensors={**SHARED_TENSORS, **ATTENTION_BIASES, **QK_NORMS, **DENSE_LAYERS, **EXPERTS},
)
