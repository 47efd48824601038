"""Shape of a GPT mixture-of-experts model, and what follows from it: parameter and FLOP counts.

Field names are those of transformers' configs, so that a table can map one to the other.
"""

from dataclasses import dataclass, field

from occult_train.errors import ConfigError
from occult_train.models.scmoe_config import ScMoEConfig

QK_NORMS = ("none", "full", "head")
ATTENTION_BIASES = ("none", "qkv", "all")
MOST_LAYERS = 1024
"""So that a file that claims more is refused before lists of them are made."""
MOST_EXPERTS = 2**17
"""Of all layers together."""
MOST_PARAMS = 10**15


@dataclass
class ModelConfig:
    """A decoder-only transformer; every layer is a mixture of experts except `dense_layers`."""

    vocab_size: int = 0
    """Rows of the embedding. 0 takes the tokenizer's size, padded to a multiple of 64."""
    hidden_size: int = 2048
    intermediate_size: int = 1024
    """Hidden width F of one routed expert (SwiGLU: three matrices of hidden_size x F)."""
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int = 0
    """Grouped-query attention. 0 means as many as attention heads."""
    head_dim: int = 0
    """0 means hidden_size / num_attention_heads."""
    qk_norm: str = "full"
    """RMSNorm on queries and keys: none, full (over all heads together, OLMoE) or head (each head, Qwen3)."""
    attention_bias: str = "none"
    """Biases in attention: none, qkv (queries, keys and values, Qwen2) or all (the output's too)."""
    clip_qkv: float = 0.0
    """Largest magnitude of queries, keys (both after their norm) and values. 0 does not clip."""
    num_experts: int = 64
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False
    """Divide the chosen experts' probabilities by their sum."""
    shared_expert_intermediate_size: int = 0
    """Width of an expert that every token passes beside the routed ones. 0 means none."""
    shared_expert_gate: bool = False
    """Scale the shared expert's output by a learned sigmoid of the token."""
    dense_layers: list[int] = field(default_factory=list)
    """Layers (from 0) with a plain SwiGLU MLP in place of experts."""
    dense_intermediate_size: int = 0
    """Width of the MLP in `dense_layers`."""
    scmoe: ScMoEConfig = field(default_factory=ScMoEConfig)
    """Experts that read an earlier representation; none by default."""
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    from_pretrained: str = ""
    """What to start from: its shape, weights and balancing. The folder of a Hugging Face model, or a run or checkpoint
    of ours, whose steps and optimizer are left behind. Empty starts from random."""

    @property
    def kv_heads(self) -> int:
        """Key/value heads with the default resolved."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def dim_per_head(self) -> int:
        """Width of one attention head with the default resolved."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the layers with routed experts, ascending."""
        return [i for i in range(self.num_hidden_layers) if i not in self.mlp_layers]

    @property
    def mlp_layers(self) -> list[int]:
        """Indices of the layers with a plain MLP: `dense_layers`, or the first of each pair that scmoe makes."""
        if self.scmoe.block == "none":
            return self.dense_layers
        return list(range(0, self.num_hidden_layers, 2)) if self.scmoe.every == 2 else []

    def validate(self) -> None:
        """Raise ConfigError for a shape that cannot be built; vocab_size 0 is allowed (not resolved yet)."""
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_experts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be at least 1")
        layers, experts = self.num_hidden_layers, self.num_experts
        if layers > MOST_LAYERS:
            raise ConfigError(f"model.num_hidden_layers={layers} must be at most {MOST_LAYERS}")
        if layers * experts > MOST_EXPERTS:
            raise ConfigError(
                f"model.num_experts={experts} in each of model.num_hidden_layers={layers} makes more than the "
                f"{MOST_EXPERTS} experts that a model may have"
            )
        for name in (
            "vocab_size",
            "num_key_value_heads",
            "head_dim",
            "shared_expert_intermediate_size",
            "dense_intermediate_size",
            "initializer_range",
            "clip_qkv",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"model.{name}={getattr(self, name)} must not be negative")
        for name in ("rope_theta", "rms_norm_eps", "max_position_embeddings"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be positive")
        if not self.head_dim and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} is not divisible by "
                f"model.num_attention_heads={self.num_attention_heads}; change one or set model.head_dim"
            )
        if self.dim_per_head % 2:
            raise ConfigError(f"model.head_dim={self.dim_per_head} must be even (rotary embedding)")
        if self.num_attention_heads % self.kv_heads:
            raise ConfigError(
                f"model.num_attention_heads={self.num_attention_heads} is not divisible by "
                f"model.num_key_value_heads={self.kv_heads}"
            )
        if self.qk_norm not in QK_NORMS:
            raise ConfigError(f"model.qk_norm={self.qk_norm} is not one of {', '.join(QK_NORMS)}")
        if self.attention_bias not in ATTENTION_BIASES:
            raise ConfigError(f"model.attention_bias={self.attention_bias} is not one of {', '.join(ATTENTION_BIASES)}")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ConfigError(
                f"model.num_experts_per_tok={self.num_experts_per_tok} must lie between 1 and "
                f"model.num_experts={self.num_experts}"
            )
        wrong = [i for i in self.dense_layers if not 0 <= i < self.num_hidden_layers]
        if wrong:
            raise ConfigError(
                f"model.dense_layers={self.dense_layers} names layer {wrong[0]}, "
                f"but model.num_hidden_layers={self.num_hidden_layers}"
            )
        if len(set(self.dense_layers)) < len(self.dense_layers):
            raise ConfigError(f"model.dense_layers={self.dense_layers} names a layer twice")
        if self.dense_layers and self.dense_intermediate_size < 1:
            raise ConfigError(
                f"model.dense_layers={self.dense_layers} needs model.dense_intermediate_size, "
                f"which is {self.dense_intermediate_size}"
            )
        if self.shared_expert_gate and not self.shared_expert_intermediate_size:
            raise ConfigError("model.shared_expert_gate=true needs model.shared_expert_intermediate_size, which is 0")
        self.scmoe.validate(self)
        if not self.moe_layers:
            raise ConfigError(f"model.dense_layers={self.dense_layers} leaves no layer with experts")
        if self.num_params() > MOST_PARAMS:
            raise ConfigError(
                f"the model has more than {MOST_PARAMS:.0e} parameters: model.hidden_size={self.hidden_size}, "
                f"vocab_size={self.vocab_size}, intermediate_size={self.intermediate_size}, "
                f"num_attention_heads={self.num_attention_heads}, head_dim={self.head_dim}, "
                f"shared_expert_intermediate_size={self.shared_expert_intermediate_size}, "
                f"dense_intermediate_size={self.dense_intermediate_size}"
            )

    @property
    def choices_per_token(self) -> int:
        """Experts that one token passes in a layer: num_experts_per_tok, of each of the two choices of dgmoe."""
        return self.num_experts_per_tok * (2 if self.scmoe.block == "dgmoe" else 1)

    def _attention_params(self) -> int:
        q, kv = self.num_attention_heads * self.dim_per_head, self.kv_heads * self.dim_per_head
        norm = {"none": 0, "full": q + kv, "head": 2 * self.dim_per_head}[self.qk_norm]
        bias = {"none": 0, "qkv": q + 2 * kv, "all": q + 2 * kv + self.hidden_size}[self.attention_bias]
        return self.hidden_size * (2 * q + 2 * kv) + norm + bias

    def _layer_params(self, layer: int, experts: int) -> int:
        """Parameters of one layer, counting `experts` of its routed experts."""
        h = self.hidden_size
        common = self._attention_params() + 2 * h
        if layer in self.mlp_layers:
            return common + 3 * h * self.dense_intermediate_size
        if self.scmoe.block != "none":
            common += h * (1 + self.scmoe.gate_size)  # the shortcut's norm, and the gate
        shared = 3 * h * self.shared_expert_intermediate_size + (h if self.shared_expert_gate else 0)
        return common + h * self.num_experts + shared + 3 * h * self.intermediate_size * experts

    def _count(self, experts: int) -> int:
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        layers = sum(self._layer_params(i, experts) for i in range(self.num_hidden_layers))
        return embeddings + layers + self.hidden_size

    def num_params(self) -> int:
        """Parameters of the whole model, over all ranks."""
        return self._count(self.num_experts)

    def active_params(self) -> int:
        """Parameters that one token passes: as `num_params`, with `choices_per_token` experts a layer."""
        return self._count(self.choices_per_token)

    def flops_per_token(self, sequence_length: int) -> int:
        """FLOPs of the matrix products in one token's forward pass; training costs three times that.

        Attention counts all sequence_length keys, causal or not (the convention of PaLM's appendix B and of torch's
        FLOP counter). Norms, rotations, softmax and embedding look-ups are not counted.
        """
        h, q, kv = (
            self.hidden_size,
            self.num_attention_heads * self.dim_per_head,
            self.kv_heads * self.dim_per_head,
        )
        attention = h * (2 * q + 2 * kv) + 2 * q * sequence_length
        dense = 3 * h * self.dense_intermediate_size
        moe = h * self.num_experts * (2 if self.scmoe.block == "dgmoe" else 1)
        moe += 3 * h * self.intermediate_size * self.choices_per_token
        moe += 3 * h * self.shared_expert_intermediate_size + (h if self.shared_expert_gate else 0)
        moe += h * self.scmoe.gate_size if self.scmoe.block != "none" else 0
        layers = self.num_hidden_layers * attention
        layers += len(self.mlp_layers) * dense + len(self.moe_layers) * moe
        return 2 * (layers + h * self.vocab_size)
