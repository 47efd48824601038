"""Pairs of blocks that are compared: shortcut-connected experts, with and without overlap, and top-2 twins of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import occult_train
from occult_train.config import load
from occult_train.errors import UserError
from occult_train.models.attention import Positions, positions
from occult_train.models.config import ModelConfig
from occult_train.models.gpt import GPT, Runtime
from occult_train.models.graphs import Graphs
from occult_train.models.init import draw, init_weights
from occult_train.moe.choose import Shape, Wanted, choose
from occult_train.moe.fused import Way
from occult_train.moe.layer import MoELayer
from occult_train.parallel.grid import Grid
from occult_train.tools.bench.peers import convert_to_autoep
from occult_train.tools.bench.shapes import parse_system, read_value

PAIR_SYSTEMS = ("overlapped", "sequential", "top2", "autoep")
PRESETS = Path(occult_train.__file__).parents[1] / "configs" / "scmoe"
SEED = 1
WAYS = tuple(field.name for field in fields(Wanted))


@dataclass(frozen=True)
class Preset:
    """Two blocks of a model and their top-2 twin."""

    name: str
    shortcut: ModelConfig
    top2: ModelConfig
    sequence: int
    sequences: int
    """Of a rank's micro-batch."""

    @classmethod
    def read(cls, name: str) -> "Preset":
        """From configs/scmoe, cut to two blocks.

        Raises:
            UserError: there is no such preset.
        """
        paths = [PRESETS / f"{name}{end}.yaml" for end in ("", "_top2")]
        if not all(path.is_file() for path in paths):
            known = sorted(path.stem for path in PRESETS.glob("*.yaml") if not path.stem.endswith("_top2"))
            raise UserError(f"preset {name!r} is not one of {', '.join(known)}")
        config, twin = (load([str(path)]) for path in paths)
        cut = replace(config.model, num_hidden_layers=2, vocab_size=64, dense_layers=[])
        dense = [layer for layer in twin.model.dense_layers if layer < 2]
        cut_twin = replace(twin.model, num_hidden_layers=2, vocab_size=64, dense_layers=dense)
        return cls(name, cut, cut_twin, config.data.sequence_length, config.train.micro_batch_size)

    def of(self, system: str) -> ModelConfig:
        """The model that a system runs."""
        return self.shortcut if parse_system(system, PAIR_SYSTEMS)[0] in ("overlapped", "sequential") else self.top2


def pair_flops(model: ModelConfig, sequence: int) -> int:
    """FLOPs a token of the blocks' matrix products in a forward pass."""
    return model.flops_per_token(sequence) - 2 * model.hidden_size * model.vocab_size


class Pair:
    """Blocks of a model on hidden states, as one layer."""

    def __init__(self, model: GPT, note: str = "", one_sided: bool = False) -> None:
        self.model, self.note, self.one_sided = model, note, one_sided
        self._at: Positions | None = None

    def __call__(self, h: Tensor) -> Tensor:
        """[B, S, H] of the same S always -> [B, S, H]. Collective, in backward too."""
        if self._at is None:  # a model has them once for all its blocks
            self._at = positions(self.model.config, h[..., 0], None)
        return self.model.run_blocks(h, self._at)[0]

    @contextmanager
    def unrounded_logits(self) -> Iterator[None]:
        """Let routers of others give their logits in fp32 too, so that all route alike: in bf16 some tokens' experts
        change places."""
        gates: list[Any] = [m.layer.router.gate for m in self.model.modules() if isinstance(m, _AutoEPExperts)]
        for gate in gates:
            gate.forward = lambda x, gate=gate: F.linear(x.float(), gate.weight.float())
        try:
            yield
        finally:
            for gate in gates:
                del gate.forward

    @contextmanager
    def choices(self) -> Iterator[list[Tensor]]:
        """The experts that each layer chooses while it lasts [T, K], as a list that grows."""
        found: list[Tensor] = []
        ours: list[Any] = [m for m in self.model.modules() if isinstance(m, MoELayer)]
        others: list[Any] = [m.layer.router for m in self.model.modules() if isinstance(m, _AutoEPExperts)]
        for layer in ours:
            layer.counters.append(_Noted(found))
        hooks = [r.register_forward_hook(lambda _, __, result: found.append(result[1])) for r in others]
        try:
            yield found
        finally:
            for layer in ours:
                layer.counters.pop()
            for hook in hooks:
                hook.remove()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of the blocks."""
        return list(self.model.layers.parameters())

    def expert_gradient(self) -> Tensor:
        """Of the last layer's gate projections on this rank [L, F, H]."""
        experts: Any = self.model.layers[-1].moe.experts
        return experts.w1.grad


def build_pair(system: str, model: ModelConfig, grid: Grid, tokens: int, device: torch.device) -> Pair:
    """A system's pair; equal models have equal weights. Collective.

    Args:
        tokens: of a rank.

    Raises:
        UserError: an option does not exist or does not work here.
    """
    name, options = parse_system(system, PAIR_SYSTEMS)
    if name == "autoep":
        return _build_autoep(model, grid, device, {key: read_value(value) for key, value in options.items()})
    known = (*WAYS, "schedule", "graphs")
    if unknown := set(options) - {*known}:
        raise UserError(f"system {system!r}: options are {', '.join(known)}, not {unknown.pop()}")
    if (wanted_graphs := options.pop("graphs", "0")) not in ("0", "1"):
        raise UserError(f"system {system!r}: graphs={wanted_graphs} is not 0 or 1")
    graphs = Graphs() if wanted_graphs == "1" and device.type == "cuda" else None
    schedule = options.pop("schedule", "auto" if name == "overlapped" else "none")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    way, note = None, "reference backend"
    if device.type == "cuda":
        # as a run does it: beside a window rows may need no chunks, and the schedule tells
        wanted = Wanted(**({"overlap": "none"} if schedule != "none" else {}) | options)
        sizes = (model.hidden_size, model.intermediate_size, model.num_experts, model.num_experts_per_tok, tokens)
        try:
            way, note = choose(Shape(*sizes, dtype), grid, wanted)
        except ValueError as error:
            raise UserError(f"system {system!r}: {error}") from None
    try_chunks = way is not None and way.transport != "symmetric" and "overlap" not in options
    runtime = plain_runtime(grid, way, schedule=schedule, try_chunks=try_chunks, graphs=graphs)
    return Pair(make_model(model, runtime, device, dtype), note, way is not None and way.transport == "symmetric")


def plain_runtime(grid: Grid, way: Way | None = None, **more: Any) -> Runtime:
    """One copy of a token per device."""
    return Runtime(grid=grid, dispatcher="dedup" if grid.expert_size > 1 else "local", way=way, **more)


def make_model(config: ModelConfig, runtime: Runtime, device: torch.device, dtype: torch.dtype) -> GPT:
    """With the weights that training would start with."""
    with torch.device(device):
        model = GPT(config, runtime)
    init_weights(model, SEED)
    return model.to(dtype)


@dataclass(frozen=True)
class _Noted:
    """In place of a counter."""

    found: list[Tensor]

    def add(self, experts_TK: Tensor) -> None:
        self.found.append(experts_TK)


class _AutoEPExperts(nn.Module):
    """DeepSpeed's layer where a block has ours. It has a router of its own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.experts: Any = layer.experts
        self.router = _Nothing()

    def forward(self, x: Tensor, _: Tensor) -> tuple[Tensor, None]:
        """[B, S, H] -> [B, S, H], and no routing."""
        return self.layer(x), None


class _Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """No logits."""
        return x[:0]


def _build_autoep(model: ModelConfig, grid: Grid, device: torch.device, options: dict[str, Any]) -> Pair:
    """Our twin, its experts made by DeepSpeed's own conversion of a Hugging Face layer."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pair = Pair(make_model(model, plain_runtime(grid), device, dtype), " ".join(f"{k}={v}" for k, v in options.items()))
    for layer in model.moe_layers:
        pair.model.layers[layer].moe = _AutoEPExperts(_autoep_layer(model, layer, grid, device, dtype, options))
    return pair


@torch.no_grad()
def _autoep_layer(
    model: ModelConfig, layer: int, grid: Grid, device: torch.device, dtype: torch.dtype, options: dict[str, Any]
) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    hub = Qwen3MoeConfig(
        vocab_size=8,
        hidden_size=model.hidden_size,
        moe_intermediate_size=model.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=model.num_experts,
        num_experts_per_tok=model.num_experts_per_tok,
        norm_topk_prob=model.norm_topk_prob,
    )
    with torch.device(device):
        whole = Qwen3MoeForCausalLM(hub).float()
    block, prefix = whole.model.layers[0].mlp, f"{SEED}/layers.{layer}.moe"
    draw(block.gate.weight, model.initializer_range, f"{prefix}.router.weight")
    for expert in range(model.num_experts):
        gate, up = block.experts.gate_up_proj[expert].chunk(2)
        for weight, name in ((gate, "w1"), (up, "w3"), (block.experts.down_proj[expert], "w2")):
            draw(weight, model.initializer_range, f"{prefix}.experts.{name}/{expert}")
    whole = whole.to(dtype)
    convert_to_autoep(whole, grid, options)
    return whole.model.layers[0].mlp
