"""From router logits to experts, weights and what balancing needs, in plain torch.

T tokens, E experts, K experts a token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from occult_train.kernels.pruning.reference import Pruning, prune


class Routing(NamedTuple):
    """The choice for T tokens."""

    experts_TK: Tensor
    """[T, K] int64, in descending order of score; with pruning, substitutes in the places of whom they replace."""
    weights_TK: Tensor
    """[T, K], differentiable."""
    mean_prob_E: Tensor
    """[E] mean over tokens of the probabilities, differentiable; 0 without tokens."""
    z: Tensor
    """Mean over tokens of logsumexp(logits) squared (ST-MoE, arXiv 2202.08906, eq. 5), differentiable."""
    counts_E: Tensor
    """[E] int64, tokens that chose each expert."""


def route(
    logits_TE: Tensor, bias_E: Tensor, top_k: int, normalise: bool, pruning: Pruning | None = None
) -> Routing:  # fmt: skip
    """Softmax over all experts, then the K largest of probability + bias, replaced where `pruning` says so.

    The weights are the unbiased probabilities of the experts finally used (of those first chosen, if substitutes
    inherit), divided by their sum if `normalise`.
    """
    probs_TE = logits_TE.softmax(dim=-1)
    scores_TE = probs_TE.detach() + bias_E
    chosen_TK = scores_TE.topk(top_k, dim=-1).indices
    experts_TK = chosen_TK if pruning is None else prune(scores_TE, chosen_TK, pruning)
    weights_TK = probs_TE.gather(1, chosen_TK if pruning is not None and pruning.inherit else experts_TK)
    if normalise:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return _routing(logits_TE, probs_TE, experts_TK, weights_TK)


def route_dual(logits_TE: Tensor, bias_E: Tensor, top_k: int, normalise: bool) -> Routing:
    """Two choices of one expert each by the same tokens, which never meet (DGMoE, arXiv 2404.05019).

    Row t of the first half is token t's shortcut representation and takes its best expert; row t of the second half is
    the current one and takes its best, or its second best where the first half took that. Scores and weights are those
    of `route`.

    Raises:
        ValueError: an odd number of rows, fewer than two experts, or another top_k or normalisation than DGMoE has.
    """
    rows, experts = logits_TE.shape
    if rows % 2 or experts < 2 or top_k != 1 or normalise:
        raise ValueError(
            f"two choices of one expert need paired rows, not {rows}, two experts, not {experts}, top_k=1, "
            f"not {top_k}, and normalise=False, not {normalise}"
        )
    probs_TE = logits_TE.softmax(dim=-1)
    best_T, second_T = (probs_TE.detach() + bias_E).topk(2, dim=-1).indices.unbind(dim=1)
    earlier, current = best_T.chunk(2)
    current = torch.where(current == earlier, second_T.chunk(2)[1], current)
    experts_TK = torch.cat((earlier, current))[:, None]
    return _routing(logits_TE, probs_TE, experts_TK, probs_TE.gather(1, experts_TK))


def _routing(logits_TE: Tensor, probs_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Routing:
    tokens, experts = logits_TE.shape
    chosen_TE = torch.zeros(tokens, experts, dtype=torch.bool, device=logits_TE.device).scatter_(1, experts_TK, True)
    counts_E = chosen_TE.sum(dim=0)  # bincount would make the host wait
    least = max(tokens, 1)  # a mean over no tokens would be NaN
    z = logits_TE.logsumexp(dim=-1).square().sum() / least
    return Routing(experts_TK, weights_TK, probs_TE.sum(dim=0) / least, z, counts_E)
