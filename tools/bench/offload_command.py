"""Command line of `occult bench offload`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from occult_train.config import load
from occult_train.errors import UserError
from occult_train.launcher.plan import count_gpus
from occult_train.tools.bench.layer_command import brief, counts
from occult_train.tools.bench.ranks import Launch, run_tasks
from occult_train.tools.bench.results import Row, show, write_csv
from occult_train.tools.bench.shapes import AHEAD, BLOCKING, OFFLOAD_MODES, RESIDENT, SINGLY, OffloadTask

COLUMNS = (
    *("system", "stage", "batch", "prompt", "parameters", "ms", "p10", "p90", "repetitions", "tokens_per_second"),
    *("weights_bytes", "peak_bytes", "copied", "made", "error_logits", "error", "gpu", "torch", "date"),
)
SHOWN = {
    "stage": "stage",
    "system": "experts",
    "ms": "ms",
    "p10": "p10",
    "p90": "p90",
    "tokens_per_second": "tokens/s",
    "weights_bytes": "weights MB",
    "peak_bytes": "peak MB",
    "copied": "copied",
    "error_logits": "logits off by",
}


def offload(
    settings: Annotated[list[str], typer.Argument(metavar="CONFIG.yaml|path=value", help="The model; random weights.")],
    expert_budget: Annotated[
        float, typer.Option(help="GB for experts on the device. Default: that of `occult generate`.", min=0)
    ] = 0.0,
    decode: Annotated[str, typer.Option(help="Sequences that go on together.")] = "1 8",
    prefill: Annotated[int, typer.Option(help="Tokens of a prompt that is measured; 0 leaves it out.", min=0)] = 1024,
    context: Annotated[int, typer.Option(help="Tokens before the first that is made.", min=1)] = 64,
    new: Annotated[int, typer.Option(help="Tokens made, over which a step's time is averaged.", min=1)] = 64,
    seconds: Annotated[float, typer.Option(help="Repeating a measure takes about this long.")] = 3.0,
    limit: Annotated[float, typer.Option(help="Seconds after which a mode is given up.")] = 240.0,
    cpu: Annotated[bool, typer.Option("--cpu", help="A dry run on CPU; its times mean nothing.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Write all columns there.")] = None,
) -> int:
    """Compare generation with all experts on one GPU and with experts in host memory: time and peak memory."""
    longest = max(prefill, context + new + 1)
    known = load(settings).model.max_position_embeddings
    if longest > known:
        raise UserError(f"{longest} tokens of --prefill or --context and --new, model.max_position_embeddings={known}")
    if not cpu and not count_gpus():
        raise UserError("there is no GPU here; --cpu makes a dry run")
    budget = max(int(expert_budget * 1e9), 1) if expert_budget else 0
    stages = [(batch, context, new) for batch in counts("--decode", decode)] + [(1, prefill, 0)] * bool(prefill)
    tasks = [OffloadTask(tuple(settings), *stage, seconds, mode, budget) for mode in OFFLOAD_MODES for stage in stages]
    rows: list[Row] = []
    started = time.monotonic()
    for index, row, error in run_tasks(
        "occult_train.tools.bench.measure_offload:measure", tasks, Launch(1, cpu, task_seconds=limit)
    ):
        task = tasks[index]
        row = row or {"system": task.mode, "stage": task.stage, "error": error.strip()}
        rows.append(row | {"date": time.strftime("%Y-%m-%d")})
        check_tokens(rows)
        what = brief(row) or f"{row['ms']:.3f} ms, {row['tokens_per_second']:,.1f} tokens/s"
        print(f"[{time.monotonic() - started:5.0f} s] {task.stage} {task.mode}: {what}", flush=True)
        if csv is not None:
            write_csv(csv, COLUMNS, rows)
    order = list(dict.fromkeys(task.stage for task in tasks))
    for mode, meaning in OFFLOAD_MODES.items():
        print(f"{mode}: {meaning}")
    show("generation", sorted(rows, key=lambda row: order.index(row["stage"])), SHOWN)
    for stage in order:
        print("\n".join(compare([row for row in rows if row["stage"] == stage])))
    return int(any("error" in row for row in rows))


def check_tokens(rows: list[Row]) -> None:
    """The last row is an error if its experts, one by one, made other tokens than those of the same stage before."""
    last = rows[-1]
    for row in rows[:-1]:
        same = row["stage"] == last["stage"] and row["system"] != RESIDENT
        if same and "made" in row and "made" in last and row["made"] != last["made"]:
            last["error"] = f"made other tokens than {row['system']}"


def compare(rows: list[Row]) -> list[str]:
    """Lines that say what copies cost in a stage, and how much of it is hidden."""
    found = {row["system"]: row for row in rows if not row.get("error")}
    if not {BLOCKING, AHEAD} <= set(found):
        return []
    lines = []
    for base in (RESIDENT, SINGLY):
        if base in found:
            blocking, ahead = (found[mode]["ms"] / found[base]["ms"] - 1 for mode in (BLOCKING, AHEAD))
            hidden = f"{1 - ahead / blocking:.0%} of the difference hidden" if blocking > 0 else "nothing to hide"
            lines.append(f"{rows[0]['stage']}, against {base}: blocking {blocking:+.0%}, ahead {ahead:+.0%}; {hidden}")
    if RESIDENT in found:
        for field, name in (("weights_bytes", "weights"), ("peak_bytes", "peak memory")):
            if found[AHEAD].get(field):
                less = found[AHEAD][field] / found[RESIDENT][field] - 1
                lines.append(f"{rows[0]['stage']}: {name} on the device {less:+.0%}")
    return lines
