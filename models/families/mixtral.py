"""Mixtral (arXiv 2401.04088): the chosen experts' weights sum to one."""

from occult_train.models.families.family import SHARED_TENSORS, Family
from occult_train.models.families.rules import always, head_dim, kv_heads, ours_only, rope, same, window

MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    rules=(
        same("intermediate_size"),
        same("num_experts", "num_local_experts", alias="num_experts"),
        same("max_position_embeddings", default=4096 * 32),
        same("rms_norm_eps", default=1e-5),
        kv_heads(default=8),
        head_dim(write_always=True),
        rope(1e6),
        window(switch=False),
        always("router_jitter_noise", 0.0, write=False),
        ours_only(norm_topk_prob=True, qk_norm="none", attention_bias="none", clip_qkv=0.0),
        ours_only(shared_expert_intermediate_size=0, shared_expert_gate=False, dense_layers=[]),
    ),
    tensors={
        **SHARED_TENSORS,
        "layers.{i}.moe.router.weight": "model.layers.{i}.block_sparse_moe.gate.weight",
        **{
            f"layers.{{i}}.moe.experts.{w}.{{e}}": f"model.layers.{{i}}.block_sparse_moe.experts.{{e}}.{w}.weight"
            for w in ("w1", "w2", "w3")
        },
    },
    renamed=(".block_sparse_moe.", ".mlp."),
)
