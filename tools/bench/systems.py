"""The layers that are compared, each built from a Problem: ours, plain torch, and the peers of `peers`."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn import functional as collectives
from torch.nn import functional as F

from occult_train.errors import UserError
from occult_train.kernels.pruning.reference import Pruning
from occult_train.moe.choose import Shape, Wanted, choose
from occult_train.moe.layer import MoELayer, MoEOptions
from occult_train.moe.placement import Placement, read
from occult_train.moe.pruning import PruneConfig, Pruner
from occult_train.moe.statistics import RoutingStatistics
from occult_train.tools.bench.problem import Problem, Swiglu
from occult_train.tools.bench.shapes import read_value


class Unavailable(Exception):
    """A system cannot run here: not installed, or not made for this setting. All ranks raise it alike."""


@dataclass
class Layer:
    """A layer of some system, with the problem's weights in it."""

    forward: Callable[[Tensor], Tensor]
    """[T, H] -> [T, H]."""
    parameters: list[nn.Parameter]
    router_gradient: Callable[[], Tensor]
    """[E, H]."""
    expert_gradient: Callable[[int], Swiglu]
    """Of a local expert."""
    sent: Callable[[], int] | None = None
    """Bytes sent to other ranks since the last call; None leaves it to be counted in the collectives."""
    note: str = ""
    """What of the system really runs."""
    pruning: Pruning | None = None
    """What it does to the choice of experts; its answer is another then."""
    placement: Placement | None = None
    """Where it has the experts; None is contiguous."""


Build = Callable[[Problem, dict[str, str]], Layer]


def normalised_top_k(x_TH: Tensor, router_EH: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Routing as Hugging Face's blocks do it: weights [T, K] fp32 that sum to 1, and experts [T, K]."""
    best = F.linear(x_TH, router_EH).softmax(-1, dtype=torch.float32).topk(top_k, dim=-1)
    return best.values / best.values.sum(dim=-1, keepdim=True), best.indices


WAYS = tuple(field.name for field in fields(Wanted))
OPTIONS = ("dispatcher", "recompute", "backend", "prune", "placement", *WAYS)


def build_ours(problem: Problem, options: dict[str, str]) -> Layer:
    """Our layer; `options` are `dispatcher` and `recompute` of MoEOptions, `backend` (fused or reference), `prune` (m
    of the ranks, by score), `placement` (a file), and the fields of `Wanted`, which choose its way.

    Raises:
        UserError: there is no such option, or it does not work here.
    """
    shape, grid = problem.shape, problem.grid
    settings: dict[str, Any] = {"dispatcher": "dedup" if grid.expert_size > 1 else "local"}
    for name, value in options.items():
        if name not in OPTIONS:
            raise UserError(f"ours:{name}={value}: our layer has no option {name}, only {', '.join(OPTIONS)}")
        settings[name] = value if name in WAYS else read_value(value)
    wanted = Wanted(**{name: settings.pop(name) for name in WAYS if name in settings})
    note = " ".join(f"{k}={v}" for k, v in settings.items())
    if settings.pop("backend", "fused" if problem.device.type == "cuda" else "reference") == "fused":
        tokens = problem.batches[0].x_TH.shape[0]
        sizes = (shape.hidden, shape.intermediate, shape.experts, shape.top_k, tokens)
        try:
            settings["way"], chosen = choose(Shape(*sizes, problem.dtype), grid, wanted)
        except ValueError as error:
            raise UserError(f"ours: {error}") from None
        note = f"{note} {chosen}"
    pruner = _pruner(settings.pop("prune", None), problem)
    placement = _placement(settings.pop("placement", None), problem)
    made = MoEOptions(
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        experts=shape.experts,
        top_k=shape.top_k,
        normalise=True,
        **settings,
    )
    with torch.device(problem.device):
        layer = MoELayer(made, grid, placement, pruner).to(problem.dtype)
    experts = layer.experts
    with torch.no_grad():
        layer.router.weight.copy_(problem.router_EH)
        for target, source in (
            (experts.w1, problem.w1_EFH),
            (experts.w2, problem.w2_EHF),
            (experts.w3, problem.w3_EFH),
        ):
            target.copy_(source[list(placement.slot_to_expert[problem.local_experts])])
    return Layer(
        forward=lambda x: layer(x)[0],
        parameters=list(layer.parameters()),
        router_gradient=lambda: layer.router.weight.grad,
        expert_gradient=lambda i: (experts.w1.grad[i], experts.w2.grad[i], experts.w3.grad[i]),
        sent=lambda: sum(layer.dispatcher.traffic.drain().bytes_sent.values()),
        note=note,
        pruning=None if pruner is None else pruner.pruning(layer.expert_to_slot),
        placement=placement,
    )


def _placement(path: Any, problem: Problem) -> Placement:
    """Of the layer whose choices are drawn from."""
    experts, law = problem.shape.experts, problem.law
    if path is None:
        return Placement.contiguous(experts)
    if law.path is None:
        raise UserError(f"ours:placement={path} needs --routing chosen:FILE, the choices that it was made for")
    layers = RoutingStatistics.load(law.path).layers
    return read(Path(str(path)), [*layers], experts)[min(layers) if law.layer is None else law.layer]


def _pruner(devices: Any, problem: Problem) -> Pruner | None:
    shape, ranks = problem.shape, problem.grid.expert_size
    if devices is None:
        return None
    config = PruneConfig("router", devices, ranks)
    config.validate(shape.experts, shape.top_k, [0], ranks)
    return Pruner(config, 0, shape.experts)


def build_reference(problem: Problem, options: dict[str, str]) -> Layer:
    """Our layer in plain torch."""
    return build_ours(problem, {"backend": "reference"} | options)


class PlainExperts(nn.Module):
    """A loop over the local experts; tokens travel in K copies. What one writes first."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.shape, self.group, self.ranks = problem.shape, problem.grid.expert_group, problem.grid.expert_size
        here = problem.local_experts
        self.router = nn.Parameter(problem.router_EH.clone())
        self.w1, self.w2, self.w3 = (
            nn.ParameterList(nn.Parameter(w.clone()) for w in stack[here])
            for stack in (problem.w1_EFH, problem.w2_EHF, problem.w3_EFH)
        )

    def forward(self, x_TH: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        weights_TK, experts_TK = normalised_top_k(x_TH, self.router, self.shape.top_k)
        order = experts_TK.flatten().argsort()
        rows = x_TH[order // self.shape.top_k]
        counts_DL = torch.bincount(experts_TK.flatten(), minlength=self.shape.experts).view(self.ranks, -1)
        rows = self._exchanged(rows, counts_DL) if self.ranks > 1 else self._experts(rows, counts_DL[0].tolist())
        back_TKH = torch.empty_like(rows).index_copy(0, order, rows).view(*experts_TK.shape, -1)
        return (back_TKH * weights_TK[..., None]).sum(dim=1).to(x_TH.dtype)

    def _exchanged(self, rows: Tensor, counts_DL: Tensor) -> Tensor:
        """Rows to their experts' ranks, there sorted by expert, and back."""
        received_DL = torch.empty_like(counts_DL)
        dist.all_to_all_single(received_DL, counts_DL, group=self.group)
        send, receive = counts_DL.sum(1).tolist(), received_DL.sum(1).tolist()
        rows = self._all_to_all(rows, send, receive)
        local = torch.arange(received_DL.shape[1], device=rows.device).repeat(self.ranks)
        order = local.repeat_interleave(received_DL.flatten()).argsort(stable=True)
        out = self._experts(rows[order], received_DL.sum(0).tolist())
        return self._all_to_all(torch.empty_like(out).index_copy(0, order, out), receive, send)

    def _all_to_all(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        out = rows.new_empty(sum(receive), rows.shape[1])
        return collectives.all_to_all_single(out, rows.contiguous(), receive, send, group=self.group)

    def _experts(self, rows: Tensor, counts: list[int]) -> Tensor:
        parts = zip(rows.split(counts), self.w1, self.w2, self.w3, strict=True)
        return torch.cat([F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2) for x, w1, w2, w3 in parts])


def build_torch(problem: Problem, options: dict[str, str]) -> Layer:
    """Plain torch."""
    layer = PlainExperts(problem)
    return Layer(
        forward=layer,
        parameters=list(layer.parameters()),
        router_gradient=lambda: layer.router.grad,
        expert_gradient=lambda i: (layer.w1[i].grad, layer.w2[i].grad, layer.w3[i].grad),
    )
