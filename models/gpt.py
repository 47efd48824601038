"""A decoder-only transformer with mixture-of-experts layers.

B batch, S sequence, H width, V vocabulary, Lm MoE layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from occult_train.models.attention import AttendingBlock, Extend, Positions, positions
from occult_train.models.cache import KVCache
from occult_train.models.config import ModelConfig
from occult_train.models.graphs import Graphs
from occult_train.models.norm import BranchNorm, RMSNorm
from occult_train.models.recompute import Run, runner
from occult_train.models.scmoe import ShortcutBlock, run_pair
from occult_train.moe.fused import Way
from occult_train.moe.layer import MoELayer, MoEOptions, SwiGLU
from occult_train.moe.losses import Balancer, LayerRouting
from occult_train.moe.overlap import Schedule
from occult_train.moe.placement import Placement
from occult_train.moe.pruning import PruneConfig, Pruner
from occult_train.moe.similarity import SimilarityTables
from occult_train.parallel.grid import Grid


@dataclass(frozen=True)
class Runtime:
    """How the model runs, as opposed to what it is."""

    grid: Grid = field(default_factory=Grid)
    dispatcher: str = "local"
    placements: dict[int, Placement] = field(default_factory=dict)
    """By layer; layers not named are contiguous."""
    selective_checkpointing: bool = False
    balance: str = "none"
    aux_loss_coef: float = 0.0
    aux_loss_scope: str = "micro_batch"
    aux_loss: str = "mean"
    z_loss_coef: float = 0.0
    bias_update_rate: float = 0.0
    way: Way | None = None
    """How the fused expert layer computes; None composes it of plain torch."""
    schedule: str = "none"
    """When shortcut-connected experts are computed; see `Schedule`."""
    try_chunks: bool = False
    """Whether that may choose chunks of its own."""
    graphs: Graphs | None = None
    """Those as which attention, MLPs and routers are replayed; None launches their kernels one by one."""
    prune: PruneConfig | None = None
    """Pruning with its groups resolved; None prunes nothing."""

    def runner(self) -> Run:
        """Runs the parts of blocks."""
        return runner(self.selective_checkpointing, self.graphs)


class Block(AttendingBlock):
    """Pre-norm block: h + attention(norm(h)), then h + experts(norm(h)) or h + mlp(norm(h)).

    Under selective checkpointing attention, norms, router logits and experts are recomputed in backward, each on its
    own; the choice of experts and the exchanged rows lie between them and are kept.
    """

    def __init__(self, config: ModelConfig, layer: int, runtime: Runtime) -> None:
        super().__init__(config, runtime.runner())
        self.mlp_norm = BranchNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: SwiGLU | None = None
        self.moe: MoELayer | None = None
        if layer in config.mlp_layers:
            self.mlp = SwiGLU(config.hidden_size, config.dense_intermediate_size)
        else:
            self.moe = _make_moe(config, layer, runtime)

    def forward(self, h: Tensor, at: Positions, extend: Extend | None = None) -> tuple[Tensor, LayerRouting | None]:
        """[B, S, H] -> [B, S, H] and the layer's routing if it has experts."""
        return self.feed(self.attend(h, at, extend))

    def feed(self, h: Tensor) -> tuple[Tensor, LayerRouting | None]:
        """h + experts(norm(h)) and their routing, or h + mlp(norm(h)) and None."""
        if self.moe is None:
            return self.run(self._dense, h), None
        h, x, logits_TE = self.run(self._route, h)
        y, routing = self.moe(x, logits_TE)
        return h + y, routing

    def _dense(self, h: Tensor) -> Tensor:
        assert self.mlp is not None
        h, x = self.mlp_norm(h)
        return h + self.mlp(x)

    def _route(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert self.moe is not None
        h, x = self.mlp_norm(h)
        return h, x, self.moe.router(x.flatten(0, 1))


@dataclass(frozen=True)
class Losses:
    """Detached parts of one forward's loss, for the log."""

    cross_entropy: Tensor
    balance_Lm: Tensor
    """[Lm] load-balancing loss of each MoE layer, unweighted."""
    z_Lm: Tensor
    """[Lm] z-loss of each MoE layer, unweighted."""


class GPT(nn.Module):
    """Embedding, blocks, norm and head."""

    def __init__(self, config: ModelConfig, runtime: Runtime | None = None) -> None:
        super().__init__()
        runtime = runtime or Runtime()
        self.config, self.runtime = config, runtime
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_make_block(config, i, runtime) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        r = runtime
        self.balancer = Balancer(r.balance, r.aux_loss_scope, r.bias_update_rate, r.aux_loss)
        self.last_losses: Losses | None = None
        setting = r.schedule if config.scmoe.window else "none"
        # with graphs; but rows that leave before the host knows their number should do so early
        quick = r.graphs is not None and not (r.way and r.way.transport == "symmetric")
        self.schedule = Schedule(setting, config.scmoe.window, r.way.chunks if r.way else 0, r.try_chunks, quick)
        self._at: tuple[Any, Positions] | None = None
        """Of the last sequences without documents, as they seldom change: their length and device, and positions."""
        self.news: list[str] = []
        """Lines for the log, for whoever calls `finish_step` to take."""

    def moe_layers(self) -> dict[int, MoELayer]:
        """The layers with experts, by index."""
        return {i: block.moe for i, block in enumerate(self.layers) if block.moe is not None}

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> Tensor:
        """Logits, or the loss if labels are given.

        Args:
            input_ids: [B, S] int64.
            labels: [B, S] int64, the token that follows each position; -100 is not counted.
            document_ids: [B, S] int64; positions with different ids do not see each other.
            counted: [2] int64, how many labels count in the global batch, and in how many micro-batches: the loss is
                the sum of the labels' losses over the mean number of them in a micro-batch. None takes their number.

        Returns:
            logits [B, S, V], or a scalar: mean cross-entropy in nats, and in training the weighted balancing losses.
        """
        at = self._positions(input_ids, document_ids)
        h, routings = self.run_blocks(self.embed_tokens(input_ids), at)
        logits = self.lm_head(self.norm(h))
        return logits if labels is None else self._loss(logits, labels, routings, counted)

    def _positions(self, input_ids: Tensor, document_ids: Tensor | None) -> Positions:
        if document_ids is not None:
            return positions(self.config, input_ids, document_ids)
        kind = input_ids.shape[1], input_ids.device
        if self._at is None or self._at[0] != kind:
            self._at = kind, positions(self.config, input_ids, None)
        return self._at[1]

    def run_blocks(self, h: Tensor, at: Positions, cache: KVCache | None = None) -> tuple[Tensor, list[LayerRouting]]:
        """All blocks on hidden states [B, S, H], and the routings of those with experts."""
        routings = []
        for i, first, block in self._units():
            earlier, extend = (None if cache is None else partial(cache.extend, layer) for layer in (i - 1, i))
            if isinstance(block, Block):
                h, routing = block(h, at, extend)
            else:
                h, routing = run_pair(first, block, h, at, self.schedule, (earlier, extend))
            if routing is not None:
                routings.append(routing)
        return h, routings

    def _units(self) -> Iterator[tuple[int, Block | None, Block | ShortcutBlock]]:
        """The blocks with their numbers, each after the dense block that runs together with it, if there is one."""
        first = None
        paired = self.config.mlp_layers if self.config.scmoe.block != "none" else []
        for i, block in enumerate(self.layers):
            if i in paired:
                first = block
            else:
                yield i, first, block
                first = None

    def _loss(self, logits: Tensor, labels: Tensor, routings: list[LayerRouting], counted: Tensor | None) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        kind = "mean" if counted is None else "sum"
        cross_entropy = F.cross_entropy(wide, labels.flatten(), ignore_index=-100, reduction=kind)
        if counted is not None:
            cross_entropy = cross_entropy * counted[1] / counted[0]
        if not self.training:
            return cross_entropy
        balance_Lm, z_Lm = self.balancer.losses(routings)
        self.last_losses = Losses(cross_entropy.detach(), balance_Lm.detach(), z_Lm.detach())
        loss = cross_entropy + self.runtime.z_loss_coef * z_Lm.mean()
        if self.runtime.balance == "aux_loss":
            balance = self.balancer.combine(balance_Lm, routings, self.config.num_experts_per_tok)
            loss = loss + self.runtime.aux_loss_coef * balance
        return loss

    def set_step(self, step: int) -> None:
        """Prune as after `step` optimizer steps: before the next one, in evaluation and generation."""
        for layer in self.moe_layers().values():
            if layer.pruner is not None:
                layer.pruner.set_step(step)

    def set_similarity(self, tables: SimilarityTables) -> None:
        """Give each layer's pruning its table."""
        for index, layer in self.moe_layers().items():
            if layer.pruner is not None:
                layer.pruner.similarity_EE = tables.tables[index].contiguous()

    @torch.no_grad()
    def predict(self, input_ids: Tensor, cache: KVCache, last: bool = True) -> Tensor:
        """Logits of tokens that follow those in `cache`, which takes them in.

        Args:
            input_ids: [B, S] int64.
            last: only those of the last position, [B, 1, V]; else [B, S, V].
        """
        at = cache.positions(input_ids)
        h, _ = self.run_blocks(self.embed_tokens(input_ids), at, cache)
        cache.advance(input_ids.shape[1])
        return self.lm_head(self.norm(h[:, -1:] if last else h))

    @torch.no_grad()
    def finish_step(self) -> Tensor:
        """After an optimizer step: update balancing biases, choose a schedule once enough was measured. Returns the
        step's expert loads [Lm, E] over all ranks. Collective."""
        counts = self.balancer.finish_step()
        if line := self.schedule.settle():
            self.news.append(line)
        for layer, counts_E in zip(self.moe_layers().values(), counts, strict=True):
            bias = layer.router.expert_bias
            bias.copy_(self.balancer.updated_bias(bias, counts_E))
        return counts


def _make_block(config: ModelConfig, layer: int, runtime: Runtime) -> Block | ShortcutBlock:
    if config.scmoe.block == "none" or layer in config.mlp_layers:
        return Block(config, layer, runtime)
    return ShortcutBlock(config, _make_moe(config, layer, runtime), runtime.runner())


def _make_moe(config: ModelConfig, layer: int, runtime: Runtime) -> MoELayer:
    placement = runtime.placements.get(layer) or Placement.contiguous(config.num_experts)
    pruner = None if runtime.prune is None else Pruner(runtime.prune, layer, config.num_experts)
    return MoELayer(_moe_options(config, runtime), runtime.grid, placement, pruner)


def _moe_options(config: ModelConfig, runtime: Runtime) -> MoEOptions:
    beside = config.scmoe.block == "none"  # a shortcut block has its own shared expert, of another input
    return MoEOptions(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        normalise=config.norm_topk_prob,
        shared_intermediate=config.shared_expert_intermediate_size if beside else 0,
        dual=config.scmoe.block == "dgmoe",
        shared_gate=config.shared_expert_gate,
        sequence_losses=runtime.aux_loss == "sequence",
        dispatcher=runtime.dispatcher,
        recompute=runtime.selective_checkpointing,
        way=runtime.way,
    )
