"""Which experts tokens choose: by Zipf's law, with draws that keep to it, or as a trained model's tokens did."""

from collections.abc import Callable

import torch
from torch import Tensor

from occult_train.errors import UserError
from occult_train.moe.statistics import RoutingStatistics
from occult_train.tools.bench.shapes import Law, Shape

Draw = Callable[[int, torch.Generator], Tensor]
"""K different experts for each of T tokens, [T, K] int64, ascending."""


def draws(law: Law, shape: Shape) -> Draw:
    """How to draw by a law.

    Raises:
        UserError: statistics that cannot be read, are of another model, or have no choices of the layer.
    """
    if law.path is None:
        share_E = popularity(shape, law.exponent)
        return lambda tokens, generator: draw_experts(share_E, tokens, generator)
    statistics = RoutingStatistics.load(law.path)
    statistics.check_model([*statistics.layers], shape.experts, shape.top_k, str(law.path))
    layer = min(statistics.layers) if law.layer is None else law.layer
    if layer not in statistics.layers:
        raise UserError(f"statistics {law.path} have no layer {layer}, only {', '.join(map(str, statistics.layers))}")
    sets_NK = statistics.layers[layer].sets_NK.long()
    if not len(sets_NK):
        raise UserError(f"statistics {law.path} hold no sampled choices of layer {layer}")
    return lambda tokens, generator: sets_NK[torch.randint(len(sets_NK), (tokens,), generator=generator)]


def popularity(shape: Shape, exponent: float) -> Tensor:
    """How large a share of tokens each expert gets, [E] fp64, K in sum.

    The expert of rank r gets min(1, c / r^exponent): Zipf's law, but no expert can get a token twice. Ranks are dealt
    to experts at random (the same deal every time), so popular experts are spread over devices as chance has it.
    """
    law_E = torch.arange(1, shape.experts + 1, dtype=torch.float64) ** -exponent
    full = 0
    share_E = law_E * (shape.top_k / law_E.sum())
    while bool((share_E[full:] > 1).any()):
        full += int((share_E[full:] > 1).sum())
        rest = law_E[full:]
        share_E = torch.cat((torch.ones(full, dtype=torch.float64), rest * ((shape.top_k - full) / rest.sum())))
    return share_E[torch.randperm(shape.experts, generator=torch.Generator().manual_seed(0))]


def draw_experts(share_E: Tensor, tokens: int, generator: torch.Generator) -> Tensor:
    """K different experts for every token, expert e with probability share_E[e]; [T, K] int64, ascending.

    Systematic sampling over a random order of experts (Madow 1949): laid end to end, the shares cover K unit lengths;
    a comb of K teeth, one length apart and randomly shifted, hits K different experts, each by its share.

    Args:
        share_E: shares of at most 1 that sum to K.
    """
    experts, top_k = share_E.numel(), round(float(share_E.sum()))
    order_TE = torch.rand(tokens, experts, generator=generator).argsort(dim=1)
    ends_TE = share_E[order_TE].cumsum(dim=1)
    teeth_TK = torch.rand(tokens, 1, generator=generator, dtype=torch.float64) + torch.arange(top_k)
    # rounding may leave the last tooth beyond the last end
    hit_TK = torch.searchsorted(ends_TE, teeth_TK, right=True).clamp(max=experts - 1)
    return order_TE.gather(1, hit_TK).sort(dim=1).values
