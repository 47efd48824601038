"""From our Config to a DeepSpeed engine, refusing what DeepSpeed would compute wrongly with experts."""

import contextlib
import copy
import io
import logging
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils import logger
from pydantic import ValidationError
from torch import nn

from occult_train.config import UNFUSED, Config
from occult_train.deepspeed_options import check_deepspeed
from occult_train.errors import ConfigError
from occult_train.models.gpt import GPT, Runtime
from occult_train.models.graphs import Graphs
from occult_train.models.init import init_weights
from occult_train.moe.choose import Shape as LayerShape
from occult_train.moe.choose import Wanted, can_run_kernels, choose
from occult_train.moe.fused import Way
from occult_train.moe.links import Cluster, Shape, gain_by_node
from occult_train.moe.placement import resolve
from occult_train.parallel.grid import Grid


def deepspeed_config(config: Config, ranks: int) -> dict[str, Any]:
    """DeepSpeed's configuration for `config` on `ranks` ranks.

    Raises:
        ConfigError: DeepSpeed does not take what the `deepspeed` section holds.
    """
    extra = {k: v for k, v in config.deepspeed.items() if k != "zero_optimization"}
    zero = {"stage": config.zero.stage, **config.deepspeed.get("zero_optimization", {})}
    adam = {
        "lr": config.optimizer.lr,
        "betas": list(config.optimizer.betas),
        "eps": config.optimizer.eps,
        "weight_decay": config.optimizer.weight_decay,
        "torch_adam": True,
    }
    if torch.cuda.is_available():
        adam["fused"] = True
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation_steps(ranks),
        # at stage 0 DeepSpeed's own clipping is wrong with experts; the trainer clips
        "gradient_clipping": config.train.gradient_clipping if config.zero.stage else 0.0,
        "optimizer": {"type": "AdamW", "params": adam},
        "zero_optimization": zero,
        "steps_per_print": 2**31,
        **extra,
    }
    if config.train.precision == "bf16":
        result |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    elif config.train.precision == "fp16":
        result |= {"fp16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    if config.deepspeed:
        try:
            DeepSpeedConfig(copy.deepcopy(result))
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"deepspeed={config.deepspeed}: {_reason(error)}") from None
    return result


def _reason(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_way(config: Config, grid: Grid) -> tuple[Way | None, str]:
    """How the experts are computed, and a line that says so. Collective; may measure for a second.

    Raises:
        ConfigError: the fused backend, or a way of it, was asked for and does not work here.
    """
    moe, model, train = config.moe, config.model, config.train
    if not _fused(config):
        name, why = choose_dispatcher(config, grid)
        return None, f"experts: reference backend (plain torch){why and f', {name} dispatcher: {why}'}"
    if not can_run_kernels():
        raise ConfigError("moe.backend=fused needs a CUDA GPU, and this machine has none; use moe.backend=reference")
    tokens = train.micro_batch_size * config.data.sequence_length
    shape = LayerShape(
        model.hidden_size,
        model.intermediate_size,
        model.num_experts,
        model.num_experts_per_tok,
        tokens,
        PRECISIONS[train.precision],
    )
    # beside a window rows may need no chunks; the schedule will tell
    overlap = "none" if moe.overlap == "auto" and schedule(config) != "none" else moe.overlap
    try:
        way, text = choose(shape, grid, Wanted(moe.matmul, moe.transport, overlap))
    except ValueError as error:
        raise ConfigError(f"moe.{error}") from None
    return way, f"experts: fused backend, {text}"


def schedule(config: Config) -> str:
    """moe.schedule with `auto` resolved where nothing is to be measured."""
    travels = config.parallel.expert > 1 and bool(config.model.scmoe.window)
    return config.moe.schedule if travels or config.moe.schedule != "auto" else "none"


def _say_schedule(config: Config) -> str:
    """A line about it; empty without shortcuts."""
    setting, scmoe = schedule(config), config.model.scmoe
    if scmoe.block == "none":
        return ""
    if setting == "auto":
        return f"shortcut experts: the gap around {', '.join(scmoe.window)} is chosen by times of the first steps"
    if setting != "none":
        return (
            f"shortcut experts: in gap {setting} of 0 to {len(scmoe.window)} around {', '.join(scmoe.window)}, as set"
        )
    why = "as set" if config.moe.schedule == "none" else "nothing travels, as parallel.expert=1"
    return f"shortcut experts: after the window; {why if scmoe.window else 'dgmoe has none'}"


def _fused(config: Config) -> bool:
    """Whether the fused backend computes the experts."""
    wanted = config.moe.backend == "auto" and torch.cuda.is_available() and config.dispatcher() not in UNFUSED
    return config.moe.backend == "fused" or wanted


def choose_dispatcher(config: Config, grid: Grid) -> tuple[str, str]:
    """The dispatcher of the reference backend, the same on all ranks, and why if there was a choice.

    The choice goes by the nodes of the hostfile and a model of common links, not by times, so that a run that is
    continued makes the same one.

    Raises:
        ConfigError: one was asked for that needs other nodes.
    """
    name, model, expert = config.dispatcher(), config.model, grid.expert_size
    several = grid.inside_group is not None
    if name == "hierarchical" and not several:
        raise ConfigError(
            "moe.dispatcher=hierarchical needs an expert-parallel group over several nodes of as many ranks each; "
            f"parallel.expert={expert} is on {grid.nodes} of {grid.node_size}"
        )
    if config.moe.dispatcher != "auto" or not several or _fused(config):
        return name, ""
    tokens = config.train.micro_batch_size * config.data.sequence_length
    row_bytes = model.hidden_size * PRECISIONS[config.train.precision].itemsize
    cluster, shape = Cluster(grid.node_size), Shape(expert, expert, grid.node_size)
    gain = gain_by_node(shape, cluster, model.num_experts, model.num_experts_per_tok, tokens, row_bytes)
    where = f"on {grid.nodes} nodes of {grid.node_size} ranks"
    if gain <= 1:
        return "dedup", f"expected {1 / gain:.2f} times as fast as hierarchical {where}"
    return "hierarchical", f"expected {gain:.2f} times as fast as dedup {where}"


def runtime(config: Config, grid: Grid, way: Way | None = None) -> Runtime:
    """How the model of `config` runs on this rank.

    Raises:
        ConfigError: train.cuda_graphs without a GPU.
    """
    if config.train.cuda_graphs and not torch.cuda.is_available():
        raise ConfigError("train.cuda_graphs=true needs a CUDA GPU, and this machine has none")
    cuts = way is not None and way.transport != "symmetric" and torch.cuda.is_available()
    return Runtime(
        way=way,
        schedule=schedule(config),
        try_chunks=cuts and config.moe.overlap == "auto",
        grid=grid,
        dispatcher=choose_dispatcher(config, grid)[0],
        placements=resolve(config.moe.placement, config.model.moe_layers, config.model.num_experts),
        selective_checkpointing=config.train.activation_checkpointing == "selective",
        graphs=Graphs() if config.train.cuda_graphs else None,
        balance=config.moe.balance,
        aux_loss_coef=config.moe.aux_loss_coef,
        aux_loss_scope=config.moe.aux_loss_scope,
        aux_loss=config.moe.aux_loss,
        z_loss_coef=config.moe.z_loss_coef,
        bias_update_rate=config.moe.bias_update_rate,
        prune=config.moe.prune.resolved(config.parallel.expert) if config.moe.prune.active else None,
    )


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether AdamW decays the parameter: matrices do, norms and the embedding do not."""
    return parameter.dim() >= 2 and not name.startswith("embed_tokens")


def freeze(model: GPT, config: Config) -> None:
    """Leave trainable what train.trainable names.

    Raises:
        ConfigError: nothing, or not the experts though they are to move.
    """
    setting = config.train.trainable
    if setting == "all":
        return
    pattern = re.compile(r"^layers\.\d+\.moe\." if setting == "moe" else setting)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(pattern.search(name) is not None)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"train.trainable={setting} is found in no parameter's name, such as layers.0.moe.router.weight"
        )
    moving = config.moe.replace.interval
    if moving and not all(p.requires_grad for layer in model.moe_layers().values() for p in layer.experts.parameters()):
        raise ConfigError(
            f"moe.replace.interval={moving} moves trainable experts, train.trainable={setting} freezes some"
        )


def build_engine(
    config: Config,
    grid: Grid,
    model: GPT | None = None,
    tensorboard: Path | None = None,
    say: Callable[[str], None] = print,
) -> Any:
    """Build the model (unless given) with initial weights, and DeepSpeed's engine around it. Collective.

    Args:
        say: takes a line for the user, on rank 0.
    """
    check_deepspeed(config)
    _check_device(config.train.precision)
    if model is None:
        way, chosen = choose_way(config, grid)
        with torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu"):
            model = GPT(config.model, runtime(config, grid, way))
        init_weights(model, config.train.seed)
        for line in (chosen, _say_schedule(config)):
            if grid.rank == 0 and line:
                say(line)
    freeze(model, config)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"name": "decay", "params": [p for n, p in named if decays(n, p)]},
        {"name": "no_decay", "params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    parameters = [group for group in groups if group["params"]]
    settings = deepspeed_config(config, grid.world_size)
    if tensorboard is not None:
        settings["tensorboard"] = {
            "enabled": True,
            "output_path": str(tensorboard.parent),
            "job_name": tensorboard.name,
        }
    # BF16_Optimizer prints memory use for every group, whatever its logger's level
    quiet = io.StringIO() if not logger.isEnabledFor(logging.INFO) else sys.stdout
    with contextlib.redirect_stdout(quiet):
        return deepspeed.initialize(model=model, model_parameters=parameters, config=settings)[0]


def _check_device(precision: str) -> None:
    """Raise ConfigError for a precision that DeepSpeed does not train in on this device."""
    device = get_accelerator()
    supported = {"fp16": device.is_fp16_supported, "bf16": device.is_bf16_supported}
    if precision in supported and not supported[precision]():
        raise ConfigError(f"train.precision={precision}: DeepSpeed does not train in it on this {device.device_name()}")


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0: linear warm-up, then the decay of scheduler.name."""
    peak, warmup = config.optimizer.lr, config.scheduler.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, config.train.steps - warmup))
    shape = {
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "linear": 1 - done,
        "constant": 1.0,
    }[config.scheduler.name]
    floor = config.scheduler.min_lr_ratio
    return peak * (floor + (1 - floor) * shape)


def set_learning_rate(engine: Any, rate: float) -> None:
    """Give every parameter group of the engine's optimizer this rate."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
