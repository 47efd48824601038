"""The model card of an exported run: what it is, how it was trained, and what came of it."""

from pathlib import Path
from typing import Any

from occult_train import runlog
from occult_train.checkpoint.store import Checkpoint
from occult_train.config import Config
from occult_train.errors import UserError
from occult_train.hub import routing
from occult_train.models.families.family import Family


def card(checkpoint: Checkpoint, config: Config, family: Family, dtype: str, pruned: bool) -> str:
    """README.md as the hub shows it."""
    model = config.model
    custom = bool(family.modelling)
    rows = [
        ("architecture", family.architecture),
        ("parameters", f"{model.num_params():,} ({model.active_params():,} active a token)"),
        ("experts", f"{model.num_experts} a layer, {model.num_experts_per_tok} for each token"),
        *_routing(checkpoint, config, pruned),
        ("stored as", dtype),
        ("began with", _origin(checkpoint, config)),
        ("optimizer steps", f"{checkpoint.step:,}"),
    ]
    if checkpoint.step:
        rows += [
            *_numbers(checkpoint),
            ("sequence length", f"{config.data.sequence_length:,}"),
            ("global batch", f"{config.train.global_batch_size:,} sequences"),
            ("learning rate", f"{config.optimizer.lr:g}, {config.scheduler.name}"),
            ("precision", config.train.precision),
            ("balancing", _balancing(config)),
        ]
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [moe, occult_train]", "---"]
    lines += ["", f"# {Path(config.output).name}", "", "Written by occult_train.", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    lines += ["", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += [f'model = AutoModelForCausalLM.from_pretrained("."{", trust_remote_code=True" if custom else ""})', "```"]
    return "\n".join([*lines, ""])


def _origin(checkpoint: Checkpoint, config: Config) -> str:
    imported = checkpoint.state.get("imported", {}).get("folder")
    start = imported or config.model.from_pretrained
    return f"the weights of {Path(start).name}" if start else "random weights"


def _routing(checkpoint: Checkpoint, config: Config, pruned: bool) -> list[tuple[str, str]]:
    """What a pruned model does with its training's routing."""
    if not config.moe.prune.active:
        return []
    text = routing.describe(config.moe.prune.resolved(config.parallel.expert), checkpoint, config.model.moe_layers)
    return [("routing", text if pruned else f"unpruned; trained with {text}")]


def _balancing(config: Config) -> str:
    if config.moe.balance != "aux_loss":
        return config.moe.balance
    return f"auxiliary loss ({config.moe.aux_loss}), coefficient {config.moe.aux_loss_coef:g}"


def _numbers(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Losses at the checkpoint's step, as far as the run has logged any."""
    try:
        records = runlog.read(checkpoint.folder.parent.parent / "log.jsonl")
    except (OSError, UserError):
        return []
    before = [record for record in records if record["step"] <= checkpoint.step]
    steps: list[dict[str, Any]] = [record for record in before if record["kind"] == "step"]
    rows = []
    if steps:
        rows += [("tokens", f"{steps[-1]['tokens']:,}"), ("training loss", f"{steps[-1]['loss']:.4f}")]
    evaluations = [record for record in before if record["kind"] == "evaluation"]
    if evaluations:
        last = evaluations[-1]
        rows.append(("held-out loss", f"{last['loss']:.4f} (step {last['step']:,}, {last['sequences']} sequences)"))
    return rows
