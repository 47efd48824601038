"""The mixture-of-experts layer: router, placement, dispatch, experts, combine."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from occult_train.kernels.experts.reference import experts
from occult_train.kernels.gating.autograd import gated
from occult_train.kernels.routing.reference import Routing
from occult_train.kernels.swiglu.autograd import swiglu
from occult_train.moe.collaboration import CollaborationMeter, RoutingCounter
from occult_train.moe.dispatch import Dispatched, make_dispatcher
from occult_train.moe.experts import Experts
from occult_train.moe.flight import Flight, FusedFlight, PlainFlight
from occult_train.moe.fused import FusedExperts, Way
from occult_train.moe.losses import LayerRouting
from occult_train.moe.offload import HostExperts
from occult_train.moe.placement import Placement
from occult_train.moe.pruning import Pruner
from occult_train.moe.router import Router
from occult_train.moe.similarity import LogitProducts
from occult_train.moe.stopwatch import Stopwatch
from occult_train.parallel.grid import Grid
from occult_train.parallel.zero import ExpertParallelLayer


@dataclass(frozen=True)
class MoEOptions:
    """Shape and options of a layer."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    normalise: bool = False
    shared_intermediate: int = 0
    shared_gate: bool = False
    sequence_losses: bool = False
    """Return a balancing loss of each sequence by itself; the input is [B, S, H] then."""
    dual: bool = False
    """Of the input, the second half is of the same tokens as the first and chooses other experts; see `route_dual`."""
    dispatcher: str = "local"
    recompute: bool = False
    """Recompute experts in backward from the received rows, which are kept; nothing is routed or sent again."""
    way: Way | None = None
    """How the fused layer computes (`local` and `dedup` alike); None composes it of plain torch."""


@dataclass(frozen=True)
class Chosen:
    """Tokens and where they go."""

    x_TH: Tensor
    slots_TK: Tensor
    weights_TK: Tensor
    routing: LayerRouting
    """What the balancing losses need."""


class SwiGLU(nn.Module):
    """w2 (silu(w1 x) * w3 x), without biases."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, intermediate, bias=False)
        self.w2 = nn.Linear(intermediate, hidden, bias=False)
        self.w3 = nn.Linear(hidden, intermediate, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return self.w2(swiglu(self.w1(x), self.w3(x)))


class MoELayer(ExpertParallelLayer):
    """Routed experts spread over an expert-parallel group, and an optional shared expert.

    A token's way: 1 router and pruning, 2 placement, 3 dispatch, 4 experts, 5 combine, 6 shared expert.
    """

    expert_to_slot: Tensor

    def __init__(self, options: MoEOptions, grid: Grid, placement: Placement, pruner: Pruner | None = None) -> None:
        super().__init__(grid, options.experts, placement.by_device(grid.expert_size))
        self.options, self.placement = options, placement
        o = options
        self.router = Router(o.hidden, o.experts, o.top_k, o.normalise, o.way is not None, o.dual)
        self.dispatcher = make_dispatcher(options.dispatcher, grid, self.num_local_experts)
        self.fused = self._make_fused(grid)
        self.experts = Experts(self.num_local_experts, options.hidden, options.intermediate, self.fused or experts)
        self.shared_expert = (
            SwiGLU(options.hidden, options.shared_intermediate) if options.shared_intermediate else None
        )
        self.shared_expert_gate = nn.Linear(options.hidden, 1, bias=False) if options.shared_gate else None
        self.register_buffer("expert_to_slot", torch.tensor(placement.expert_to_slot), persistent=False)
        self.meter = CollaborationMeter(grid.expert_rank, grid.expert_size)
        self.counters: list[RoutingCounter] = []
        """Count the choices of experts while they are there."""
        self.logit_products: LogitProducts | None = None
        """Accumulates router logits while it is there."""
        self.pruner = pruner
        self.host: HostExperts | None = None
        """Computes the experts while they are in host memory; see moe/offload."""
        self.tag(self.experts)

    def forward(self, x: Tensor, logits_TE: Tensor | None = None) -> tuple[Tensor, LayerRouting]:
        """Apply the experts.

        Args:
            x: [..., H] normed hidden states.
            logits_TE: `self.router(x)` over all leading positions if it was computed already.

        Returns:
            output of x's shape, and what the balancing losses need.
        """
        chosen = self.choose(x, logits_TE)
        y_TH = self.apply_experts(chosen)
        if self.shared_expert is not None:
            y_TH = y_TH + self._run(self._shared, chosen.x_TH)
        return y_TH.view_as(x), chosen.routing

    def choose(self, x: Tensor, logits_TE: Tensor | None = None) -> Chosen:
        """Steps 1 and 2. Arguments as of `forward`."""
        x_TH = x.reshape(-1, x.shape[-1])
        logits_TE = self.router(x_TH) if logits_TE is None else logits_TE
        if self.logit_products is not None:
            self.logit_products.add(logits_TE)
        # on the placement's devices as they are now: experts may have moved
        pruning = self.pruner.pruning(self.expert_to_slot) if self.pruner is not None else None
        routing = self.router.choose(logits_TE, pruning)
        sequences = self._sequence_loss(logits_TE, routing, x.shape[0]) if self.options.sequence_losses else None
        losses = LayerRouting(routing.mean_prob_E, routing.z, routing.counts_E, sequences)
        slots_TK = self._place(routing)
        if self.host is not None:
            self.host.announce(slots_TK)
        return Chosen(x_TH, slots_TK, routing.weights_TK, losses)

    def apply_experts(self, chosen: Chosen) -> Tensor:
        """Steps 3 to 5 one after the other, [T, H]."""
        if self.fused is not None:
            return self.experts(chosen.x_TH, chosen.slots_TK, chosen.weights_TK)
        dispatched = self.dispatcher.dispatch(chosen.x_TH, chosen.slots_TK, chosen.weights_TK)
        return self.dispatcher.combine(self._compute(dispatched), dispatched)

    def place(self, placement: Placement) -> None:
        """Route to the experts where `placement` has them, and tell DeepSpeed so. Their weights are not touched."""
        self.placement = placement
        self.expert_to_slot.copy_(torch.tensor(placement.expert_to_slot))
        self.describe(placement.by_device(self.ep_size))
        self.tag(self.experts)
        if self.fused is not None:
            self.fused.room = None  # another share of the tokens will come here

    def begin(self, chosen: Chosen, chunks: int = 0, watch: Stopwatch | None = None) -> Flight:
        """Steps 3 to 5 in stages, between which other things may be computed.

        Args:
            chunks: as of `Way`, for the fused layer.
            watch: told how long they take.
        """
        tensors = chosen.x_TH, chosen.slots_TK, chosen.weights_TK
        if self.fused is not None:
            return FusedFlight(self.fused, self.experts, tensors, chunks, watch)
        return PlainFlight(self.dispatcher, self._compute, tensors, watch)

    def _make_fused(self, grid: Grid) -> FusedExperts | None:
        """Steps 3 to 5 as one function, with the dispatcher's counters, if asked for."""
        o = self.options
        if o.way is None:
            return None
        if o.dispatcher not in ("local", "dedup"):
            raise ValueError(
                f"the fused layer sends one copy per device; dispatcher={o.dispatcher} needs the reference backend"
            )
        return FusedExperts(grid, o.experts, self.dispatcher.traffic, o.way, o.recompute)

    def _compute(self, dispatched: Dispatched) -> Tensor:
        """Step 4 on rows that have arrived, [R, H]."""
        return self._run(self.experts, dispatched.rows_RH, dispatched.ids_RM, dispatched.weights_RM)

    def _place(self, routing: Routing) -> Tensor:
        """Experts' ids to slots."""
        for counter in self.counters:
            counter.add(routing.experts_TK)
        slots_TK = routing.experts_TK if self.placement.is_identity else self.expert_to_slot[routing.experts_TK]
        if self.meter.enabled:
            self.meter.add(slots_TK // self.num_local_experts)
        return slots_TK

    def _shared(self, x_TH: Tensor) -> Tensor:
        assert self.shared_expert is not None
        y_TH = self.shared_expert(x_TH)
        if self.shared_expert_gate is not None:
            y_TH = gated(y_TH, self.shared_expert_gate(x_TH))
        return y_TH

    def _sequence_loss(self, logits_TE: Tensor, routing: Routing, sequences: int) -> Tensor:
        """E * sum_e f_e * P_e of each sequence, averaged over them."""
        probs_TE = logits_TE.softmax(dim=-1)
        chosen_TE = torch.zeros_like(probs_TE).scatter_(1, routing.experts_TK, 1.0)
        share_BE = chosen_TE.unflatten(0, (sequences, -1)).mean(dim=1) / self.options.top_k
        probs_BE = probs_TE.unflatten(0, (sequences, -1)).mean(dim=1)
        return self.options.experts * (share_BE * probs_BE).sum(dim=1).mean()

    def _run(self, function: Any, *inputs: Tensor) -> Tensor:
        if self.options.recompute and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
        return function(*inputs)
