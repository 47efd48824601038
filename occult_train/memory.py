"""What training takes of a rank's memory, estimated from the configuration: nothing is built.

H hidden size, F expert width, E experts, K experts a token, V vocabulary, N heads, W ranks, D ranks that share one set
of experts, b bytes of a value in the type that the model computes in. What DeepSpeed keeps for a parameter was counted
for each stage and precision, and what a forward in plain torch keeps for backward; tests count both again. What the
fused backend keeps is as the head of moe/fused.py has it.
"""

from dataclasses import dataclass

from occult_train.config import Config

VALUE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
BUCKET = 500_000_000
"""DeepSpeed's zero_optimization.reduce_bucket_size, in values."""
PROCESS = {"cuda": 1.5e9, "cpu": 0.7e9}
"""Bytes of a rank without a model: CUDA's context and NCCL's buffers, or Python and its modules."""


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of a rank while it trains, at the most: as backward begins, with another micro-batch's gradients there."""

    weights: float
    gradients: float
    """With DeepSpeed's bucket for reducing them."""
    optimizer: float
    """Master weights and moments."""
    activations: float
    """Kept of a micro-batch for backward; logits and their gradient."""
    routing: float
    """Rows of tokens that arrived from other ranks, kept too, and what one layer's experts compute at a time."""
    process: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(vars(self).values())


def estimate(config: Config, ranks: int, device: str) -> MemoryNeed:
    """What a rank needs. All is taken as trained, whatever train.trainable says, and routing as uniform.

    Args:
        config: with model.vocab_size resolved.
        ranks: W.
        device: cuda, whose experts the fused backend computes unless the config says otherwise, or cpu.
    """
    model = config.model
    routed = 3 * model.hidden_size * model.intermediate_size * model.num_experts * len(model.moe_layers)
    rest, experts = model.num_params() - routed, routed / config.parallel.expert
    common = _by_parameter(config, ranks)
    of_experts = _by_parameter(config, ranks // config.parallel.expert)
    weights, gradients, optimizer = (rest * a + experts * b for a, b in zip(common, of_experts, strict=True))
    width = VALUE_BYTES[config.train.precision]
    if config.zero.stage:
        wanted = config.deepspeed.get("zero_optimization", {}).get("reduce_bucket_size", BUCKET)
        gradients += width * int(wanted)
    if config.zero.stage == 3:  # the layer being computed is whole, and the next on its way
        weights += 2 * width * (rest + experts) / model.num_hidden_layers
    fused = device == "cuda" and config.moe.backend != "reference"
    tokens = config.train.micro_batch_size * config.data.sequence_length
    activations = tokens * (kept_of_token(config, fused) + (4 + width) * model.vocab_size)
    if config.data.mask_documents:
        activations += tokens * config.data.sequence_length
    return MemoryNeed(weights, gradients, optimizer, activations, tokens * _routing(config), PROCESS[device])


def _by_parameter(config: Config, sharing: int) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer for one parameter that so many ranks hold."""
    stage, half = config.zero.stage, config.train.precision != "fp32"
    width = VALUE_BYTES[config.train.precision]
    if stage == 0:
        return width, 4, 8
    gradients = 4 + width if stage == 1 and half else 4 / sharing
    return width / (sharing if stage == 3 else 1), gradients, 12 / sharing


def kept_of_token(config: Config, fused: bool) -> float:
    """Bytes that a forward keeps of one token for backward, but for rows of other ranks.

    Args:
        fused: whether the fused backend computes the experts, on GPUs, where norms keep less too; else plain torch.
    """
    model, width = config.model, VALUE_BYTES[config.train.precision]
    norm = (2 * width if fused else 4 + 2 * width) * model.hidden_size
    total: float = norm + 4 * model.vocab_size
    for layer in range(model.num_hidden_layers):
        dense = layer in model.mlp_layers
        if config.train.activation_checkpointing == "selective":
            total += (2 if dense else 3) * width * model.hidden_size + (0 if dense else _choice(config))
        else:
            total += _attention(config, fused) + 2 * norm
            total += _dense(model.dense_intermediate_size, config, fused) if dense else _experts(config, fused)
            total += norm if model.scmoe.block != "none" and not dense else 0
    return total


def _attention(config: Config, fused: bool) -> float:
    model, width = config.model, VALUE_BYTES[config.train.precision]
    q, kv = model.num_attention_heads * model.dim_per_head, model.kv_heads * model.dim_per_head
    kept = width * (2 * q + 2 * kv) + 4 * model.num_attention_heads
    if model.qk_norm != "none":
        kept += (width if fused else 4 + width) * (q + kv)
    return kept + (width * (q + 2 * kv) if model.clip_qkv else 0)


def _dense(size: int, config: Config, fused: bool) -> float:
    """Of a SwiGLU of such a width: both products and what is made of them, silu apart in plain torch."""
    return (3 if fused else 4) * VALUE_BYTES[config.train.precision] * size


def _choice(config: Config) -> float:
    """Scores and choices."""
    return 8 * config.model.num_experts + 12 * config.model.choices_per_token


def _experts(config: Config, fused: bool) -> float:
    model, width = config.model, VALUE_BYTES[config.train.precision]
    kept = _choice(config) + _dense(model.shared_expert_intermediate_size, config, fused)
    if fused:
        return kept + 2 * width * model.intermediate_size * model.choices_per_token
    kept += 8 * model.num_experts + (4 * model.hidden_size if width == 2 else 0)
    per_copy = (width + 4) * model.hidden_size + 4 * width * model.intermediate_size
    return kept + per_copy * model.choices_per_token


def _routing(config: Config) -> float:
    """Of a token: its rows on other ranks in each layer, and what travels and is computed in one."""
    model, width, devices = config.model, VALUE_BYTES[config.train.precision], config.parallel.expert
    copies = model.choices_per_token
    row = width * model.hidden_size + 8 * copies
    rows = 0.0
    if devices > 1:
        rows = copies if config.dispatcher() == "all_to_all" else devices * (1 - (1 - 1 / devices) ** copies)
    expanded = width * copies * (2 * model.hidden_size + 3 * model.intermediate_size)
    return rows * row * (len(model.moe_layers) + 2) + expanded
