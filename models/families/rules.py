"""Rules that turn settings of ours into those of a family's config.json and back. A table is a list of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from occult_train.models.config import ModelConfig

REQUIRED: Any = object()
"""Default of a setting that config.json must hold."""


class Unfit(Exception):
    """What the other side cannot hold. The message names the setting and its value."""


@dataclass(frozen=True)
class Rule:
    """How some settings of one side say the same as some of the other."""

    theirs: tuple[str, ...]
    """Keys of config.json that it accounts for."""
    read: Callable[[dict[str, Any]], dict[str, Any]]
    """From config.json to fields of ModelConfig. Raises Unfit."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """From a model to keys of config.json. Raises Unfit."""


def same(ours: str, theirs: str = "", default: Any = REQUIRED, alias: str = "") -> Rule:
    """One setting under two names; absent or null in config.json it is the family's default.

    Args:
        alias: what some versions of transformers write in place of the key.
    """
    key = theirs or ours

    def read(hub: dict[str, Any]) -> dict[str, Any]:
        value, other = hub.get(key), hub.get(alias)
        if value is not None and other is not None and value != other:
            raise Unfit(f"both {key}={value} and {alias}={other}")
        value = other if value is None else value
        if value is None and default is REQUIRED:
            raise Unfit(f"no {key}")
        return {ours: _typed(key, default if value is None else value, type(getattr(ModelConfig(), ours)))}

    return Rule((key, alias), read, lambda model: {key: getattr(model, ours)})


def always(key: str, value: Any, write: bool = True) -> Rule:
    """A key of config.json that must be absent, null or this value.

    Args:
        write: whether the family's own configs have the key.
    """

    def read(hub: dict[str, Any]) -> dict[str, Any]:
        if hub.get(key) not in (None, value):
            raise Unfit(f"{key}={hub[key]}")
        return {}

    return Rule((key,), read, lambda model: {key: value} if write else {})


def ours_only(**ours: Any) -> Rule:
    """Settings of ours that have one value in this family."""

    def check(model: ModelConfig) -> dict[str, Any]:
        for name, value in ours.items():
            found = getattr(model, name)
            if found != value:
                raise Unfit(f"model.{name}={found} (it has {value if value not in (0, []) else 'none'})")
        return {}

    return Rule((), lambda hub: dict(ours), check)


def rope(default_theta: float) -> Rule:
    """Rotary positions without scaling: `rope_theta`, or what newer configs gather under `rope_parameters`."""

    def read(hub: dict[str, Any]) -> dict[str, Any]:
        given = {**(hub.get("rope_parameters") or {}), **(hub.get("rope_scaling") or {})}
        thetas = {theta for theta in (given.pop("rope_theta", None), hub.get("rope_theta")) if theta is not None}
        if len(thetas) > 1:
            raise Unfit(f"two values of rope_theta, {sorted(thetas)}")
        kinds = {given.pop(name, "default") for name in ("rope_type", "type")}
        partial = {given.pop("partial_rotary_factor", 1.0), hub.get("partial_rotary_factor") or 1.0}
        if kinds != {"default"} or partial != {1.0} or given:
            found = {name: hub[name] for name in keys if hub.get(name) is not None}
            raise Unfit("scaled or partial rotary positions: " + ", ".join(f"{k}={v}" for k, v in found.items()))
        return {"rope_theta": _typed("rope_theta", thetas.pop() if thetas else default_theta, float)}

    def write(model: ModelConfig) -> dict[str, Any]:
        return {"rope_theta": model.rope_theta, "rope_scaling": None}

    keys = ("rope_theta", "rope_parameters", "rope_scaling", "partial_rotary_factor")
    return Rule(keys, read, write)


def kv_heads(default: int = 0) -> Rule:
    """Key/value heads; null, or absent without a default, means as many as attention heads."""
    key = "num_key_value_heads"

    def read(hub: dict[str, Any]) -> dict[str, Any]:
        return {key: _typed(key, hub.get(key, default) or hub.get("num_attention_heads") or 0, int)}

    return Rule((key,), read, lambda model: {key: model.kv_heads})


def head_dim(write_always: bool) -> Rule:
    """Width of a head; written where it is not the usual one, or always."""

    def read(hub: dict[str, Any]) -> dict[str, Any]:
        return {"head_dim": _typed("head_dim", hub.get("head_dim") or 0, int)}

    def write(model: ModelConfig) -> dict[str, Any]:
        usual = model.dim_per_head * model.num_attention_heads == model.hidden_size
        return {} if usual and not write_always else {"head_dim": model.dim_per_head}

    return Rule(("head_dim",), read, write)


def usual_head_dim() -> Rule:
    """Heads of hidden_size / num_attention_heads and nothing else."""

    def read(hub: dict[str, Any]) -> dict[str, Any]:
        width = hub.get("head_dim")
        if width is not None and width * hub.get("num_attention_heads", 0) != hub.get("hidden_size"):
            raise Unfit(f"head_dim={width} beside hidden_size={hub.get('hidden_size')}")
        return {"head_dim": 0}

    def write(model: ModelConfig) -> dict[str, Any]:
        if model.dim_per_head * model.num_attention_heads != model.hidden_size:
            raise Unfit(f"model.head_dim={model.head_dim} (it has hidden_size / num_attention_heads)")
        return {}

    return Rule(("head_dim",), read, write)


def attention_bias(key: str, true_means: str, default: bool) -> Rule:
    """A flag for biases in attention: on queries, keys and values (`qkv`), or on all four projections (`all`)."""

    def read(hub: dict[str, Any]) -> dict[str, Any]:
        value = hub.get(key)
        on = _typed(key, default if value is None else value, bool)
        return {"attention_bias": true_means if on else "none"}

    def write(model: ModelConfig) -> dict[str, Any]:
        if model.attention_bias not in ("none", true_means):
            raise Unfit(f"model.attention_bias={model.attention_bias}")
        return {key: model.attention_bias != "none"}

    return Rule((key,), read, write)


def window(switch: bool) -> Rule:
    """Attention over a sliding window, which we do not have: it must be off, or as wide as the longest sequence.

    Args:
        switch: whether `use_sliding_window` turns it on, as in the Qwen families.
    """
    keys = ("sliding_window", *(("use_sliding_window", "max_window_layers", "layer_types") if switch else ()))

    def read(hub: dict[str, Any]) -> dict[str, Any]:
        width = hub.get("sliding_window")
        kinds = set(hub.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
        on = not switch or hub.get("use_sliding_window") or "sliding_attention" in (hub.get("layer_types") or ())
        if kinds:
            raise Unfit(f"layer_types={sorted(kinds)}")
        if on and width and width < hub.get("max_position_embeddings", 0):
            raise Unfit(f"attention over a window, sliding_window={width}")
        return {}

    def write(model: ModelConfig) -> dict[str, Any]:
        return {"sliding_window": None, **({"use_sliding_window": False} if switch else {})}

    return Rule(keys, read, write)


def qwen_dense_layers() -> Rule:
    """Dense layers where mlp_only_layers says so or decoder_sparse_step leaves them; their width is their own."""
    keys = ("mlp_only_layers", "decoder_sparse_step", "intermediate_size")

    def read(hub: dict[str, Any]) -> dict[str, Any]:
        only = hub.get("mlp_only_layers") or []
        step = _typed("decoder_sparse_step", hub.get("decoder_sparse_step") or 1, int)
        layers = range(_typed("num_hidden_layers", hub.get("num_hidden_layers") or 0, int))
        dense = [i for i in layers if i in only or (i + 1) % step]
        width = _typed("intermediate_size", hub.get("intermediate_size") or 0, int)
        return {"dense_layers": dense, "dense_intermediate_size": width if dense else 0}

    def write(model: ModelConfig) -> dict[str, Any]:
        width = {"intermediate_size": model.dense_intermediate_size} if model.dense_layers else {}
        return {"mlp_only_layers": sorted(model.dense_layers), "decoder_sparse_step": 1, **width}

    return Rule(keys, read, write)


def deepseek_dense_layers() -> Rule:
    """Dense layers: the first ones, and between those at every moe_layer_freq-th place."""
    keys = ("first_k_dense_replace", "moe_layer_freq", "intermediate_size")

    def pattern(layers: int, first: int, every: int) -> list[int]:
        return [i for i in range(layers) if i < first or i % every]

    def read(hub: dict[str, Any]) -> dict[str, Any]:
        layers = _typed("num_hidden_layers", hub.get("num_hidden_layers") or 0, int)
        first = _typed("first_k_dense_replace", hub.get("first_k_dense_replace") or 0, int)
        every = _typed("moe_layer_freq", hub.get("moe_layer_freq") or 1, int)
        dense = pattern(layers, first, every)
        width = _typed("intermediate_size", hub.get("intermediate_size") or 0, int)
        return {"dense_layers": dense, "dense_intermediate_size": width if dense else 0}

    def write(model: ModelConfig) -> dict[str, Any]:
        layers, dense = model.num_hidden_layers, sorted(model.dense_layers)
        width = {"intermediate_size": model.dense_intermediate_size} if dense else {}
        for every in range(1, layers + 1):
            for first in range(layers + 1):
                if pattern(layers, first, every) == dense:
                    return {"first_k_dense_replace": first, "moe_layer_freq": every, **width}
        raise Unfit(f"model.dense_layers={dense} (it has them first, or at regular distances)")

    return Rule(keys, read, write)


def shared_experts() -> Rule:
    """n_shared_experts of a routed expert's width, which compute as one of their widths' sum does. Ungated."""
    key = "n_shared_experts"

    def read(hub: dict[str, Any]) -> dict[str, Any]:
        count = _typed(key, hub.get(key) or 0, int)
        width = _typed("moe_intermediate_size", hub.get("moe_intermediate_size") or 0, int)
        return {"shared_expert_intermediate_size": count * width, "shared_expert_gate": False}

    def write(model: ModelConfig) -> dict[str, Any]:
        width = model.shared_expert_intermediate_size
        if model.shared_expert_gate:
            raise Unfit("model.shared_expert_gate=true")
        if width % model.intermediate_size:
            raise Unfit(
                f"model.shared_expert_intermediate_size={width}, no multiple of "
                f"model.intermediate_size={model.intermediate_size}"
            )
        return {key: width // model.intermediate_size or None}

    return Rule((key,), read, write)


def _typed(key: str, value: Any, kind: type) -> Any:
    """The value, if it is of the kind that our setting has."""
    right = isinstance(value, (int, float) if kind is float else kind)
    if not right or (kind is not bool and isinstance(value, bool)) or not math.isfinite(value):
        raise Unfit(f"{key}={value!r}, which is no {kind.__name__}")
    return kind(value)


QWEN_RULES = (
    same("intermediate_size", "moe_intermediate_size"),
    same("num_experts", alias="num_local_experts"),
    same("norm_topk_prob", default=False),
    same("max_position_embeddings", default=32768),
    same("rms_norm_eps", default=1e-6),
    rope(10000.0),
    window(switch=True),
    qwen_dense_layers(),
)
"""What Qwen2-MoE and Qwen3-MoE share."""
