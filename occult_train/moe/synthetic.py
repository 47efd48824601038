"""Routing made up with structure in it: for simulations without a trained model, and for tests.

T tokens, E experts, K experts a token.
"""

import torch
from torch import Tensor

from occult_train.moe.collaboration import LayerStatistics


def statistics_of(sets_TK: Tensor, experts: int) -> LayerStatistics:
    """Statistics that hold every token's choice.

    Args:
        sets_TK: [T, K] distinct experts of each token, any integer type.
    """
    products_EE = torch.zeros(experts, experts, dtype=torch.float64)
    for part_TK in sets_TK.long().split(65536):
        chosen_TE = torch.zeros(part_TK.shape[0], experts).scatter_(1, part_TK, 1.0)
        products_EE += chosen_TE.T @ chosen_TE
    return LayerStatistics.of(sets_TK.shape[0], products_EE, sets_TK.sort(dim=1).values.to(torch.int16))


def clustered(
    tokens: int, experts: int, top_k: int, clusters: int, strength: float, *, skew: float = 0.0, seed: int = 0
) -> Tensor:
    """Choices [T, K] of tokens that prefer one cluster of experts each.

    Experts are dealt to equal clusters at random; a token's logits are standard Gumbel noise, plus `strength` for the
    experts of its cluster, plus a popularity of each expert with standard deviation `skew`. Strength 0 is uniform
    routing, a large one gives tokens whole clusters.
    """
    generator = torch.Generator().manual_seed(seed)
    cluster_E = torch.randperm(experts, generator=generator) % clusters
    popularity_E = skew * torch.randn(experts, generator=generator)
    parts = []
    for start in range(0, tokens, 65536):
        size = min(65536, tokens - start)
        noise_TE = -torch.log(torch.empty(size, experts).exponential_(generator=generator))
        mine_TE = torch.randint(clusters, (size, 1), generator=generator) == cluster_E
        parts.append((noise_TE + popularity_E + strength * mine_TE).topk(top_k).indices)
    return torch.cat(parts)
