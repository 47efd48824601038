"""Keeping experts balanced: auxiliary loss, z-loss, and the bias that needs no loss.

Lm MoE layers, E experts, T tokens of a micro-batch, K experts a token.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class LayerRouting:
    """What one layer's routing of one micro-batch adds to the losses."""

    mean_prob_E: Tensor
    """[E] mean over tokens of the router's probabilities, differentiable."""
    z: Tensor
    """Mean over tokens of logsumexp(logits) squared (ST-MoE, arXiv 2202.08906, eq. 5), differentiable."""
    counts_E: Tensor
    """[E] int64, tokens of this micro-batch that chose each expert."""
    sequences: Tensor | None = None
    """Mean over sequences of E * sum_e f_e * P_e, both of that sequence; differentiable. None unless asked for."""


class Balancer:
    """Auxiliary losses of all layers, and the counts they need over accumulation steps and ranks.

    The load-balancing loss of a layer is E * sum_e f_e * P_e (Switch Transformer, arXiv 2101.03961, eq. 4), with f_e
    the share of all assignments that went to expert e and P_e the mean probability of e; 1 when balanced.

    What enters the model's loss is, by `kind`: `mean` over layers; `sum` over layers (DeepSeek-MoE without seq_aux);
    `sequence`, the sum over layers of the loss of each sequence by itself, averaged over sequences (DeepSeek-MoE,
    arXiv 2401.06066, eq. 12, whose T is a sequence); `pooled`, one loss from the f_e and P_e of all layers' tokens
    together, times K, as transformers defines it for OLMoE, Mixtral, Qwen2-MoE and Qwen3-MoE.

    scope `micro_batch`: f_e of this rank's micro-batch. scope `global_batch`: f_e over all ranks and over the
    accumulation steps of this optimizer step so far (arXiv 2501.11873, with its buffer over accumulation); P_e, which
    carries the gradient, stays that of the micro-batch.
    """

    def __init__(self, balance: str, scope: str, bias_rate: float, kind: str = "mean") -> None:
        self.balance, self.scope, self.bias_rate, self.kind = balance, scope, bias_rate, kind
        self._counts: Tensor | None = None
        self._used: Tensor
        self._synced = False

    def losses(self, layers: list[LayerRouting]) -> tuple[Tensor, Tensor]:
        """Load-balancing loss [Lm] and z-loss [Lm] of one micro-batch, and remember its counts. Call once per training
        forward.

        Collective over all ranks if the scope is global_batch and the loss is used (balance is aux_loss); where it is
        only logged, its loads are those of this rank.
        """
        counts = torch.stack([layer.counts_E for layer in layers])
        probs = torch.stack([layer.mean_prob_E for layer in layers])
        shared = self._add(counts)
        self._used = shared if self.scope == "global_batch" else counts
        used = self._used.to(probs.dtype)
        share = used / used.sum(dim=1, keepdim=True).clamp(min=1)
        return counts.shape[1] * (share * probs).sum(dim=1), torch.stack([layer.z for layer in layers])

    def combine(self, balance_Lm: Tensor, layers: list[LayerRouting], top_k: int) -> Tensor:
        """What of the load-balancing losses enters the model's loss, a scalar; `losses` was called with these layers.

        Args:
            balance_Lm: as `losses` returned it.
        """
        if self.kind == "mean":
            return balance_Lm.mean()
        if self.kind == "sum":
            return balance_Lm.sum()
        if self.kind == "sequence":
            return torch.stack([layer.sequences for layer in layers if layer.sequences is not None]).sum()
        assert self.kind == "pooled", self.kind
        probs_E = torch.stack([layer.mean_prob_E for layer in layers]).mean(dim=0)
        used_E = self._used.sum(dim=0).to(probs_E.dtype)
        share_E = used_E / used_E.sum().clamp(min=1)
        return top_k * share_E.numel() * (share_E * probs_E).sum()

    def _add(self, counts: Tensor) -> Tensor:
        """Add counts [Lm, E] of a micro-batch to those of the step, over all ranks if each forward needs that."""
        self._synced = self.scope == "global_batch" and self.balance == "aux_loss"
        if self._synced:
            counts = _sum_over_ranks(counts)
        self._counts = counts if self._counts is None else self._counts + counts
        return self._counts

    def finish_step(self) -> Tensor:
        """Counts [Lm, E] over the whole global batch; the next step starts from zero. Collective over all ranks."""
        if self._counts is None:
            raise RuntimeError("no micro-batch was seen since the last step")
        counts = self._counts if self._synced else _sum_over_ranks(self._counts)
        self._counts = None
        return counts

    def updated_bias(self, bias_E: Tensor, counts_E: Tensor) -> Tensor:
        """bias + rate * sign(mean load - load) (arXiv 2408.15664, algorithm 1); unchanged unless balance is `bias`."""
        if self.balance != "bias":
            return bias_E
        load = counts_E.to(bias_E.dtype)
        return bias_E + self.bias_rate * torch.sign(load.mean() - load)


def _sum_over_ranks(counts: Tensor) -> Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        counts = counts.clone()
        dist.all_reduce(counts)
    return counts
