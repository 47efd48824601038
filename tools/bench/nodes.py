"""Whole training steps over hosts with slow links between them: K copies of a token, one a device, one a node.

    python -m occult_train.tools.bench.nodes                               # as root: 2 hosts of 2 ranks, 200 Mbit/s
    python -m occult_train.tools.bench.nodes --hosts 4 --csv nodes.csv

Hosts are networks of this machine; their ranks reach each other over the loopback. CPU, gloo, fp32.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch.nn.functional import pad

from occult_train.config import load
from occult_train.engine import build_engine
from occult_train.errors import UserError
from occult_train.parallel.all_to_all import Work
from occult_train.parallel.grid import Grid
from occult_train.parallel.traffic import PASSES
from occult_train.tools.bench.networks import INTERFACE, address, limited, prefix
from occult_train.tools.bench.ranks import Launch, run_tasks
from occult_train.tools.bench.results import write_csv

MEASURE = "occult_train.tools.bench.nodes:measure"
DISPATCHERS = ("all_to_all", "dedup", "hierarchical")
SEQUENCE = 128
VOCABULARY = 256
FLOAT = 4
"""Bytes of a number in a row."""
MEGABIT = 1e6 / 8


@dataclass(frozen=True)
class Task:
    """Steps with one dispatcher."""

    dispatcher: str
    ranks_of_host: int
    tokens: int
    """Of a rank in a step."""
    accumulation: int
    hidden: int
    intermediate: int
    layers: int
    experts: int
    top_k: int
    repetitions: int

    def settings(self, ranks: int) -> list[str]:
        """Of the run."""
        micro = self.tokens // self.accumulation // SEQUENCE
        return [
            f"model.hidden_size={self.hidden}",
            f"model.intermediate_size={self.intermediate}",
            f"model.num_hidden_layers={self.layers}",
            "model.num_attention_heads=4",
            f"model.num_experts={self.experts}",
            f"model.num_experts_per_tok={self.top_k}",
            f"model.vocab_size={VOCABULARY}",
            f"data.sequence_length={SEQUENCE}",
            f"train.micro_batch_size={micro}",
            f"train.global_batch_size={micro * self.accumulation * ranks}",
            "train.precision=fp32",
            f"parallel.expert={ranks}",
            f"moe.dispatcher={self.dispatcher}",
            "moe.backend=reference",
        ]


class Clock:
    """Seconds spent in all-to-alls, whose only user is the layer: rows, what travels with them, and their counts."""

    seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count while the context lasts."""
        launched, waited = dist.all_to_all_single, Work.wait
        dist.all_to_all_single, Work.wait = self._timed(launched), self._timed(waited)  # type: ignore[method-assign]
        try:
            yield
        finally:
            dist.all_to_all_single, Work.wait = launched, waited  # type: ignore[method-assign]

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            before = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - before
            return result

        return timed


def measure(fields: dict[str, Any]) -> dict[str, Any]:
    """Seconds of steps and of their exchanges, each on the rank where they are most, and rows of a step between hosts,
    of all ranks. Collective."""
    task = Task(**fields)
    ranks = dist.get_world_size()
    config = load(task.settings(ranks))
    grid = Grid.create(ranks, task.ranks_of_host)
    engine = build_engine(config, grid, say=lambda text: None)
    generator = torch.Generator().manual_seed(grid.rank)
    traffics = [layer.dispatcher.traffic for layer in engine.module.moe_layers().values()]
    steps, exchanges, rows = [], [], 0
    for repetition in range(task.repetitions + 1):
        clock = Clock()
        dist.barrier()
        before = time.perf_counter()
        with clock.running():
            for _ in range(task.accumulation):
                size = (config.train.micro_batch_size, SEQUENCE)
                ids = torch.randint(VOCABULARY, size, generator=generator)
                engine.backward(engine(input_ids=ids, labels=pad(ids[:, 1:], (0, 1), value=-100)))
                engine.step()
        taken = torch.tensor([time.perf_counter() - before, clock.seconds], dtype=torch.float64)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        drained = [traffic.drain() for traffic in traffics]
        if repetition:  # the first warms up
            steps.append(float(taken[0]))
            exchanges.append(float(taken[1]))
            rows = sum(one.rows_between_nodes[name] for one in drained for name in PASSES)
    total = torch.tensor([rows])
    dist.all_reduce(total)
    return {"steps": steps, "exchanges": exchanges, "rows": int(total)}


def table_rows(found: dict[str, list[dict[str, Any]]], task: Task, hosts: int, megabit: float) -> list[dict[str, Any]]:
    """A row for each dispatcher: medians over rounds, next to what its bytes take on a host's link at best."""
    rows: list[dict[str, Any]] = []
    for name, results in found.items():
        steps = median([s for result in results for s in result["steps"]])
        exchanges = median([s for result in results for s in result["exchanges"]])
        link = results[-1]["rows"] * task.hidden * FLOAT / hosts / (megabit * MEGABIT)
        row = {"dispatcher": name, "rows between hosts": results[-1]["rows"], "bytes predict s": link}
        row |= {"exchanges s": exchanges, "step s": steps, "share": exchanges / steps}
        first = rows[0] if rows else row
        for column in ("bytes predict s", "exchanges s", "step s"):
            row[f"{column.rsplit(' ', 1)[0]} times"] = first[column] / row[column]
        rows.append(row)
    return rows


def main(
    hosts: Annotated[int, typer.Option(min=2, max=8)] = 2,
    ranks: Annotated[int, typer.Option(help="Of a host.", min=2)] = 2,
    megabit: Annotated[float, typer.Option(help="A second, of a host's link, each way.")] = 200,
    tokens: Annotated[int, typer.Option(help="Of a rank in a step.")] = 4096,
    accumulation: int = 2,
    hidden: int = 256,
    intermediate: int = 16,
    layers: int = 2,
    experts: int = 64,
    top_k: int = 8,
    rounds: Annotated[int, typer.Option(help="All dispatchers take turns.")] = 2,
    repetitions: int = 2,
    csv: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Measure and print a table."""
    sizes = (ranks, tokens, accumulation, hidden, intermediate, layers, experts, top_k, repetitions)
    tasks = [Task(name, *sizes) for _ in range(rounds) for name in DISPATCHERS]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in DISPATCHERS}
    prefixes = tuple(prefix(rank // ranks) for rank in range(hosts * ranks))
    environment = {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1"}
    with limited(hosts, f"{megabit:g}mbit"):
        launch = Launch(hosts * ranks, True, environment, 300.0, 300.0, prefixes, address(0))
        for index, result, error in run_tasks(MEASURE, [asdict(task) for task in tasks], launch):
            if error:
                raise UserError(f"measuring {tasks[index].dispatcher} failed: {error.splitlines()[-1]}")
            found[tasks[index].dispatcher].append(result)
    rows = table_rows(found, tasks[0], hosts, megabit)
    table = Table(title=f"{hosts} hosts x {ranks} CPU ranks, {megabit:g} Mbit/s a host, K={top_k}, E={experts}")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=None if Console().is_terminal else 130).print(table)
    if csv:
        write_csv(csv, list(rows[0]), rows)


if __name__ == "__main__":
    from occult_train.distributed import prepare_environment

    prepare_environment()
    try:
        typer.run(main)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
