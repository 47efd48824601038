"""What is measured, as data: layer shapes, and how popular experts are."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from occult_train.errors import UserError


@dataclass(frozen=True)
class Shape:
    """A layer of SwiGLU experts: H model width, F expert width, E experts, K experts a token."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int

    def flops(self, tokens: int) -> int:
        """FLOPs of the experts' matrix products of a forward pass; forward and backward together are three times it."""
        return 6 * self.hidden * self.intermediate * self.top_k * tokens


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("olmoe", 2048, 1024, 64, 8),
        Shape("deepseek-moe-16b", 2048, 1408, 64, 6),
        Shape("qwen1.5-moe", 2048, 1408, 60, 4),
        Shape("qwen3-30b-a3b", 2048, 768, 128, 8),
    )
}


def parse_shape(text: str) -> Shape:
    """A shape by its name, or `H,F,E,K`.

    Raises:
        UserError: neither, or a token would need more experts than there are.
    """
    if text in SHAPES:
        return SHAPES[text]
    try:
        hidden, intermediate, experts, top_k = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"shape {text!r} is neither H,F,E,K nor one of {', '.join(SHAPES)}") from None
    if min(hidden, intermediate, experts, top_k) < 1 or top_k > experts:
        raise UserError(f"shape {text!r} needs positive numbers H,F,E,K with K <= E")
    return Shape(text.replace(",", "x"), hidden, intermediate, experts, top_k)


def parse_routing(text: str) -> float:
    """Zipf's exponent of `uniform` (0) or `zipf:S`.

    Raises:
        UserError: not one of them.
    """
    kind, colon, value = text.partition(":")
    try:
        exponent = float(value) if colon else 0.0
    except ValueError:
        exponent = math.nan
    if (kind, bool(colon)) not in (("uniform", False), ("zipf", True)) or not 0 <= exponent < math.inf:
        raise UserError(f"routing {text!r} is neither uniform nor zipf:S with a number S >= 0")
    return exponent


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
