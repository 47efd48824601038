"""`occult bench layer`: one mixture-of-experts layer, ours and the peers', on the same problem.

Every system gets equal weights and inputs and must give the right outputs and gradients before it is timed.
"""

import gc
import importlib.metadata
import os
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist

from occult_train.errors import UserError
from occult_train.moe.costs import groups_of_tokens
from occult_train.moe.placement import Placement
from occult_train.moe.solver import device_of
from occult_train.parallel.grid import Grid
from occult_train.tools.bench import peers, systems
from occult_train.tools.bench.breakdown import profile_kernels
from occult_train.tools.bench.problem import Answer, Problem, make_problem, relative, right_answer
from occult_train.tools.bench.shapes import LAYER_SYSTEMS, LayerTask, Shape, parse_system
from occult_train.tools.bench.systems import Build, Layer, Unavailable
from occult_train.tools.bench.timing import (
    Clock,
    counted_all_to_all,
    device_memory_used,
    matmul_peak,
    measure_memory,
)

BUILDS: dict[str, Build] = {
    "ours": systems.build_ours,
    "ours-reference": systems.build_reference,
    "torch": systems.build_torch,
    "autoep": peers.build_autoep,
    "deepspeed-moe": peers.build_deepspeed_moe,
    "scattermoe": peers.build_scattermoe,
    "megablocks": peers.build_megablocks,
}
LIMITS = {torch.bfloat16: 0.015, torch.float32: 1e-5}
"""Largest ‖got - right‖ / ‖right‖ of outputs and gradients; measured at most 0.0064 and 3.3e-7 (0.0073 with
weights rounded to bf16, as ScatterMoE and MegaBlocks do it)."""
WARMUP = 3


def measure(task: LayerTask) -> dict[str, Any]:
    """A row of results, the same on every rank; with `error` and no numbers if the system is not right. Collective."""
    gc.collect()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    row = _description(task)
    clock, peak = _clock(device, task.dtype, task.ranks)
    problem, answer = _problem(task.shape, task.tokens, task.routing, task.ranks, task.dtype, device)
    used = device_memory_used()
    try:
        name, options = parse_system(task.system, LAYER_SYSTEMS)
        layer = BUILDS[name](problem, options)
    except (Unavailable, UserError) as error:
        return row | {"error": str(error)}
    if layer.pruning is not None or layer.placement is not None:
        answer = right_answer(problem, layer.pruning, layer.placement)
    first, _ = _check(problem, answer, layer)
    again, sent = _check(problem, answer, layer)  # the second time a layer may know what to expect
    errors = {name: max(first[name], again[name]) for name in first}
    row |= {f"error_{k}": v for k, v in errors.items()} | {"note": layer.note, "sent_bytes": sent, "peak_tflops": peak}
    row["c_t"] = _devices(problem, answer, layer)
    limit = LIMITS[problem.dtype]
    wrong = [f"{name} is off by {error:.2g}" for name, error in errors.items() if error > limit]
    if wrong:
        return row | {"error": f"not right: {', '.join(wrong)} (limit {limit:g})"}
    row |= _measure_times(task, problem, layer, clock, peak)
    if clock.gpu:
        row["kept_bytes"] = device_memory_used() - used - sum(p.numel() * p.element_size() for p in layer.parameters)
    return row


def _measure_times(task: LayerTask, problem: Problem, layer: Layer, clock: Clock, peak: float) -> dict[str, Any]:
    batches = problem.batches

    def forward(i: int) -> torch.Tensor:
        return layer.forward(batches[i % len(batches)].x_TH)

    def train(i: int) -> None:
        _drop_gradients(problem, layer)
        forward(i).backward(batches[i % len(batches)].dy_TH)

    for i in range(WARMUP):
        train(i)
    times = {"forward": clock.measure(forward, task.seconds), "train": clock.measure(train, task.seconds)}
    row: dict[str, Any] = {}
    for name, time in times.items():
        row |= {f"{name}_ms": time.median, f"{name}_p10": time.p10, f"{name}_p90": time.p90}
    row["repetitions"] = times["train"].repetitions
    row["share_of_peak"] = 3 * task.shape.flops(task.tokens) / times["train"].median / 1e9 / peak
    _drop_gradients(problem, layer)
    memory = measure_memory(lambda: forward(0), lambda y: y.backward(batches[0].dy_TH))
    if memory is not None:
        row |= {f"{name}_bytes": value for name, value in asdict(memory).items()}
    if task.breakdown and clock.gpu:
        parts = profile_kernels(train)
        row |= {f"{k}_ms": v for k, v in asdict(parts).items() if k != "top"} | {"top": parts.top}
    _drop_gradients(problem, layer)
    return row


def _check(problem: Problem, answer: Answer, layer: Layer) -> tuple[dict[str, float], int]:
    """Errors of outputs and gradients on the worst rank, and bytes sent by all ranks in forward and backward."""
    batch = problem.batches[0]
    _drop_gradients(problem, layer)
    with counted_all_to_all() as count:
        y_TH = layer.forward(batch.x_TH)
        y_TH.backward(batch.dy_TH)
    sent = count.total if layer.sent is None else layer.sent()
    assert batch.x_TH.grad is not None
    got = layer.expert_gradient(answer.expert)
    errors = {
        "y": relative(y_TH, answer.y_TH),
        "dx": relative(batch.x_TH.grad, answer.dx_TH),
        "dw": max(relative(g, right) for g, right in zip(got, answer.expert_gradients, strict=True)),
        "router": relative(layer.router_gradient(), answer.router_EH),
    }
    worst = torch.tensor([*errors.values()], dtype=torch.float64, device=problem.device)
    total = torch.tensor(sent, device=problem.device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    dist.all_reduce(total)
    _drop_gradients(problem, layer)
    return dict(zip(errors, worst.tolist(), strict=True)), int(total)


def _devices(problem: Problem, answer: Answer, layer: Layer) -> float:
    """Devices that hold a token's experts, mean over all ranks' first micro-batches. Collective."""
    experts, ranks = problem.shape.experts, problem.grid.expert_size
    device_E = device_of(layer.placement or Placement.contiguous(experts), ranks)
    mean = groups_of_tokens(answer.chosen_TK.cpu(), device_E, ranks).double().mean().to(problem.device)
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()


def _drop_gradients(problem: Problem, layer: Layer) -> None:
    for tensor in (*layer.parameters, *(batch.x_TH for batch in problem.batches)):
        tensor.grad = None


@lru_cache(maxsize=1)
def _problem(
    shape: Shape, tokens: int, routing: str, ranks: int, dtype: str, device: torch.device
) -> tuple[Problem, Answer]:
    problem = make_problem(shape, Grid.create(ranks), tokens, routing, getattr(torch, dtype), device)
    return problem, right_answer(problem)


@lru_cache(maxsize=1)
def _clock(device: torch.device, dtype: str, ranks: int) -> tuple[Clock, float]:
    """The clock, and the peak of matrix products by it."""
    clock = Clock(device)
    # what NCCL allocates at a group's first exchange must not count as the first system's
    some = torch.zeros(ranks, 2**20, device=device)
    dist.all_to_all_single(torch.empty_like(some), some, group=Grid.create(ranks).expert_group)
    return clock, matmul_peak(clock, getattr(torch, dtype))


def _description(task: LayerTask) -> dict[str, Any]:
    shape = task.shape
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    p2p = "off" if os.environ.get("NCCL_P2P_DISABLE") == "1" else "on"
    return {
        "system": task.system,
        "shape": shape.name,
        "hidden": shape.hidden,
        "intermediate": shape.intermediate,
        "experts": shape.experts,
        "top_k": shape.top_k,
        "tokens": task.tokens,
        "ranks": task.ranks,
        "routing": task.routing,
        "dtype": task.dtype,
        "p2p": p2p,
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "deepspeed": importlib.metadata.version("deepspeed"),
    }
