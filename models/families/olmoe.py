"""OLMoE (arXiv 2409.02060): queries and keys normed over all heads together."""

from occult_train.models.config import ModelConfig
from occult_train.models.families.family import ATTENTION_BIASES, EXPERTS, QK_NORMS, SHARED_TENSORS, Family
from occult_train.models.families.rules import Rule, attention_bias, kv_heads, ours_only, rope, same, usual_head_dim


def _clip(model: ModelConfig) -> dict[str, float | None]:
    return {"clip_qkv": model.clip_qkv or None}


OLMOE = Family(
    architecture="OlmoeForCausalLM",
    model_type="olmoe",
    rules=(
        same("intermediate_size"),
        same("num_experts", alias="num_local_experts"),
        same("norm_topk_prob", default=False),
        same("max_position_embeddings", default=4096),
        same("rms_norm_eps", default=1e-5),
        kv_heads(),
        usual_head_dim(),
        attention_bias("attention_bias", "all", default=False),
        rope(10000.0),
        Rule(("clip_qkv",), lambda hub: {"clip_qkv": float(hub.get("clip_qkv") or 0)}, _clip),
        ours_only(qk_norm="full", shared_expert_intermediate_size=0, shared_expert_gate=False, dense_layers=[]),
    ),
    tensors={**SHARED_TENSORS, **ATTENTION_BIASES, **QK_NORMS, **EXPERTS},
    aux_default=0.01,
)
