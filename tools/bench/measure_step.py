"""`occult bench step`: whole optimizer steps on random tokens, our trainer's and the peers'."""

import importlib.metadata
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from occult_train.config import Config, load
from occult_train.meter import peak_flops
from occult_train.tools.bench.breakdown import profile_kernels
from occult_train.tools.bench.shapes import STEP_SYSTEMS, StepTask, parse_system
from occult_train.tools.bench.step_systems import TRAINERS

WARMUP = 2
SAME_LOSS, SAME_NORM = 0.02, 0.05
"""How far loss and (relative) gradient norm of the first step may lie apart between systems with equal weights; bf16
rounding leaves about 1e-4 and 0.01."""


def measure(task: StepTask) -> dict[str, Any]:
    """A row of results, the same on every rank; with `error` and no numbers where the loss is wrong. Collective."""
    name, options = parse_system(task.system, STEP_SYSTEMS)
    ours = [f"{k}={v}" for k, v in options.items()] if name == "ours" else []
    config = load([*task.settings, *ours])
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    trainer, loss, norm = _trainer(name, config, options, device)
    row = _description(task, config) | {"first_loss": loss, "first_norm": norm}
    if error := _wrong(loss, norm, config, task):
        return row | {"error": f"not right: {error}"}
    trainer.set_accumulation(task.accumulation)
    batches = [_tokens(config, device, i) for i in range(task.accumulation)]
    last = 0.0
    for _ in range(WARMUP):
        last = float(trainer.step(batches))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = _timed(lambda: trainer.step(batches), task.seconds, device)
    row |= _speed(config, task, statistics.median(times)) | {"steps": len(times), "warm_loss": last}
    row["gradient_norm"] = trainer.gradient_norm()
    if device.type == "cuda":
        row["peak_bytes"] = _largest(torch.cuda.max_memory_allocated(), device)
        if task.breakdown:
            parts = profile_kernels(lambda i: trainer.step(batches), 1)
            row |= {f"{k}_ms": v for k, v in asdict(parts).items() if k != "top"} | {"top": parts.top}
    return row


_kept: dict[str, tuple[Any, float, float]] = {}


def _trainer(name: str, config: Config, options: dict[str, str], device: torch.device) -> tuple[Any, float, float]:
    """The trainer of this process, mean loss over ranks and gradient norm of its first step. One system a process."""
    if name not in _kept:
        trainer = TRAINERS[name](config, options)
        loss = trainer.step([_tokens(config, device, 0)]).detach().double()
        dist.all_reduce(loss)
        _kept[name] = (trainer, float(loss) / dist.get_world_size(), trainer.gradient_norm())
    return _kept[name]


def _tokens(config: Config, device: torch.device, index: int) -> Tensor:
    """Random token ids [B, S] of this rank's micro-batch `index`."""
    generator = torch.Generator().manual_seed(1000 * index + dist.get_rank())
    size = (config.train.micro_batch_size, config.data.sequence_length)
    return torch.randint(config.model.vocab_size, size, generator=generator).to(device)


def _wrong(loss: float, norm: float, config: Config, task: StepTask) -> str:
    """What is wrong with loss and gradient norm of the first step; empty if nothing is."""
    blind = math.log(config.model.vocab_size)
    if not abs(loss - blind) < 1:
        return f"the first loss is {loss:.4f}, guessing blindly gives {blind:.4f}"
    if not 0 < norm < math.inf:
        return f"the first gradient norm is {norm}"
    if task.expected is None:
        return ""
    other_loss, other_norm = task.expected
    if not abs(loss - other_loss) < SAME_LOSS:
        return f"the first loss is {loss:.4f}, another system's with equal weights {other_loss:.4f}"
    if not abs(norm / other_norm - 1) < SAME_NORM:
        return f"the first gradient norm is {norm:.4f}, another system's with equal weights {other_norm:.4f}"
    return ""


def _timed(step: Callable[[], Any], seconds: float, device: torch.device) -> list[float]:
    """Seconds of each step on the slowest rank, for about `seconds` and at least two steps. Collective."""
    times = [_time(step, device)]
    while len(times) < max(2, min(100, round(seconds / times[0]))):
        times.append(_time(step, device))
    return times


def _time(step: Callable[[], Any], device: torch.device) -> float:
    _synchronise(device)
    dist.barrier()
    started = time.perf_counter()
    step()
    _synchronise(device)
    return _largest(time.perf_counter() - started, device)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _largest(value: float, device: torch.device) -> float:
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return float(shared)


def _speed(config: Config, task: StepTask, seconds: float) -> dict[str, float]:
    length = config.data.sequence_length
    tokens = config.train.micro_batch_size * length * task.accumulation
    flops = 3 * config.model.flops_per_token(length) * tokens / seconds
    peak = peak_flops()
    speed = {"step_ms": seconds * 1000, "tokens_per_second": tokens / seconds, "tflops": flops / 1e12}
    return speed | ({"mfu": flops / peak} if peak else {})


def _description(task: StepTask, config: Config) -> dict[str, Any]:
    model = config.model
    return {
        "system": task.system,
        "shape": task.shape,
        "layers": model.num_hidden_layers,
        "sequence": config.data.sequence_length,
        "micro": config.train.micro_batch_size,
        "accumulation": task.accumulation,
        "ranks": dist.get_world_size(),
        "zero": config.zero.stage,
        "p2p": "off" if os.environ.get("NCCL_P2P_DISABLE") == "1" else "on",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "deepspeed": importlib.metadata.version("deepspeed"),
        "transformers": importlib.metadata.version("transformers"),
    }
