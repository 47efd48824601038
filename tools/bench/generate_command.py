"""Command line of `occult bench generate`."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from occult_train.errors import UserError
from occult_train.tools.bench.layer_command import base_failed, brief, count_ranks, counts, nccl_environment, split
from occult_train.tools.bench.ranks import Launch, run_tasks
from occult_train.tools.bench.results import Row, ratio_table, show, write_csv
from occult_train.tools.bench.shapes import CHECKED, GenerateTask, check_generation, parse_shape
from occult_train.tools.bench.step_command import step_settings

GENERATE_COLUMNS = (
    *("system", "shape", "layers", "stage", "batch", "prompt", "ranks", "p2p"),
    *("ms", "p10", "p90", "repetitions", "tokens_per_second", "error_logits", "error"),
    *("gpu", "torch", "deepspeed", "transformers", "date"),
)
SHOWN = {
    "stage": "stage",
    "system": "system",
    "ms": "ms",
    "p10": "p10",
    "p90": "p90",
    "tokens_per_second": "tokens/s a rank",
    "error_logits": "logits off by",
}


def generate(
    system: Annotated[
        str,
        typer.Option(
            help="ours (ours:dispatcher=all_to_all sends K copies, ours:prune=M lets a token use M ranks), autoep "
            "(options after a colon), transformers (the whole model on each rank). The others are compared with the "
            "first."
        ),
    ] = "ours autoep transformers",
    prefill: Annotated[int, typer.Option(help="Prompt tokens of a rank; 0 leaves that out.", min=0)] = 16384,
    sequence: Annotated[int, typer.Option(help="Tokens of a prompt of theirs.", min=1)] = 4096,
    decode: Annotated[str, typer.Option(help="Sequences of a rank that go on together.")] = "1 32 512",
    context: Annotated[int, typer.Option(help="Tokens before the first that is made.", min=1)] = 128,
    new: Annotated[int, typer.Option(help="Tokens made, over which a step's time is averaged.", min=1)] = 32,
    shape: Annotated[str, typer.Option(help="Of the expert layers: a name or H,F,E,K.")] = "olmoe",
    layers: Annotated[int, typer.Option(help="Transformer layers.", min=1)] = 16,
    vocabulary: Annotated[int, typer.Option(help="Rows of the embedding.", min=2)] = 50304,
    ep: Annotated[int, typer.Option(help="Ranks over which experts are spread; 0 takes all GPUs.", min=0)] = 0,
    seconds: Annotated[float, typer.Option(help="Repeating a measure takes about this long.")] = 3.0,
    limit: Annotated[float, typer.Option(help="Seconds after which a system is given up.")] = 240.0,
    p2p: Annotated[str, typer.Option(help="off forbids NCCL to use NVLink.")] = "on",
    cpu: Annotated[bool, typer.Option("--cpu", help="A dry run on CPU; its times mean nothing.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Write all columns there.")] = None,
) -> int:
    """Compare generation: prompts, and steps of one token behind them (greedy, cached). Lists are split at blanks."""
    names = split(system)
    if prefill % sequence:
        raise UserError(f"--prefill={prefill} is not a multiple of --sequence={sequence}")
    ranks, experts = count_ranks(ep, cpu), parse_shape(shape)
    for name in names:
        check_generation(name, experts, ranks)
    settings = tuple(step_settings(experts, layers, max(sequence, context + new, CHECKED[1]) + 1, 1, vocabulary, ranks))
    stages = [(prefill // sequence, sequence, 0)] if prefill else []
    stages += [(batch, context, new) for batch in counts("--decode", decode)]
    tasks = [GenerateTask(settings, *stage, seconds, name, experts.name) for name in names for stage in stages]
    rows: list[Row] = []
    started = time.monotonic()
    launch = Launch(ranks, cpu, nccl_environment(p2p), limit)
    for index, row, error in run_tasks("occult_train.tools.bench.measure_generate:measure", tasks, launch):
        rows.append((row or _failed(tasks[index], error)) | {"date": time.strftime("%Y-%m-%d")})
        _progress(rows[-1], time.monotonic() - started)
        if csv is not None:
            write_csv(csv, GENERATE_COLUMNS, rows)
    if rows:
        order = list(dict.fromkeys(task.stage for task in tasks))
        ordered = sorted(rows, key=lambda row: order.index(row["stage"]))
        show(f"{layers} layers {experts.name}, {ranks} ranks, P2P {p2p}", ordered, SHOWN)
        Console(width=200).print(ratio_table(ordered, names[0], {"ms": "time"}, ("stage",), "shape"))
    return base_failed(rows, names[0])


def _failed(task: GenerateTask, error: str) -> Row:
    return {
        "system": task.system,
        "shape": task.shape,
        "stage": task.stage,
        "batch": task.batch,
        "prompt": task.prompt,
        "error": error.strip(),
    }


def _progress(row: Row, seconds: float) -> None:
    what = brief(row) or f"{row['ms']:.3f} ms, {row['tokens_per_second']:,.0f} tokens/s a rank"
    print(f"[{seconds:5.0f} s] {row['stage']} {row['system']}: {what}", flush=True)
