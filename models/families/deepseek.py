"""DeepSeek-MoE (arXiv 2401.06066; the layout of DeepSeek-MoE-16B): first layer dense, ungated shared experts."""

from occult_train.models.families.family import (
    ATTENTION_BIASES,
    DENSE_LAYERS,
    EXPERTS,
    GATE_UP_DOWN,
    SHARED_TENSORS,
    Family,
)
from occult_train.models.families.rules import (
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

DEEPSEEK = Family(
    architecture="DeepseekForCausalLM",
    model_type="deepseek",
    rules=(
        same("intermediate_size", "moe_intermediate_size"),
        same("num_experts", "n_routed_experts", alias="num_experts"),
        same("norm_topk_prob", default=False),
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
