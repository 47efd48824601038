"""The papers' pilot study: does a layer's time grow with C_T, and with nothing else of the routing?

    python -m occult_train.tools.bench.pilot                         # as root: CPU ranks at EP=4 and 8, limited links
    python -m occult_train.tools.bench.pilot --gpus --top-k 2        # two GPUs, NCCL without P2P

One deduplicating layer, forward and backward, with routing that is given: tokens forced onto a set number of devices,
and clustered routing with its experts in the order of their ids and placed. T tokens, E experts, K experts a token.
"""

import contextlib
import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from occult_train.errors import UserError
from occult_train.moe.choose import Shape, Wanted, choose
from occult_train.moe.costs import groups_of_tokens
from occult_train.moe.layer import MoELayer, MoEOptions
from occult_train.moe.placement import Placement
from occult_train.moe.solver import device_of, solve
from occult_train.moe.synthetic import clustered, statistics_of
from occult_train.parallel.grid import Grid
from occult_train.tools.bench.networks import INTERFACE, address, limited, prefix
from occult_train.tools.bench.ranks import Launch, run_tasks
from occult_train.tools.bench.results import write_csv

MEASURE = "occult_train.tools.bench.pilot:measure"
LEAST_R = 0.98
STRENGTH = 2.5
"""Of the clusters in natural routing."""
FORCED = 8
"""Numbers of devices a token, from 1 to min(K, D)."""


@dataclass(frozen=True)
class Task:
    """One routing of one layer."""

    name: str
    """unplaced, placed or forced."""
    devices_a_token: float
    """Where forced: mean; tokens need the whole numbers beside it."""
    slots: tuple[int, ...]
    """slot_to_expert."""
    tokens: int
    hidden: int
    experts: int
    top_k: int
    repetitions: int


def choices(task: Task, devices: int, rank: int) -> Tensor:
    """Experts of this rank's tokens [T, K]."""
    if task.name != "forced":
        return natural(task.experts, task.top_k, task.tokens, devices, seed=100 + rank)
    generator = torch.Generator().manual_seed(rank)
    tokens, local = task.tokens, task.experts // devices
    low = int(task.devices_a_token)
    wanted_T = low + (torch.arange(tokens) < round(tokens * (task.devices_a_token - low)))
    rank_TD = torch.rand(tokens, devices, generator=generator).argsort(dim=1)
    score_TDL = torch.rand(tokens, devices, local, generator=generator)
    # on each device that a token opens its best expert first, then any there
    score_TDL += score_TDL == score_TDL.amax(dim=2, keepdim=True)
    score_TDL[rank_TD >= wanted_T[:, None]] = -1.0
    return score_TDL.flatten(1).topk(task.top_k).indices


def natural(experts: int, top_k: int, tokens: int, devices: int, seed: int) -> Tensor:
    """Clustered routing; the clusters are the same whatever the seed [T, K]."""
    sets_TK = clustered(40_000, experts, top_k, 2 * devices, STRENGTH, seed=0)
    picks = torch.randperm(sets_TK.shape[0], generator=torch.Generator().manual_seed(seed))[:tokens]
    return sets_TK[picks]


def measure(fields: dict[str, Any]) -> dict[str, Any]:
    """C_T and milliseconds of the layer's forward and backward, medians on the slowest rank. Collective."""
    task = Task(**fields)
    gpu = dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    grid = Grid.create(dist.get_world_size())
    layer = _layer(task, grid, device)
    experts_TK = choices(task, grid.expert_size, grid.rank)
    device_E = device_of(Placement(task.slots), grid.expert_size)
    used = groups_of_tokens(experts_TK, device_E, grid.expert_size).double().mean()
    generator = torch.Generator().manual_seed(grid.rank)
    logits_TE = torch.rand(task.tokens, task.experts, generator=generator)
    logits_TE = logits_TE.scatter_add(1, experts_TK, torch.full((task.tokens, task.top_k), 2.0)).to(device)
    dtype = layer.experts.w1.dtype
    x_TH = torch.randn(task.tokens, task.hidden, generator=generator).to(device, dtype).requires_grad_()
    taken = [_once(layer, x_TH, logits_TE, device) for _ in range(task.repetitions + 1)][1:]
    worst = torch.tensor(taken, dtype=torch.float64, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    mean = torch.tensor([float(used)], dtype=torch.float64, device=device)
    dist.all_reduce(mean)
    return {"c_t": float(mean) / grid.world_size, "ms": worst.tolist()}


def _layer(task: Task, grid: Grid, device: torch.device) -> MoELayer:
    """A layer of narrow experts: what is asked about is sending."""
    gpu = device.type == "cuda"
    dtype, wide = (torch.bfloat16, task.hidden // 2) if gpu else (torch.float32, 16)
    sizes = (task.hidden, wide, task.experts, task.top_k)
    # the plain transport of NCCL: others are made to hide what is measured here
    wanted = Wanted(matmul="library", transport="collective", overlap="none")
    way = choose(Shape(*sizes, task.tokens, dtype), grid, wanted)[0] if gpu else None
    options = MoEOptions(*sizes, dispatcher="dedup", way=way)
    torch.manual_seed(0)
    with torch.device(device):
        layer = MoELayer(options, grid, Placement(task.slots)).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return layer


def _once(layer: MoELayer, x_TH: Tensor, logits_TE: Tensor, device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    dist.barrier()
    wait()
    before = time.perf_counter()
    layer(x_TH, logits_TE)[0].sum().backward()
    wait()
    return (time.perf_counter() - before) * 1e3


def tasks_of(devices: int, tokens: int, hidden: int, experts: int, top_k: int, repetitions: int) -> list[Task]:
    """Forced numbers of devices from 1 to min(K, D), and natural routing unplaced and placed."""
    plain = tuple(range(experts))
    seen = statistics_of(natural(experts, top_k, 20_000, devices, seed=0), experts)
    placed = solve("hypergraph", seen, devices).slot_to_expert
    least = -(-top_k * devices // experts)
    forced = np.linspace(least, min(top_k, devices), FORCED).round(6).tolist()
    points = [("forced", value, plain) for value in forced] + [("unplaced", 0.0, plain), ("placed", 0.0, placed)]
    return [Task(*point, tokens, hidden, experts, top_k, repetitions) for point in points]


def study(tasks: list[Task], launch: Launch, rounds: int) -> list[dict[str, Any]]:
    """A row for each task: all are measured in each round, in random order, so that what disturbs the machine for a
    while disturbs all of them; medians over rounds and repetitions.

    Raises:
        UserError: a rank failed.
    """
    order = [index for _ in range(rounds) for index in random.Random(0).sample(range(len(tasks)), len(tasks))]
    times: dict[int, list[float]] = {index: [] for index in range(len(tasks))}
    c_t = [0.0] * len(tasks)
    for number, found, error in run_tasks(MEASURE, [asdict(tasks[i]) for i in order], launch):
        if error:
            raise UserError(f"measuring failed: {error.splitlines()[-1]}")
        index = order[number]
        times[index] += found["ms"]
        c_t[index] = found["c_t"]
    return [
        {"ranks": launch.ranks, "routing": task.name, "c_t": c_t[index], "ms": statistics.median(times[index])}
        | {"least_ms": min(times[index]), "most_ms": max(times[index]), "repetitions": len(times[index])}
        for index, task in enumerate(tasks)
    ]


def fitted(rows: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Slope and intercept of the time over C_T, and Pearson's r."""
    c_t, ms = (np.array([row[name] for row in rows]) for name in ("c_t", "ms"))
    slope, intercept = np.polyfit(c_t, ms, 1)
    return float(slope), float(intercept), float(np.corrcoef(c_t, ms)[0, 1])


def main(
    ranks: Annotated[str, typer.Option(help="Of CPU; a study each.")] = "4,8",
    rate: Annotated[str, typer.Option(help="Of a rank's link, each way, as tc takes it.")] = "100mbit",
    gpus: Annotated[bool, typer.Option("--gpus", help="Two GPUs over NCCL without P2P instead.")] = False,
    tokens: Annotated[int, typer.Option(help="Of a rank. [default: 1024; GPUs 16384]")] = 0,
    hidden: Annotated[int, typer.Option(help="[default: 256; GPUs 2048]")] = 0,
    experts: int = 64,
    top_k: int = 8,
    rounds: int = 3,
    repetitions: int = 3,
    csv: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Measure, print a table and the line through its points; exit code 1 if they are on none."""
    found: list[dict[str, Any]] = []
    code = 0
    for count in (2,) if gpus else tuple(int(part) for part in ranks.split(",")):
        sizes = (tokens or 16384, hidden or 2048) if gpus else (tokens or 1024, hidden or 256)
        tasks = tasks_of(count, *sizes, experts, top_k, repetitions)
        with contextlib.nullcontext() if gpus else limited(count, rate):
            if gpus:
                launch = Launch(count, environment={"NCCL_P2P_DISABLE": "1"})
            else:
                prefixes = tuple(prefix(rank) for rank in range(count))
                local = {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1"}
                launch = Launch(count, True, local, 300.0, 300.0, prefixes, address(0))
            rows = study(tasks, launch, rounds)
        slope, intercept, r = fitted(rows)
        where = "GPUs, NCCL without P2P" if gpus else f"CPU ranks, links of {rate} each way"
        table = Table(title=f"{count} {where}: {sizes[0]} tokens a rank, rows of {sizes[1]}, K={top_k}")
        for name in rows[0]:
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
        Console(width=None if Console().is_terminal else 110).print(table)
        print(f"EP={count}: {slope:.2f} ms a device of C_T and {intercept:.2f} ms; r = {r:.4f}", flush=True)
        code |= int(r < LEAST_R)
        found += rows
    if csv:
        write_csv(csv, list(found[0]), found)
    raise typer.Exit(code)


if __name__ == "__main__":
    from occult_train.distributed import prepare_environment

    prepare_environment()
    try:
        typer.run(main)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
