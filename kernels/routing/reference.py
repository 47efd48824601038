"""From router logits to experts, weights and what balancing needs, in plain torch.

T tokens, E experts, K experts a token.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """The choice for T tokens."""

    experts_TK: Tensor
    """[T, K] int64, in descending order of score."""
    weights_TK: Tensor
    """[T, K], differentiable."""
    mean_prob_E: Tensor
    """[E] mean over tokens of the probabilities, differentiable; 0 without tokens."""
    z: Tensor
    """Mean over tokens of logsumexp(logits) squared (ST-MoE, arXiv 2202.08906, eq. 5), differentiable."""
    counts_E: Tensor
    """[E] int64, tokens that chose each expert."""


def route(logits_TE: Tensor, bias_E: Tensor, top_k: int, normalise: bool) -> Routing:
    """Softmax over all experts, then the K largest of probability + bias.

    The weights are the unbiased probabilities, divided by their sum if `normalise`.
    """
    tokens, experts = logits_TE.shape
    probs_TE = logits_TE.softmax(dim=-1)
    experts_TK = (probs_TE.detach() + bias_E).topk(top_k, dim=-1).indices
    weights_TK = probs_TE.gather(1, experts_TK)
    if normalise:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    chosen_TE = torch.zeros(tokens, experts, dtype=torch.bool, device=logits_TE.device).scatter_(1, experts_TK, True)
    counts_E = chosen_TE.sum(dim=0)  # bincount would make the host wait
    least = max(tokens, 1)  # a mean over no tokens would be NaN
    z = logits_TE.logsumexp(dim=-1).square().sum() / least
    return Routing(experts_TK, weights_TK, probs_TE.sum(dim=0) / least, z, counts_E)
