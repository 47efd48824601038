"""Keeping each token's experts on few devices, in plain torch: which expert stands in for which.

T tokens, E experts, K experts a token, G devices (groups of experts), m devices a token may use.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Pruning(NamedTuple):
    """How choices are pruned (Occult, arXiv 2505.13345, section on collaboration pruning)."""

    slots_E: Tensor
    """[E] int64: where each expert lives; its device is slot // group_size."""
    group_size: int
    """Experts of a device, E / G."""
    devices: int
    """m; m * group_size is at least K."""
    similarity_EE: Tensor | None = None
    """[E, E] fp32: how alike experts are. With it the most similar experts stand in, without it the highest scores."""
    inherit: bool = False
    """Whether a substitute takes the weight of the expert it stands in for, or its own."""


def prune(scores_TE: Tensor, experts_TK: Tensor, pruning: Pruning) -> Tensor:
    """Experts [T, K] on at most m devices a token.

    A token's experts open devices in their order until m are open. Those on open devices stay; each other one, in the
    same order, gives its place to the best expert on open devices that the token does not use: the one of the highest
    score, or the most similar one. Ties go to the lower expert. A token that uses at most m devices stays as it is.

    Args:
        scores_TE: what the experts were chosen by.
        experts_TK: [T, K] int64, distinct, in descending order of score.
    """
    group_E = pruning.slots_E // pruning.group_size
    group_TK = group_E[experts_TK]
    open_TG = _open(group_TK, len(group_E) // pruning.group_size, pruning.devices)
    stays_TK = open_TG.gather(1, group_TK)
    free_TE = open_TG[:, group_E].scatter(1, experts_TK, False)
    found = []
    for expert_T, stays_T in zip(experts_TK.unbind(1), stays_TK.unbind(1), strict=True):
        worth_TE = scores_TE if pruning.similarity_EE is None else pruning.similarity_EE[expert_T]
        best_T = worth_TE.masked_fill(~free_TE, float("-inf")).argmax(dim=1)
        found.append(torch.where(stays_T, expert_T, best_T))
        free_TE.scatter_(1, found[-1][:, None], False)
    return torch.stack(found, dim=1)


def _open(group_TK: Tensor, groups: int, limit: int) -> Tensor:
    """[T, G]: the first `limit` different devices of each row."""
    open_TG = torch.zeros(len(group_TK), groups, dtype=torch.bool, device=group_TK.device)
    for group_T1 in group_TK.split(1, dim=1):
        allowed_T1 = open_TG.gather(1, group_T1) | (open_TG.sum(dim=1, keepdim=True) < limit)
        open_TG.scatter_(1, group_T1, allowed_T1)
    return open_TG
