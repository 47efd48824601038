"""Trainers that are compared: ours, Hugging Face's model under DeepSpeed AutoEP, and under torch's FSDP.

All train the same model from the same weights: Qwen3-MoE's architecture, since transformers and AutoEP both know it, in
the shape of the config. Attention is torch's SDPA everywhere; nothing is recomputed.
"""

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from occult_train.config import Config
from occult_train.engine import build_engine, deepspeed_config
from occult_train.models.config import ModelConfig
from occult_train.models.families.olmoe import OLMOE
from occult_train.models.init import draw
from occult_train.parallel.grid import Grid
from occult_train.tools.bench.shapes import read_value

IGNORED = -100
"""Label of a position without a target."""


class Ours:
    """Our engine around our GPT, stepped as the trainer does it."""

    def __init__(self, config: Config, options: dict[str, str]) -> None:
        self.grid = Grid.create(config.parallel.expert)
        self.engine = build_engine(config, self.grid)
        self.micro = config.train.micro_batch_size

    def set_accumulation(self, count: int) -> None:
        """Micro-batches a step."""
        self.engine.set_train_batch_size(self.micro * self.grid.world_size * count)

    def step(self, batches: list[Tensor]) -> Tensor:
        """One optimizer step over micro-batches of token ids [B, S]; the mean loss before it."""
        self.engine.module.train()
        losses = []
        for ids in batches:
            labels = nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
            loss = self.engine(input_ids=ids, labels=labels)
            self.engine.backward(loss)
            self.engine.step()
            losses.append(loss.detach())
        self.engine.module.finish_step()
        return torch.stack(losses).mean()

    def gradient_norm(self) -> float:
        """Of the last step, before clipping."""
        return float(self.engine.get_global_grad_norm())


class AutoEP:
    """Hugging Face's model, its expert layers replaced by DeepSpeed; `options` are keys of `expert_parallel`."""

    def __init__(self, config: Config, options: dict[str, str]) -> None:
        self.micro, self.ranks = config.train.micro_batch_size, dist.get_world_size()
        model = hub_model(config, torch.bfloat16)
        given = {name: read_value(value) for name, value in options.items()}
        section = {"enabled": True, "autoep_size": config.parallel.expert, **given}
        settings = deepspeed_config(config, self.ranks) | {"expert_parallel": section}
        self.engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)[0]

    def set_accumulation(self, count: int) -> None:
        """Micro-batches a step."""
        self.engine.set_train_batch_size(self.micro * self.ranks * count)

    def step(self, batches: list[Tensor]) -> Tensor:
        """One optimizer step over micro-batches of token ids [B, S]; the mean loss before it."""
        self.engine.module.train()
        losses = []
        for ids in batches:
            loss = self.engine(input_ids=ids, labels=ids, use_cache=False).loss
            self.engine.backward(loss)
            self.engine.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def gradient_norm(self) -> float:
        """Of the last step, before clipping."""
        return float(self.engine.get_global_grad_norm())


class FSDP:
    """Hugging Face's model under fully_shard, its experts computed by torch's grouped product; fp32 masters."""

    def __init__(self, config: Config, options: dict[str, str]) -> None:
        self.clip, self.accumulation = config.train.gradient_clipping, 1
        self.model: Any = hub_model(config, torch.float32)
        self.model.set_experts_implementation("grouped_mm")
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in self.model.model.layers:
            fully_shard(block, mp_policy=policy)
        fully_shard(self.model, mp_policy=policy)
        optimizer = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=optimizer.lr,
            betas=(optimizer.betas[0], optimizer.betas[1]),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=torch.cuda.is_available(),
        )
        self._norm: Any = 0.0

    def set_accumulation(self, count: int) -> None:
        """Micro-batches a step."""
        self.accumulation = count

    def step(self, batches: list[Tensor]) -> Tensor:
        """One optimizer step over micro-batches of token ids [B, S]; the mean loss before it."""
        self.model.train()
        losses = []
        for i, ids in enumerate(batches):
            self.model.set_requires_gradient_sync(i == len(batches) - 1)
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
            (loss / len(batches)).backward()
            losses.append(loss.detach())
        self._norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack(losses).mean()

    def gradient_norm(self) -> float:
        """Of the last step, before clipping. Collective."""
        return float(self._norm.full_tensor())


TRAINERS: dict[str, Callable[[Config, dict[str, str]], Any]] = {"ours": Ours, "autoep": AutoEP, "fsdp": FSDP}


def hub_model(config: Config, dtype: torch.dtype) -> nn.Module:
    """transformers' Qwen3-MoE in the shape of `config.model`, with the weights that our model would start with."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape = config.model
    hub = Qwen3MoeConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        moe_intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.dim_per_head,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.num_experts_per_tok,
        norm_topk_prob=shape.norm_topk_prob,
        max_position_embeddings=shape.max_position_embeddings,
        rms_norm_eps=shape.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tie_word_embeddings,
        attn_implementation="sdpa",
        output_router_logits=False,
        use_cache=False,
    )
    device = get_accelerator().current_device_name()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Qwen3MoeForCausalLM(hub)
    finally:
        torch.set_default_dtype(before)
    _draw_weights(model, shape, config.train.seed)
    return model


@torch.no_grad()
def _draw_weights(model: nn.Module, shape: ModelConfig, seed: int) -> None:
    """Give every matrix the values of our model's of the same meaning; norms stay one."""
    weights = dict(model.named_parameters())

    def fill(target: Tensor, name: str) -> None:
        wide = torch.empty(target.shape, dtype=torch.float32, device=target.device)
        draw(wide, shape.initializer_range, f"{seed}/{name}")
        target.copy_(wide)

    for ours, theirs in OLMOE.tensors.items():
        if "{e}" in ours:  # below: they are stacked here
            continue
        for i in range(shape.num_hidden_layers if "{i}" in ours else 1):
            weight = weights.get(theirs.format(i=i))
            if weight is not None and weight.dim() >= 2:
                fill(weight, ours.format(i=i))
    for i in range(shape.num_hidden_layers):
        gate_up = weights[f"model.layers.{i}.mlp.experts.gate_up_proj"]
        down = weights[f"model.layers.{i}.mlp.experts.down_proj"]
        for expert in range(shape.num_experts):
            gate, up = gate_up[expert].chunk(2)
            for target, name in ((gate, "w1"), (up, "w3"), (down[expert], "w2")):
                fill(target, f"layers.{i}.moe.experts.{name}/{expert}")
