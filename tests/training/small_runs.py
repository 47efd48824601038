"""A model and a run small enough to train in a test."""

import json
from pathlib import Path
from typing import Any

from occult_train.config import load

SMALL = [
    "model.hidden_size=32",
    "model.intermediate_size=16",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_experts=8",
    "model.num_experts_per_tok=3",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.precision=fp32",
    "deepspeed.zero_optimization.stage3_param_persistence_threshold=40",  # else a model this small stays whole
    "data.sequence_length=32",
    "model.max_position_embeddings=64",
    "scheduler.warmup_steps=3",
    "eval.interval=0",
    "eval.sequences=7",
    "checkpoint.interval=0",
    "monitor.interval=1",
    "parallel.expert=2",
]


def train(_rank: int, arguments: list[str]) -> int:
    """Train SMALL with further settings; for `run_distributed`."""
    from occult_train.trainer import run

    return run(load(SMALL + arguments))


def records(run: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "tokens_per_second")} for line in lines]
