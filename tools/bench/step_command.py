"""Command line of `occult bench step`."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from occult_train.tools.bench.layer_command import (
    PARTS,
    base_failed,
    brief,
    count_ranks,
    counts,
    nccl_environment,
    split,
)
from occult_train.tools.bench.ranks import Launch, run_tasks
from occult_train.tools.bench.results import Row, ratio_table, show, write_csv
from occult_train.tools.bench.shapes import STEP_SYSTEMS, Shape, StepTask, parse_shape, parse_system

STEP_COLUMNS = (
    *("system", "shape", "layers", "sequence", "micro", "accumulation", "ranks", "zero", "p2p"),
    *("step_ms", "steps", "tokens_per_second", "tflops", "mfu", "peak_bytes"),
    *("matmul_ms", "communication_ms", "exposed_ms", "other_ms", "idle_ms"),
    *("first_loss", "first_norm", "warm_loss", "gradient_norm", "error"),
    *("gpu", "torch", "deepspeed", "transformers", "date"),
)
SHOWN = {
    "system": "system",
    "accumulation": "accumulation",
    "tokens_per_second": "tokens/s a rank",
    "tflops": "model TFLOP/s",
    "mfu": "MFU",
    "step_ms": "step ms",
    "steps": "steps",
    "peak_bytes": "peak MB",
    "first_loss": "first loss",
    "first_norm": "first norm",
}


def step_settings(
    shape: Shape, layers: int, sequence: int, micro: int, vocabulary: int, ranks: int, zero: int = 1
) -> list[str]:
    """Overrides of Config: OLMoE-1B-7B's recipe around expert layers of this shape, with Qwen3's norm of each head."""
    return [
        f"model.vocab_size={vocabulary}",
        f"model.hidden_size={shape.hidden}",
        f"model.intermediate_size={shape.intermediate}",
        f"model.num_experts={shape.experts}",
        f"model.num_experts_per_tok={shape.top_k}",
        f"model.num_hidden_layers={layers}",
        f"model.num_attention_heads={max(1, shape.hidden // 128)}",
        f"model.max_position_embeddings={sequence}",
        "model.qk_norm=head",
        "model.norm_topk_prob=true",
        f"data.sequence_length={sequence}",
        f"parallel.expert={ranks}",
        f"train.micro_batch_size={micro}",
        f"train.global_batch_size={micro * ranks}",
        f"zero.stage={zero}",
        *_RECIPE,
    ]


_RECIPE = (
    *("train.precision=bf16", "train.gradient_clipping=1.0", "train.activation_checkpointing=none"),
    # AutoEP has no balancing
    *("moe.balance=none", "moe.z_loss_coef=0", "optimizer.lr=1e-4"),
)


def step(
    system: Annotated[
        str,
        typer.Option(
            help="ours, autoep, fsdp; overrides of our configuration after a colon, as in ours:moe.dispatcher=dedup. "
            "The first one is what the others are compared with."
        ),
    ] = "ours autoep",
    accumulation: Annotated[str, typer.Option(help="Micro-batches a step.")] = "1 8",
    shape: Annotated[str, typer.Option(help="Of the expert layers: a name or H,F,E,K.")] = "olmoe",
    layers: Annotated[int, typer.Option(help="Transformer layers.", min=1)] = 16,
    sequence: Annotated[int, typer.Option(help="Tokens of a sequence.", min=2)] = 4096,
    micro: Annotated[int, typer.Option(help="Sequences of a micro-batch.", min=1)] = 2,
    vocabulary: Annotated[int, typer.Option(help="Rows of the embedding.", min=2)] = 50304,
    ep: Annotated[int, typer.Option(help="Ranks over which experts are spread; 0 takes all GPUs.", min=0)] = 0,
    zero: Annotated[int, typer.Option(help="ZeRO stage of ours and autoep.", min=1, max=2)] = 1,
    seconds: Annotated[float, typer.Option(help="Timed steps take about this long (two at least).")] = 15.0,
    limit: Annotated[float, typer.Option(help="Seconds after which a system is given up.")] = 240.0,
    breakdown: Annotated[bool, typer.Option("--breakdown", help="Profile one step's kernels too.")] = False,
    p2p: Annotated[str, typer.Option(help="off forbids NCCL to use NVLink.")] = "on",
    cpu: Annotated[bool, typer.Option("--cpu", help="A dry run on CPU; its times mean nothing.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Write all columns there.")] = None,
) -> int:
    """Compare whole optimizer steps (bf16, ZeRO, AdamW, clipping, random tokens). Lists are split at blanks."""
    names = split(system)
    for name in names:
        parse_system(name, STEP_SYSTEMS)
    micros = counts("--accumulation", accumulation)
    ranks = count_ranks(ep, cpu)
    experts = parse_shape(shape)
    settings = tuple(step_settings(experts, layers, sequence, micro, vocabulary, ranks, zero))
    launch = Launch(ranks, cpu, nccl_environment(p2p), limit)
    rows: list[Row] = []
    expected: tuple[float, float] | None = None
    started = time.monotonic()
    for name in names:
        tasks = [StepTask(name, experts.name, settings, a, seconds, expected, breakdown) for a in micros]
        for index, row, error in run_tasks("occult_train.tools.bench.measure_step:measure", tasks, launch):
            failed = {
                "system": name,
                "shape": experts.name,
                "accumulation": tasks[index].accumulation,
                "error": error.strip(),
            }
            rows.append((row or failed) | {"date": time.strftime("%Y-%m-%d")})
            _progress(rows[-1], time.monotonic() - started)
            if csv is not None:
                write_csv(csv, STEP_COLUMNS, [{k: v for k, v in r.items() if k != "top"} for r in rows])
            if expected is None and row and not row.get("error"):
                expected = row["first_loss"], row["first_norm"]
    if rows:
        title = f"{layers} layers {shape}, {micro} x {sequence} tokens, {ranks} ranks, ZeRO-{zero}, P2P {p2p}"
        _show_steps(rows, names[0], title)
    return base_failed(rows, names[0])


def _progress(row: Row, seconds: float) -> None:
    what = brief(row) or f"{row['tokens_per_second']:,.0f} tokens/s a rank"
    print(f"[{seconds:5.0f} s] {row['system']}, accumulation {row['accumulation']}: {what}", flush=True)


def _show_steps(rows: list[Row], base: str, title: str) -> None:
    parts = PARTS if any("matmul_ms" in row for row in rows) else {}
    show(title, rows, SHOWN | parts)
    for row in rows:
        for name, milliseconds, runs in row.get("top", ()):
            print(f"  {row['system']}: {milliseconds:8.2f} ms {runs:5d}x {name[:110]}")
    measures = {"step_ms": "step", "peak_bytes": "peak"}
    Console(width=200).print(ratio_table(rows, base, measures, ("accumulation",), "shape"))
