"""Command line of `occult bench pair`."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from occult_train.tools.bench.layer_command import base_failed, brief, count_ranks, nccl_environment, split
from occult_train.tools.bench.pair_figure import draw
from occult_train.tools.bench.pair_report import lines, timeline
from occult_train.tools.bench.pair_systems import PAIR_SYSTEMS, Preset
from occult_train.tools.bench.ranks import Launch, run_tasks
from occult_train.tools.bench.results import Row, show, write_csv
from occult_train.tools.bench.shapes import PairTask, parse_system

PARTS = ("computing", "communication", "exposed", "idle")
PAIR_COLUMNS = (
    *("system", "preset", "hidden", "intermediate", "experts", "top_k", "sequences", "sequence", "tokens", "gflops"),
    *("ranks", "p2p", "train_ms", "train_p10", "train_p90", "inference_ms", "inference_p10", "inference_p90"),
    *(f"{phase}_{part}_ms" for phase in ("forward", "backward", "inference") for part in PARTS),
    *("error_y", "error_dx", "error_dw", "error_routing", "note", "error", "gpu", "torch", "deepspeed", "date"),
)
SHOWN = {
    **{
        "system": "system",
        "top_k": "K",
        "gflops": "GFLOP a rank forward",
        "inference_ms": "inference ms",
        "train_ms": "training ms",
    },
    **{"train_p10": "p10", "train_p90": "p90"},
    **{
        f"{phase}_{part}_ms": f"{phase} {word}"
        for phase in ("forward", "backward")
        for part, word in zip(PARTS, ("computing", "communication", "exposed", "idle"), strict=True)
    },
}


def pair(
    preset: Annotated[
        str, typer.Option(help="Files of configs/scmoe by name, separated by blanks; two blocks of each.")
    ] = "gpt2_moe_medium gpt3_moe_xl llama2_moe",
    system: Annotated[
        str,
        typer.Option(
            help="overlapped (shortcut-connected experts beside their window), sequential (the same one step after the "
            "other), top2 (the twin with our fastest dispatch), autoep (the twin with DeepSpeed's experts); options "
            "after a colon, as in overlapped:transport=host,overlap=2,schedule=1; graphs=1 is train.cuda_graphs."
        ),
    ] = "overlapped:graphs=1 sequential:graphs=1 top2:graphs=1 autoep",
    sequences: Annotated[int, typer.Option(help="Of a rank; 0 takes the preset's micro-batch.", min=0)] = 0,
    length: Annotated[int, typer.Option(help="Tokens of a sequence; 0 takes the preset's.", min=0)] = 0,
    ep: Annotated[int, typer.Option(help="Ranks over which experts are spread; 0 takes all GPUs.", min=0)] = 0,
    seconds: Annotated[float, typer.Option(help="Repeating a measure takes about this long.")] = 0.4,
    limit: Annotated[float, typer.Option(help="Seconds after which a system is given up.")] = 180.0,
    p2p: Annotated[str, typer.Option(help="off forbids NCCL to use NVLink.")] = "on",
    cpu: Annotated[bool, typer.Option("--cpu", help="A dry run on CPU; its times mean nothing.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Write all columns there.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a repetition's kernels there, as JSON.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw them there: top2 before, overlapped after.")] = None,
) -> int:
    """Compare two blocks with shortcut-connected experts with their top-2 twins: times, and communication hidden."""
    names = split(system)
    for name in names:
        parse_system(name, PAIR_SYSTEMS)
    for name in split(preset):
        Preset.read(name)
    ranks = count_ranks(ep, cpu)
    tasks = [PairTask(name, model, sequences, length, ranks, seconds) for model in split(preset) for name in names]
    rows: list[Row] = []
    started = time.monotonic()
    launch = Launch(ranks, cpu, nccl_environment(p2p), limit)
    for index, row, error in run_tasks("occult_train.tools.bench.measure_pair:measure", tasks, launch):
        task = tasks[index]
        failed = {"system": task.system, "preset": task.preset, "ranks": ranks, "p2p": p2p, "error": error.strip()}
        rows.append((row or failed) | {"date": time.strftime("%Y-%m-%d")})
        _progress(rows[-1], time.monotonic() - started)
        if csv is not None:
            write_csv(csv, PAIR_COLUMNS, [{k: v for k, v in r.items() if k != "timeline"} for r in rows])
        if trace is not None:
            trace.write_text(json.dumps(timeline(rows)))
    if rows:
        _show(rows)
    if figure is not None and any("timeline" in row for row in rows):
        draw(timeline(rows), figure)
    return base_failed(rows, names[0])


def _progress(row: Row, seconds: float) -> None:
    what = brief(row) or f"training {row['train_ms']:.3f} ms, inference {row['inference_ms']:.3f} ms"
    print(f"[{seconds:5.0f} s] {row['preset']} {row['system']}: {what}", flush=True)
    if row.get("note"):
        print(f"          {row['note']}", flush=True)


def _show(rows: list[Row]) -> None:
    for preset in dict.fromkeys(row["preset"] for row in rows):
        here = [row for row in rows if row["preset"] == preset]
        known = next((row for row in here if "tokens" in row), {})
        title = preset
        if known:
            title += (
                f", {known['tokens']} tokens a rank in sequences of {known['sequence']}, {known['experts']} experts; "
            )
            title += f"{known['ranks']} x {known['gpu']}, P2P {known['p2p']}"
        traced = any("forward_computing_ms" in row for row in here)
        show(title, here, {k: v for k, v in SHOWN.items() if traced or k.count("_") < 2})
    table = Table(title="asked and reached")
    for name in ("preset", "what", "got", "at least", "", ""):
        table.add_column(name, justify="right" if name in ("got", "at least") else "left")
    for line in lines(rows):
        least = "" if line.least is None else f"{line.least:.3f}"
        table.add_row(line.preset, line.what, f"{line.got:.3f}", least, line.verdict, line.how)
    if table.row_count:
        Console(width=200).print(table)
