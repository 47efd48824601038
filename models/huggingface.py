"""Our parameters under the names that Hugging Face's model families give them. One table a family."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from occult_train.errors import ConfigError
from occult_train.models.config import ModelConfig


@dataclass(frozen=True)
class Family:
    """How one family stores a model.

    `tensors` maps our logical names (experts one by one) to the hub's, with {i} for a layer and {e} for an expert.
    """

    architecture: str
    model_type: str
    tensors: dict[str, str]
    config: Callable[[ModelConfig], dict[str, Any]]
    """The family's config.json beyond the fields that all families share."""
    refuse: Callable[[ModelConfig], str | None]
    """What of a model the family cannot hold, or None."""

    def to_hub(self, name: str) -> str:
        """The hub's name of a logical tensor. Raises KeyError for a tensor that the family does not have."""
        for ours, theirs in self.tensors.items():
            match = re.fullmatch(
                re.escape(ours).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{e\}", r"(?P<e>\d+)"), name
            )
            if match:
                return theirs.format(**match.groupdict())
        raise KeyError(name)

    def hub_config(self, model: ModelConfig) -> dict[str, Any]:
        """The content of config.json, without token ids and dtype."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_size,
            "intermediate_size": model.intermediate_size,
            "num_hidden_layers": model.num_hidden_layers,
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.kv_heads,
            "num_experts": model.num_experts,
            "num_experts_per_tok": model.num_experts_per_tok,
            "norm_topk_prob": model.norm_topk_prob,
            "max_position_embeddings": model.max_position_embeddings,
            "rope_theta": model.rope_theta,
            "rms_norm_eps": model.rms_norm_eps,
            "tie_word_embeddings": model.tie_word_embeddings,
            "initializer_range": model.initializer_range,
            "hidden_act": "silu",
            "attention_bias": False,
            **self.config(model),
        }


def _refuse_olmoe(model: ModelConfig) -> str | None:
    if model.qk_norm != "full":
        return f"model.qk_norm={model.qk_norm} (it has full)"
    if model.dim_per_head * model.num_attention_heads != model.hidden_size:
        return f"model.head_dim={model.head_dim} (it has hidden_size / num_attention_heads)"
    if model.shared_expert_intermediate_size:
        return f"a shared expert (model.shared_expert_intermediate_size={model.shared_expert_intermediate_size})"
    if model.dense_layers:
        return f"dense layers (model.dense_layers={model.dense_layers})"
    return None


OLMOE = Family(
    architecture="OlmoeForCausalLM",
    model_type="olmoe",
    tensors={
        "embed_tokens.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
        "layers.{i}.attention_norm.weight": "model.layers.{i}.input_layernorm.weight",
        "layers.{i}.mlp_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
        "layers.{i}.attention.q_proj.weight": "model.layers.{i}.self_attn.q_proj.weight",
        "layers.{i}.attention.k_proj.weight": "model.layers.{i}.self_attn.k_proj.weight",
        "layers.{i}.attention.v_proj.weight": "model.layers.{i}.self_attn.v_proj.weight",
        "layers.{i}.attention.o_proj.weight": "model.layers.{i}.self_attn.o_proj.weight",
        "layers.{i}.attention.q_norm.weight": "model.layers.{i}.self_attn.q_norm.weight",
        "layers.{i}.attention.k_norm.weight": "model.layers.{i}.self_attn.k_norm.weight",
        "layers.{i}.moe.router.weight": "model.layers.{i}.mlp.gate.weight",
        "layers.{i}.moe.experts.w1.{e}": "model.layers.{i}.mlp.experts.{e}.gate_proj.weight",
        "layers.{i}.moe.experts.w2.{e}": "model.layers.{i}.mlp.experts.{e}.down_proj.weight",
        "layers.{i}.moe.experts.w3.{e}": "model.layers.{i}.mlp.experts.{e}.up_proj.weight",
    },
    config=lambda model: {"clip_qkv": None},
    refuse=_refuse_olmoe,
)

FAMILIES = (OLMOE,)


def family_of(model: ModelConfig) -> Family:
    """The family that holds this model exactly.

    Raises:
        ConfigError: none does; says for each why not.
    """
    reasons = []
    for family in FAMILIES:
        reason = family.refuse(model)
        if reason is None:
            return family
        reasons.append(f"{family.architecture} cannot hold {reason}")
    raise ConfigError("no Hugging Face family holds this model: " + "; ".join(reasons))
