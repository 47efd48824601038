"""A Hugging Face model family as a table: its config.json and its tensors' names, read in both directions."""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from occult_train.models.config import ModelConfig
from occult_train.models.families.rules import Rule, Unfit, always, same

SHARED_RULES = (
    same("vocab_size"),
    same("hidden_size"),
    same("num_hidden_layers"),
    same("num_attention_heads"),
    same("num_experts_per_tok"),
    same("initializer_range", default=0.02),
    same("tie_word_embeddings", default=False),
    always("hidden_act", "silu"),
    always("attention_dropout", 0.0),
    always("quantization_config", None, write=False),
)
"""What every family here has."""
ATTENTION = "layers.{i}.attention."
SHARED_TENSORS = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    "layers.{i}.attention_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "layers.{i}.mlp_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    **{f"{ATTENTION}{p}_proj.weight": f"model.layers.{{i}}.self_attn.{p}_proj.weight" for p in "qkvo"},
}
ATTENTION_BIASES = {f"{ATTENTION}{p}_proj.bias": f"model.layers.{{i}}.self_attn.{p}_proj.bias" for p in "qkvo"}
QK_NORMS = {f"{ATTENTION}{p}_norm.weight": f"model.layers.{{i}}.self_attn.{p}_norm.weight" for p in "qk"}
GATE_UP_DOWN = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
EXPERTS = {
    "layers.{i}.moe.router.weight": "model.layers.{i}.mlp.gate.weight",
    **{
        f"layers.{{i}}.moe.experts.{ours}.{{e}}": f"model.layers.{{i}}.mlp.experts.{{e}}.{theirs}.weight"
        for ours, theirs in GATE_UP_DOWN.items()
    },
}
DENSE_LAYERS = {
    f"layers.{{i}}.mlp.{ours}.weight": f"model.layers.{{i}}.mlp.{theirs}.weight"
    for ours, theirs in GATE_UP_DOWN.items()
}
KEPT = {
    *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "auto_map", "output_router_logits", "pretraining_tp"),
    *("output_attentions", "output_hidden_states", "return_dict", "_attn_implementation", "chunk_size_feed_forward"),
    *("is_encoder_decoder", "problem_type", "id2label", "label2id", "_commit_hash", "_experts_implementation"),
}
"""Keys of config.json that say nothing of what the model computes here."""


@dataclass(frozen=True)
class Stack:
    """A tensor of a file. With parts it is [E, parts * rows, columns] and holds matrix `part` of every expert."""

    name: str
    part: int = 0
    parts: int = 0


STACKED = {
    "layers.{i}.moe.experts.w1.{e}": Stack("model.layers.{i}.mlp.experts.gate_up_proj", 0, 2),
    "layers.{i}.moe.experts.w3.{e}": Stack("model.layers.{i}.mlp.experts.gate_up_proj", 1, 2),
    "layers.{i}.moe.experts.w2.{e}": Stack("model.layers.{i}.mlp.experts.down_proj", 0, 1),
}
"""The layout that transformers has in memory since version 5, and writes where asked to."""


@dataclass(frozen=True)
class Family:
    """How one family stores a model. `tensors` maps our logical names (experts one by one) to the hub's, with {i} for
    a layer and {e} for an expert."""

    architecture: str
    model_type: str
    rules: tuple[Rule, ...]
    tensors: dict[str, str]
    aux_key: str = "router_aux_loss_coef"
    """Key of config.json with the balancing loss's coefficient."""
    aux_default: float = 0.001
    aux_loss: str = "pooled"
    """What `moe.aux_loss` is in this family."""
    renamed: tuple[str, str] = ("", "")
    """A part of hub names, and what newer transformers calls it in memory."""
    stacked: dict[str, Stack] = field(default_factory=lambda: STACKED)
    modelling: str = ""
    """File beside this one with a transformers class for it, where transformers has none."""
    shortcuts: bool = False
    """Whether it has experts on a shortcut."""

    def all_rules(self) -> tuple[Rule, ...]:
        """Those of every family, then its own."""
        return (*SHARED_RULES, *self.rules)

    def read_config(self, hub: dict[str, Any]) -> dict[str, Any]:
        """Fields of ModelConfig from a config.json. Raises Unfit."""
        return {name: value for rule in self.all_rules() for name, value in rule.read(hub).items()}

    def read_aux(self, hub: dict[str, Any]) -> tuple[str, float]:
        """`moe.aux_loss` and its coefficient. Raises Unfit."""
        value = hub.get(self.aux_key, self.aux_default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise Unfit(f"{self.aux_key}={value!r}")
        kind = "sum" if self.aux_loss == "sequence" and hub.get("seq_aux") is False else self.aux_loss
        return kind, float(value)

    def write_aux(self, kind: str, coefficient: float) -> dict[str, Any]:
        """Keys of config.json for a balancing loss, none if it is not the family's: the coefficients do not compare."""
        if self.aux_loss == "sequence" and kind in ("sequence", "sum"):
            return {self.aux_key: coefficient, "seq_aux": kind == "sequence"}
        return {self.aux_key: coefficient} if kind == self.aux_loss else {}

    def unknown(self, hub: dict[str, Any]) -> list[str]:
        """Keys of a config.json that this table knows nothing of, and that hold something."""
        known = {key for rule in self.all_rules() for key in rule.theirs} | KEPT | {self.aux_key, "seq_aux"}
        return sorted(key for key, value in hub.items() if key not in known and value)

    def hub_config(self, model: ModelConfig) -> dict[str, Any]:
        """The content of config.json, without token ids and dtype. Raises Unfit."""
        if model.scmoe.block != "none" and not self.shortcuts:
            raise Unfit(f"model.scmoe.block={model.scmoe.block} (it has none)")
        keys = {key: value for rule in self.all_rules() for key, value in rule.write(model).items()}
        return {"architectures": [self.architecture], "model_type": self.model_type, **keys}

    def refuse(self, model: ModelConfig) -> str | None:
        """What of a model the family cannot hold, or None."""
        try:
            self.hub_config(model)
        except Unfit as error:
            return str(error)
        return None

    def to_hub(self, name: str) -> str:
        """The hub's name of a logical tensor. Raises KeyError for a tensor that the family does not have."""
        ours, numbers = self._match(name)
        return self.tensors[ours].format(**numbers)

    def candidates(self, name: str) -> Iterator[Stack]:
        """Where a logical tensor may lie in a file: by itself under its names, then in a stack of experts."""
        ours, numbers = self._match(name)
        theirs = self.tensors[ours].format(**numbers)
        found = [Stack(theirs)]
        if ours in self.stacked:
            stack = self.stacked[ours]
            found.append(Stack(stack.name.format(**numbers), stack.part, stack.parts))
        old, new = self.renamed
        yield from found
        yield from (Stack(s.name.replace(old, new), s.part, s.parts) for s in found if old and old in s.name)

    def _match(self, name: str) -> tuple[str, dict[str, str]]:
        for ours, pattern in _patterns(tuple(self.tensors)):
            if match := pattern.fullmatch(name):
                return ours, match.groupdict()
        raise KeyError(name)


@functools.cache
def _patterns(names: tuple[str, ...]) -> list[tuple[str, re.Pattern[str]]]:
    """Names with {i} and {e} as regular expressions."""
    escaped = {name: re.escape(name) for name in names}
    return [
        (name, re.compile(text.replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{e\}", r"(?P<e>\d+)")))
        for name, text in escaped.items()
    ]
