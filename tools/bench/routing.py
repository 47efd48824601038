"""Which experts tokens choose: popularity by Zipf's law, and draws that keep to it."""

import torch
from torch import Tensor

from occult_train.tools.bench.shapes import Shape


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
