"""Settings of shortcut-connected experts, and which of them fit together."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from occult_train.errors import ConfigError

if TYPE_CHECKING:
    from occult_train.models.config import ModelConfig

SHORTCUT_BLOCKS = ("none", "scmoe", "dgmoe")
POSITIONS = ("pos1", "pos2", "pos3")
COMBINATIONS = ("add", "cg1", "cg2")
OPERATORS = ("attention", "mlp", "next attention", "shared expert")
"""Of a pair of blocks, beside the routed experts."""


@dataclass
class ScMoEConfig:
    """Shortcut-connected experts (ScMoE, arXiv 2404.05019), which read an earlier representation than their block's
    own, so that their communication can run beside computing. The formulas are in models/scmoe.py."""

    block: str = "none"
    """scmoe (routed experts on the shortcut, a shared expert on the current representation), dgmoe (no shared expert;
    the same experts on both, one each), or none."""
    position: str = "pos2"
    """Where the shortcut begins: pos1 at the block's input, pos2 behind the attention of the dense block before, pos3
    at the input of that block."""
    every: int = 2
    """2: every second block has experts, the first is dense (of model.dense_intermediate_size). 1: every block has."""
    combine: str = "add"
    """How the shared expert's output SE and the routed experts' MoE are joined: add; cg1, c * SE + MoE with a learned
    sigmoid c of the token; cg2, c * SE + (1 - c) * MoE by a softmax over two learned scores of it."""

    @property
    def before(self) -> int:
        """Of a pair's four operators, how many come before the shortcut begins."""
        return {"pos1": 2, "pos2": 1, "pos3": 0}[self.position]

    @property
    def window(self) -> tuple[str, ...]:
        """The operators between where the shortcut begins and where the experts' output is added; none where the
        experts also read what comes last."""
        return OPERATORS[self.before :] if self.block == "scmoe" else ()

    @property
    def gate_size(self) -> int:
        """Outputs of the learned gate that joins both."""
        return {"add": 0, "cg1": 1, "cg2": 2}[self.combine]

    def validate(self, model: "ModelConfig") -> None:
        """Raise ConfigError for values that are impossible in this model."""
        for name, value, allowed in (
            ("block", self.block, SHORTCUT_BLOCKS),
            ("position", self.position, POSITIONS),
            ("every", self.every, (1, 2)),
            ("combine", self.combine, COMBINATIONS),
        ):
            if value not in allowed:
                raise ConfigError(f"model.scmoe.{name}={value} is not one of {', '.join(map(str, allowed))}")
        if self.block == "none":
            return
        mine = f"model.scmoe.block={self.block}"
        if model.dense_layers and sorted(model.dense_layers) != model.mlp_layers:
            raise ConfigError(
                f"model.dense_layers={model.dense_layers} contradicts model.scmoe.every={self.every}, which makes "
                f"layers {model.mlp_layers} dense; leave it out"
            )
        if self.every == 2 and model.num_hidden_layers % 2:
            raise ConfigError(
                f"model.num_hidden_layers={model.num_hidden_layers} must be even for the pairs of model.scmoe.every=2"
            )
        if self.every == 2 and not model.dense_intermediate_size:
            raise ConfigError("model.scmoe.every=2 needs model.dense_intermediate_size, which is 0")
        if model.shared_expert_gate:
            raise ConfigError(f"model.shared_expert_gate=true cannot go with {mine}; use model.scmoe.combine=cg1")
        if model.norm_topk_prob and model.num_experts_per_tok == 1:
            raise ConfigError(
                f"model.norm_topk_prob=true with model.num_experts_per_tok=1 gives every expert the weight 1 and its "
                f"router no gradient; {mine} weighs it by its probability"
            )
        if self.block == "dgmoe":
            self._validate_dgmoe(model)
            return
        if self.every == 1 and self.position != "pos1":
            raise ConfigError(
                f"model.scmoe.position={self.position} needs a dense block before each, and model.scmoe.every=1 has "
                "none: only pos1 is possible"
            )
        if not model.shared_expert_intermediate_size:
            raise ConfigError(f"{mine} needs model.shared_expert_intermediate_size, which is 0")

    def _validate_dgmoe(self, model: "ModelConfig") -> None:
        for name, value, only in (
            ("scmoe.position", self.position, "pos2"),
            ("scmoe.every", self.every, 2),
            ("scmoe.combine", self.combine, "add"),
            ("num_experts_per_tok", model.num_experts_per_tok, 1),
            ("shared_expert_intermediate_size", model.shared_expert_intermediate_size, 0),
        ):
            if value != only:
                raise ConfigError(f"model.{name}={value} cannot go with model.scmoe.block=dgmoe, which has {only}")
        if model.num_experts < 2:
            raise ConfigError(
                f"model.num_experts={model.num_experts} must be at least 2 for model.scmoe.block=dgmoe, whose two "
                "choices differ"
            )
