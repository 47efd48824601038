"""Small engines to save, load and train on."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from occult_train.checkpoint.logical import KINDS, key, logical_tensors
from occult_train.config import Config, load
from occult_train.engine import build_engine, learning_rate, set_learning_rate
from occult_train.parallel import zero
from occult_train.parallel.grid import Grid

SMALL = [
    "model.vocab_size=64",
    "model.hidden_size=32",
    "model.intermediate_size=16",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_experts=8",
    "model.num_experts_per_tok=3",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
    "train.gradient_clipping=0.5",
    "train.precision=fp32",
    "deepspeed.zero_optimization.stage3_param_persistence_threshold=40",  # else a model this small stays whole
    "data.sequence_length=16",
    "scheduler.warmup_steps=0",
    "moe.balance=bias",
]


def start(overrides: list[str]) -> tuple[Config, Grid, Any]:
    """A small config with overrides, and its engine."""
    config = load(SMALL + overrides)
    grid = Grid.create(config.parallel.expert)
    return config, grid, build_engine(config, grid)


def tokens(step: int) -> torch.Tensor:
    """Four sequences [4, 16] that depend on the step alone."""
    return torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(step))


def train(config: Config, grid: Grid, engine: Any, steps: range) -> list[float]:
    """Losses of optimizer steps."""
    losses = []
    for step in steps:
        rows = tokens(step).to(engine.device)
        set_learning_rate(engine, learning_rate(config, step))
        engine.module.train()
        total, accumulation = torch.zeros((), device=engine.device), config.accumulation_steps(grid.world_size)
        for part in range(accumulation):
            row = rows[part * grid.world_size + grid.rank][None]
            loss = engine(row, row)
            total += engine.module.last_losses.cross_entropy.float()
            engine.backward(loss)
            if config.zero.stage == 0 and engine.is_gradient_accumulation_boundary():
                zero.clip_stage_0(engine, grid, config.train.gradient_clipping)
            engine.step()
        engine.module.finish_step()
        dist.all_reduce(total)
        losses.append(float(total) / accumulation / grid.world_size)
    return losses


def everything(engine: Any, grid: Grid) -> dict[str, torch.Tensor]:
    """All logical tensors of all ranks, and the balancing biases."""
    own = {}
    zero.make_states(engine)
    for tensor in logical_tensors(engine.module, grid):
        for kind in KINDS:
            value = zero.get_full(engine, tensor.parameter, kind).cpu()
            parts = value if tensor.expert else [value]
            own |= {key(kind, piece): part.clone() for piece, part in zip(tensor.pieces, parts, strict=True)}
    for index, layer in engine.module.moe_layers().items():
        own[f"bias.{index}"] = layer.router.expert_bias.cpu().clone()
    ranks: list[Any] = [None] * grid.world_size
    dist.all_gather_object(ranks, own)
    return {name: tensor for part in ranks for name, tensor in part.items()}


def status(field: str) -> int:
    """A size of this process from /proc, in bytes."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
