"""`occult report`: what came of a run, in one table."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from occult_train import config as configs
from occult_train import runlog
from occult_train.checkpoint.store import find_latest
from occult_train.errors import UserError


def command(run: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Print losses, speed, communication and where everything lies."""
    table = Table(title=str(run), show_header=False)
    table.add_column(justify="right", style="bold")
    table.add_column()
    for name, value in summary(run):
        table.add_row(name, value)
    Console().print(table)


def summary(run: Path) -> list[tuple[str, str]]:
    """Names and values of the report's rows.

    Raises:
        UserError: not a run's folder, or nothing was logged yet.
    """
    try:
        lines = runlog.read(run / "log.jsonl")
        config = configs.load([str(run / "config.yaml")])
    except OSError as error:
        raise UserError(f"{run} is not the folder of a run: {error.filename} cannot be read") from None
    steps = [line for line in lines if line["kind"] == "step"]
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    if not steps:
        raise UserError(f"{run} has no logged step yet")
    rows = [
        ("steps", f"{steps[-1]['step']:,} ({steps[-1]['tokens']:,} tokens)"),
        ("parameters", f"{config.model.num_params():,} ({config.model.active_params():,} active a token)"),
        ("training loss", f"{steps[0]['loss']:.3f} → {steps[-1]['loss']:.3f}"),
    ]
    if evaluations:
        last = evaluations[-1]
        rows.append(("held-out loss", f"{last['loss']:.4f} (first {last['sequences']} held-out sequences)"))
    entropy = _unigram_entropy(config.data.path)
    if entropy is not None:
        rows.append(("unigram loss", f"{entropy:.4f} (held-out text under the training text's token frequencies)"))
    rows.append(("tokens/s", f"{_median([s['tokens_per_second'] for s in steps[1:] or steps]):,.0f} (median)"))
    rows += _communication(steps, config)
    return rows + _places(run)


def _communication(steps: list[dict[str, Any]], config: configs.Config) -> list[tuple[str, str]]:
    layers = [layer for step in steps for layer in step["layers"]]
    c_t = sum(layer["c_t"] for layer in layers) / len(layers)
    k, devices = config.model.num_experts_per_tok, config.parallel.expert
    rows = [("C_T", f"{c_t:.3f} devices a token (K={k} experts over {devices} devices)")]
    per_step = 1 / len(steps)
    for name, sent, copies, unit in (
        ("rows sent", sum(sum(layer["rows_sent"].values()) for layer in layers), _total(layers, "copies_rows"), ""),
        ("bytes sent", _total(layers, "bytes_sent"), _total(layers, "copies_bytes"), " MB"),
    ):
        scale = per_step / (1e6 if unit else 1)
        saved = f", {1 - sent / copies:.0%} less" if copies else ""
        text = f"{sent * scale:,.1f}{unit} a step; K copies would send {copies * scale:,.1f}{unit}{saved}"
        rows.append((f"{name} ({config.dispatcher()})", text))
    return rows


def _places(run: Path) -> list[tuple[str, str]]:
    rows = []
    latest = find_latest(run / "checkpoints")
    for name, path in (
        ("checkpoint", latest),
        ("Hugging Face model", run / "hf"),
        ("sample", run / "sample.txt"),
        ("TensorBoard", run / "tensorboard"),
        ("log", run / "log.jsonl"),
    ):
        if path is not None and path.exists():
            rows.append((name, str(path)))
    return rows


def _total(layers: list[dict[str, Any]], name: str) -> float:
    return sum(layer[name] for layer in layers)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _unigram_entropy(corpus: str) -> float | None:
    """Of the corpus, in nats, if it was made by `occult prepare`."""
    try:
        metadata = json.loads((Path(corpus) / "corpus.json").read_text())
    except (OSError, ValueError):
        return None
    value = metadata.get("unigram_entropy", {}).get("valid_under_train")
    return None if value is None else float(value)
