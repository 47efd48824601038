"""Our own family: every model that we train, with the class that travels beside its weights (modeling_occult.py)."""

from dataclasses import asdict
from typing import Any

from occult_train.models.config import ModelConfig
from occult_train.models.families.family import (
    ATTENTION_BIASES,
    DENSE_LAYERS,
    EXPERTS,
    GATE_UP_DOWN,
    QK_NORMS,
    SHARED_TENSORS,
    Family,
)
from occult_train.models.families.rules import Rule, Unfit, head_dim, kv_heads, same
from occult_train.models.scmoe_config import ScMoEConfig

PRUNING, BIAS = "pruning", "expert_bias"
"""Keys of config.json that come with tensors of their own, and that are written but not read back."""
GATE = "model.layers.{i}.mlp.gate"
"""Where those tensors lie."""


def _as_it_is(name: str, kind: type) -> Rule:
    """A setting that is no number, under its own name."""

    def read(hub: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(hub.get(name), kind):
            raise Unfit(f"{name}={hub.get(name)!r}, which is no {kind.__name__}")
        return {name: hub[name]}

    return Rule((name,), read, lambda model: {name: getattr(model, name)})


def _scmoe() -> Rule:
    def read(hub: dict[str, Any]) -> dict[str, Any]:
        return {"scmoe": ScMoEConfig(**hub["scmoe"])}

    return Rule(("scmoe",), read, lambda model: {"scmoe": asdict(model.scmoe)})


def _routing() -> Rule:
    def read(hub: dict[str, Any]) -> dict[str, Any]:
        for name in (PRUNING, BIAS):
            if hub.get(name):
                raise Unfit(f"{name}={hub[name]} (only transformers reads it)")
        return {}

    def write(model: ModelConfig) -> dict[str, Any]:
        return {}

    return Rule((PRUNING, BIAS), read, write)


OCCULT = Family(
    architecture="OccultForCausalLM",
    model_type="occult",
    rules=(
        same("intermediate_size"),
        same("num_experts"),
        same("norm_topk_prob"),
        same("max_position_embeddings"),
        same("rms_norm_eps"),
        same("rope_theta"),
        same("clip_qkv"),
        same("shared_expert_intermediate_size"),
        same("shared_expert_gate"),
        same("dense_intermediate_size"),
        kv_heads(),
        head_dim(write_always=True),
        _as_it_is("qk_norm", str),
        _as_it_is("attention_bias", str),
        _as_it_is("dense_layers", list),
        _scmoe(),
        _routing(),
    ),
    tensors={
        **SHARED_TENSORS,
        **ATTENTION_BIASES,
        **QK_NORMS,
        **DENSE_LAYERS,
        **EXPERTS,
        **{
            f"layers.{{i}}.{ours}shared_expert.{w}.weight": f"model.layers.{{i}}.{theirs}shared_expert.{name}.weight"
            for ours, theirs in (("moe.", "mlp."), ("", ""))
            for w, name in GATE_UP_DOWN.items()
        },
        "layers.{i}.moe.shared_expert_gate.weight": "model.layers.{i}.mlp.shared_expert_gate.weight",
        "layers.{i}.shortcut_norm.weight": "model.layers.{i}.shortcut_layernorm.weight",
        "layers.{i}.combine_gate.weight": "model.layers.{i}.combine_gate.weight",
    },
    aux_default=0.01,
    aux_loss="mean",
    modelling="modeling_occult.py",
    shortcuts=True,
)
