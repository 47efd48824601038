"""Command line of `occult bench layer`, and what it shares with `occult bench step`."""

import itertools
import os
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from occult_train.distributed import first_number
from occult_train.errors import UserError
from occult_train.launcher.plan import count_gpus
from occult_train.tools.bench.ranks import Launch, run_tasks
from occult_train.tools.bench.results import Row, ratio_table, show, write_csv
from occult_train.tools.bench.routing import draws
from occult_train.tools.bench.shapes import LAYER_SYSTEMS, SHAPES, LayerTask, parse_routing, parse_shape, parse_system

LAYER_COLUMNS = (
    *("system", "shape", "hidden", "intermediate", "experts", "top_k", "tokens", "ranks", "routing", "dtype", "p2p"),
    *("forward_ms", "forward_p10", "forward_p90", "train_ms", "train_p10", "train_p90", "repetitions"),
    *("share_of_peak", "peak_tflops", "saved_bytes", "peak_bytes", "gradients_bytes", "kept_bytes", "sent_bytes"),
    *("c_t", "matmul_ms", "communication_ms", "exposed_ms", "other_ms", "idle_ms"),
    *("error_y", "error_dx", "error_dw", "error_router", "note", "error"),
    *("gpu", "torch", "triton", "deepspeed", "date"),
)
SHOWN = {
    "system": "system",
    "forward_ms": "forward ms",
    "train_ms": "fwd+bwd ms",
    "train_p10": "p10",
    "train_p90": "p90",
    "share_of_peak": "of peak",
    "saved_bytes": "saved MB",
    "peak_bytes": "peak MB",
    "gradients_bytes": "of it gradients",
    "kept_bytes": "kept MB",
    "sent_bytes": "sent MB",
    "c_t": "C_T",
}
PARTS = {
    "matmul_ms": "matmul",
    "communication_ms": "communication",
    "exposed_ms": "of it exposed",
    "other_ms": "other",
    "idle_ms": "idle",
}
MEASURES = {
    "forward_ms": "forward",
    "train_ms": "fwd+bwd",
    "saved_bytes": "saved",
    "peak_bytes": "peak",
    "sent_bytes": "sent",
}
PROBLEM = ("shape", "tokens", "routing")


def split(text: str) -> list[str]:
    """Items separated by blanks; commas belong to items (H,F,E,K and options)."""
    return text.split()


def counts(name: str, text: str) -> list[int]:
    """Positive whole numbers separated by blanks.

    Raises:
        UserError: something else is among them.
    """
    items = split(text)
    if not items or not all(item.isdecimal() and int(item) for item in items):
        raise UserError(f"{name}={text!r} must be positive whole numbers separated by blanks")
    return [int(item) for item in items]


def count_ranks(ep: int, cpu: bool) -> int:
    """Ranks to start: those asked for, else two on CPU and all GPUs elsewhere.

    Raises:
        UserError: there are not as many GPUs.
    """
    if (world := first_number(("WORLD_SIZE",), 0)) and "RANK" in os.environ:
        if ep not in (0, world):
            raise UserError(f"--ep={ep}, but {world} ranks were started")
        return world
    if cpu:
        return ep or 2
    gpus = count_gpus()
    if not gpus:
        raise UserError("there is no GPU here; --cpu makes a dry run")
    if ep > gpus:
        raise UserError(f"--ep={ep} needs as many GPUs; there are {gpus}")
    return ep or gpus


def nccl_environment(p2p: str) -> dict[str, str]:
    """Variables for `--p2p`.

    Raises:
        UserError: neither on nor off.
    """
    if p2p not in ("on", "off"):
        raise UserError(f"--p2p={p2p} is neither on nor off")
    return {"NCCL_P2P_DISABLE": "1"} if p2p == "off" else {}


def base_failed(rows: list[Row], base: str) -> int:
    """Exit code: 1 if the system that others are compared with has no numbers somewhere."""
    return int(any(row["system"] == base and row.get("error") for row in rows))


def layer(
    shape: Annotated[str, typer.Option(help="Names or H,F,E,K, separated by blanks.")] = " ".join(SHAPES),
    system: Annotated[
        str,
        typer.Option(
            help="ours, ours-reference, torch, autoep, deepspeed-moe, scattermoe, megablocks; options after a colon, "
            "as in ours:transport=symmetric,overlap=none or autoep:tuned=true. The others are compared with the first."
        ),
    ] = "ours autoep",
    tokens: Annotated[str, typer.Option(help="Tokens of a rank.")] = "8192",
    routing: Annotated[str, typer.Option(help="uniform, zipf:S or chosen:STATISTICS[:LAYER].")] = "uniform",
    ep: Annotated[int, typer.Option(help="Ranks over which experts are spread; 0 takes all GPUs.", min=0)] = 0,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    seconds: Annotated[float, typer.Option(help="Repeating a measure takes about this long.")] = 1.5,
    limit: Annotated[float, typer.Option(help="Seconds after which a system is given up.")] = 120.0,
    breakdown: Annotated[bool, typer.Option("--breakdown", help="Profile each system's kernels too.")] = False,
    p2p: Annotated[str, typer.Option(help="off forbids NCCL to use NVLink.")] = "on",
    cpu: Annotated[bool, typer.Option("--cpu", help="A dry run on CPU; its times mean nothing.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Write all columns there.")] = None,
) -> int:
    """Compare one mixture-of-experts layer, ours and others', on the same problem. All lists are split at blanks."""
    for text in split(system):
        parse_system(text, LAYER_SYSTEMS)
    for text, size in itertools.product(split(routing), split(shape)):
        draws(parse_routing(text), parse_shape(size))
    if dtype not in ("bfloat16", "float32"):
        raise UserError(f"--dtype={dtype} is neither bfloat16 nor float32")
    ranks = count_ranks(ep, cpu)
    tasks = [
        LayerTask(name, parse_shape(size), count, law, ranks, dtype, seconds, breakdown)
        for count, law, size, name in itertools.product(
            counts("--tokens", tokens), split(routing), split(shape), split(system)
        )
    ]
    rows: list[Row] = []
    started = time.monotonic()
    launch = Launch(ranks, cpu, nccl_environment(p2p), limit)
    for index, row, error in run_tasks("occult_train.tools.bench.measure_layer:measure", tasks, launch):
        task = tasks[index]
        row = row or {
            "system": task.system,
            "shape": task.shape.name,
            "tokens": task.tokens,
            "routing": task.routing,
            "ranks": ranks,
            "error": error.strip(),
        }
        rows.append(row | {"date": time.strftime("%Y-%m-%d")})
        _progress(rows[-1], time.monotonic() - started)
        if csv is not None:
            write_csv(csv, LAYER_COLUMNS, [{k: v for k, v in r.items() if k != "top"} for r in rows])
    if rows:
        _show_layers(rows, split(system)[0])
    return base_failed(rows, split(system)[0])


def brief(row: Row) -> str:
    """First and last line of a row's error."""
    first, *rest = row.get("error", "").splitlines() or [""]
    return f"{first} ... {rest[-1]}" if rest else first


def _progress(row: Row, seconds: float) -> None:
    place = " ".join(f"{row[key]}" for key in PROBLEM)
    what = brief(row) or f"forward {row['forward_ms']:.3f} ms, forward + backward {row['train_ms']:.3f} ms"
    print(f"[{seconds:5.0f} s] {place} {row['system']}: {what}", flush=True)


def _show_layers(rows: list[Row], base: str) -> None:
    for place in dict.fromkeys(tuple(row[key] for key in PROBLEM) for row in rows):
        here = [row for row in rows if tuple(row[key] for key in PROBLEM) == place]
        known = next((row for row in here if "peak_tflops" in row), {})
        title = "{}, {} tokens a rank, {}".format(*place)
        if known:
            title += (
                f"; {known['ranks']} x {known['gpu']}, P2P {known['p2p']}, peak {known['peak_tflops']:,.1f} TFLOP/s"
            )
        parts = PARTS if any("matmul_ms" in row for row in here) else {}
        show(title, here, SHOWN | parts)
        for row in here:
            for name, milliseconds, runs in row.get("top", ()):
                print(f"  {row['system']}: {milliseconds:7.3f} ms {runs:4d}x {name[:110]}")
    Console(width=200).print(ratio_table(rows, base, MEASURES, ("tokens", "routing"), "shape"))
