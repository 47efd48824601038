"""One problem for all systems: equal weights, equal inputs, a known routing, and the right answer in fp32.

T tokens a rank, H width, F expert width, E experts, L experts a rank, K experts a token.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from occult_train.kernels.pruning.reference import Pruning, prune
from occult_train.moe.placement import Placement
from occult_train.parallel.grid import Grid
from occult_train.tools.bench.routing import draws
from occult_train.tools.bench.shapes import Law, Shape, parse_routing

Swiglu = tuple[Tensor, Tensor, Tensor]
"""Weights or gradients of one expert: gate [F, H], down [H, F], up [F, H]."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of a rank: the layer computes y from x, and the loss is sum(y * dy)."""

    x_TH: Tensor
    dy_TH: Tensor
    experts_TK: Tensor
    """The experts that the router will choose, ascending."""


@dataclass(frozen=True)
class Problem:
    """What every system is given. Weights are those of all experts, on every rank."""

    shape: Shape
    grid: Grid
    w1_EFH: Tensor
    w2_EHF: Tensor
    w3_EFH: Tensor
    router_EH: Tensor
    batches: tuple[Batch, ...]
    law: Law = field(default_factory=Law)
    """By which tokens choose."""

    @property
    def local_experts(self) -> slice:
        """Slots of this rank; ids of its experts where they are placed contiguously."""
        count = self.shape.experts // self.grid.expert_size
        return slice(self.grid.expert_rank * count, (self.grid.expert_rank + 1) * count)

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and inputs."""
        return self.router_EH.dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.router_EH.device


@torch.no_grad()
def make_problem(
    shape: Shape, grid: Grid, tokens: int, routing: str, dtype: torch.dtype, device: torch.device, batches: int = 4
) -> Problem:
    """The same weights on every rank, and `batches` micro-batches of this rank's own.

    Weights are scaled so that every product keeps its input's variance.
    """
    generator = torch.Generator(device).manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.empty(size, device=device, dtype=dtype).normal_(0, size[-1] ** -0.5, generator=generator)

    e, f, h = shape.experts, shape.intermediate, shape.hidden
    w1, w2, w3, router = normal(e, f, h), normal(e, h, f), normal(e, f, h), normal(e, h)
    law = parse_routing(routing)
    draw = draws(law, shape)
    made = []
    for batch in range(batches):
        choice = torch.Generator().manual_seed(1000 * batch + grid.rank)
        noise = torch.Generator(device).manual_seed(1000 * batch + grid.rank)
        experts = draw(tokens, choice).to(device)
        made.append(_make_batch(router, experts, dtype, noise))
    return Problem(shape, grid, w1, w2, w3, router, tuple(made), law)


def _make_batch(router_EH: Tensor, experts_TK: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Batch:
    """Noise, moved within the span of the router's rows so that its logits choose `experts_TK`.

    Chosen logits lie in [1, 2), the others in [-1, 0): rounding in 16 bits changes no choice, so all systems route
    alike.
    """
    device, (tokens, _), (e, h) = router_EH.device, experts_TK.shape, router_EH.shape
    x_TH = torch.randn(tokens, h, device=device, generator=generator)
    wish_TE = torch.rand(tokens, e, device=device, generator=generator) - 1
    wish_TE = wish_TE.scatter_add(1, experts_TK, torch.full_like(experts_TK, 2, dtype=torch.float32))
    wide_EH = router_EH.float()
    gram_EE = wide_EH @ wide_EH.T
    x_TH = x_TH + torch.linalg.solve(gram_EE, wish_TE.T - wide_EH @ x_TH.T).T @ wide_EH
    dy_TH = torch.randn(tokens, h, device=device, generator=generator)
    return Batch(x_TH.to(dtype).requires_grad_(), dy_TH.to(dtype), experts_TK)


@dataclass(frozen=True)
class Answer:
    """What a system must give for the first micro-batch, in fp32."""

    y_TH: Tensor
    dx_TH: Tensor
    router_EH: Tensor
    """The router's gradient."""
    chosen_TK: Tensor
    """The experts that tokens use in the end."""
    expert: int
    """The local expert, counted from this rank's first, whose gradient is compared: its most loaded one."""
    expert_gradients: Swiglu
    """Summed over the tokens of all ranks."""


def right_answer(problem: Problem, pruning: Pruning | None = None, placement: Placement | None = None) -> Answer:
    """The layer in plain fp32, one expert after the other, of pruned choices if so. Collective over the expert-parallel
    group.

    Args:
        placement: where experts live; None is contiguous.

    Raises:
        RuntimeError: the router does not choose the experts that the problem was made for.
    """
    batch, k = problem.batches[0], problem.shape.top_k
    x_TH = batch.x_TH.detach().float().requires_grad_()
    router_EH = problem.router_EH.detach().float().requires_grad_()
    probs_TE = F.linear(x_TH, router_EH).softmax(-1)
    best = probs_TE.topk(k)
    if not torch.equal(best.indices.sort(dim=1).values, batch.experts_TK):
        raise RuntimeError("the router does not choose the experts that the problem was made for")
    chosen_TK = best.indices if pruning is None else prune(probs_TE.detach(), best.indices, pruning)
    weights_TK = probs_TE.gather(1, chosen_TK)
    weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True)
    slots = (placement or Placement.contiguous(problem.shape.experts)).slot_to_expert
    probes = _most_loaded(problem, chosen_TK, slots)
    y_TH, dx_TH = torch.zeros_like(x_TH), torch.zeros_like(x_TH)
    dweights_TK = torch.zeros_like(weights_TK)
    gradients: dict[int, Swiglu] = {}
    for expert in range(problem.shape.experts):
        token, column = (chosen_TK == expert).nonzero(as_tuple=True)
        rows = x_TH.detach()[token].requires_grad_()
        share = weights_TK.detach()[token, column].requires_grad_()
        w1, w2, w3 = (
            w[expert].detach().float().requires_grad_() for w in (problem.w1_EFH, problem.w2_EHF, problem.w3_EFH)
        )
        out = share[:, None] * F.linear(F.silu(F.linear(rows, w1)) * F.linear(rows, w3), w2)
        asked = (rows, share, w1, w2, w3) if expert in probes else (rows, share)
        drows, dshare, *dw = torch.autograd.grad(out, asked, batch.dy_TH.float()[token])
        y_TH.detach().index_add_(0, token, out.detach())
        dx_TH.index_add_(0, token, drows)
        dweights_TK[token, column] = dshare
        if dw:
            gradients[expert] = (dw[0], dw[1], dw[2])
    routing_dx, drouter = torch.autograd.grad(weights_TK, (x_TH, router_EH), dweights_TK)
    mine = probes[problem.grid.expert_rank]
    summed = [_sum_over_peers(problem, gradients[expert]) for expert in probes]
    local = slots.index(mine) - problem.local_experts.start
    return Answer(y_TH.detach(), dx_TH + routing_dx, drouter, chosen_TK, local, summed[problem.grid.expert_rank])


def _most_loaded(problem: Problem, experts_TK: Tensor, slot_to_expert: tuple[int, ...]) -> list[int]:
    """For every expert-parallel rank the expert of its that got most tokens in the first micro-batch."""
    counts_E = torch.bincount(experts_TK.flatten(), minlength=problem.shape.experts)
    if problem.grid.expert_size > 1:
        dist.all_reduce(counts_E, group=problem.grid.expert_group)
    best_D = counts_E[list(slot_to_expert)].view(problem.grid.expert_size, -1).argmax(dim=1)
    count = problem.shape.experts // problem.grid.expert_size
    return [slot_to_expert[device * count + int(local)] for device, local in enumerate(best_D)]


def _sum_over_peers(problem: Problem, gradients: Swiglu) -> Swiglu:
    if problem.grid.expert_size > 1:
        for gradient in gradients:
            dist.all_reduce(gradient, group=problem.grid.expert_group)
    return gradients


def relative(got: Tensor, right: Tensor) -> float:
    """‖got - right‖ / ‖right‖ (the norm of `got` itself where `right` is zero); NaN counts as infinitely wrong."""
    got, right = got.detach().float(), right.float()
    error = float((got - right).norm()) / (float(right.norm()) or 1.0)
    return error if error == error else float("inf")
