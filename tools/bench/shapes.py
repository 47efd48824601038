"""What is measured, as data, and how it is typed: layer shapes, routing laws, systems with options."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from occult_train.errors import UserError
from occult_train.moe.pruning import PruneConfig


@dataclass(frozen=True)
class Shape:
    """A layer of SwiGLU experts: H model width, F expert width, E experts, K experts a token."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int

    def flops(self, tokens: int) -> int:
        """FLOPs of the experts' matrix products of a forward pass; forward and backward together are three times it."""
        return 6 * self.hidden * self.intermediate * self.top_k * tokens


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("olmoe", 2048, 1024, 64, 8),
        Shape("deepseek-moe-16b", 2048, 1408, 64, 6),
        Shape("qwen1.5-moe", 2048, 1408, 60, 4),
        Shape("qwen3-30b-a3b", 2048, 768, 128, 8),
    )
}


def parse_shape(text: str) -> Shape:
    """A shape by its name, or `H,F,E,K`.

    Raises:
        UserError: neither, or weights that sum to 1 leave nothing to learn (K = 1), or there are not K experts.
    """
    if text in SHAPES:
        return SHAPES[text]
    try:
        hidden, intermediate, experts, top_k = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"shape {text!r} is neither H,F,E,K nor one of {', '.join(SHAPES)}") from None
    if min(hidden, intermediate) < 1 or not 2 <= top_k <= experts:
        raise UserError(f"shape {text!r} needs positive H and F and 2 <= K <= E (the weight of one expert alone is 1)")
    return Shape(text.replace(",", "x"), hidden, intermediate, experts, top_k)


@dataclass(frozen=True)
class Law:
    """How tokens choose experts."""

    exponent: float = 0.0
    """Zipf's; 0 is uniform."""
    path: Path | None = None
    """Of routing statistics whose sampled choices are drawn from instead."""
    layer: int | None = None
    """Of these; None takes the first."""


def parse_routing(text: str) -> Law:
    """What `uniform`, `zipf:S`, `chosen:FILE` or `chosen:FILE:LAYER` mean.

    Raises:
        UserError: not one of them.
    """
    kind, colon, value = text.partition(":")
    if kind == "chosen" and value:
        path, _, layer = value.rpartition(":")
        return Law(path=Path(path), layer=int(layer)) if path and layer.isdecimal() else Law(path=Path(value))
    try:
        exponent = float(value) if colon else 0.0
    except ValueError:
        exponent = math.nan
    if (kind, bool(colon)) not in (("uniform", False), ("zipf", True)) or not 0 <= exponent < math.inf:
        raise UserError(f"routing {text!r} is not uniform, zipf:S with a number S >= 0, or chosen:FILE[:LAYER]")
    return Law(exponent)


LAYER_SYSTEMS = ("ours", "ours-reference", "torch", "autoep", "deepspeed-moe", "scattermoe", "megablocks")
STEP_SYSTEMS = ("ours", "autoep", "fsdp")
GENERATE_SYSTEMS = ("ours", "autoep", "transformers")
GENERATE_OPTIONS = {"dispatcher": ("dedup", "all_to_all"), "prune": ()}
"""Of our system of generation, and their values; prune takes a number."""
RESIDENT, SINGLY, BLOCKING, AHEAD = "resident", "resident, expert by expert", "blocking", "ahead"
OFFLOAD_MODES = {
    RESIDENT: "all experts on the device, computed as `occult generate` does",
    SINGLY: "all on the device, computed one after the other as in the next two",
    BLOCKING: "in host memory, copied when they are computed",
    AHEAD: "in host memory, copied as soon as tokens are routed",
}
CHECKED = (2, 48)
"""Sequences and tokens of each whose logits a system of generation must get right before it is measured."""


@dataclass(frozen=True)
class LayerTask:
    """One system on one layer."""

    system: str
    shape: Shape
    tokens: int
    """Of a rank."""
    routing: str
    ranks: int
    dtype: str
    seconds: float
    """Spent repeating forward, and again forward and backward."""
    breakdown: bool


@dataclass(frozen=True)
class StepTask:
    """One trainer at one number of accumulation steps."""

    system: str
    shape: str
    settings: tuple[str, ...]
    """Overrides of our Config that describe model, batch and optimizer for all trainers."""
    accumulation: int
    seconds: float
    expected: tuple[float, float] | None
    """Loss and gradient norm of the first step of another trainer, with the same weights and tokens."""
    breakdown: bool


@dataclass(frozen=True)
class StageTask:
    """One stage of generation."""

    settings: tuple[str, ...]
    """Overrides of our Config that describe the model."""
    batch: int
    """Sequences of a rank."""
    prompt: int
    """Tokens of each."""
    new: int
    """Tokens made behind a prompt, one a step; 0 measures the prompts alone."""
    seconds: float

    @property
    def stage(self) -> str:
        """Words for it."""
        return f"decode {self.batch}" if self.new else f"prefill {self.batch}x{self.prompt}"


@dataclass(frozen=True)
class GenerateTask(StageTask):
    """One system at one stage."""

    system: str
    shape: str


@dataclass(frozen=True)
class OffloadTask(StageTask):
    """One mode at one stage."""

    mode: str
    budget: int
    """Bytes for experts on the device; 0 takes the usual."""


@dataclass(frozen=True)
class PairTask:
    """One system on two blocks of one preset."""

    system: str
    preset: str
    sequences: int
    """Of a rank; 0 takes the preset's micro-batch."""
    length: int
    """Tokens of each; 0 takes the preset's."""
    ranks: int
    seconds: float


def read_value(text: str) -> bool | int | str:
    """What an option's value means: true and false, whole numbers, else the text itself."""
    if text in ("true", "false"):
        return text == "true"
    return int(text) if text.isdecimal() else text


def parse_system(text: str, known: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """A system's name, one of `known`, and its options after a colon: `ours:transport=symmetric,overlap=none`.

    Raises:
        UserError: unknown, or an option is not NAME=VALUE.
    """
    name, _, rest = text.partition(":")
    if name not in known:
        raise UserError(f"system {name!r} is not one of {', '.join(known)}")
    options = {}
    for option in filter(None, rest.split(",")):
        key, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"system {text!r}: option {option!r} is not NAME=VALUE")
        options[key] = value
    return name, options


def pruning(options: dict[str, Any], ranks: int) -> PruneConfig | None:
    """What the option `prune` means: m of the ranks, by score; None without it."""
    return PruneConfig("router", options["prune"], ranks) if "prune" in options else None


def check_generation(system: str, shape: Shape, ranks: int) -> None:
    """Raise UserError for a system of generation that is unknown, or has options that it cannot have."""
    name, options = parse_system(system, GENERATE_SYSTEMS)
    if name != "ours":
        return
    for key, value in options.items():
        if key not in GENERATE_OPTIONS:
            raise UserError(f"system {system!r} has no option {key}, only {', '.join(GENERATE_OPTIONS)}")
        if not (value in GENERATE_OPTIONS[key] or (key == "prune" and value.isdecimal())):
            raise UserError(
                f"system {system!r}: {key}={value} is not {' or '.join(GENERATE_OPTIONS[key]) or 'a number'}"
            )
    wanted = pruning({key: read_value(value) for key, value in options.items()}, ranks)
    if wanted is not None:
        wanted.validate(shape.experts, shape.top_k, [0], ranks)
