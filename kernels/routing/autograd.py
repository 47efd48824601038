"""The routing kernels with gradients."""

from typing import Any

import torch
from torch import Tensor

from occult_train.kernels.routing import kernel
from occult_train.kernels.routing.reference import Routing


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, bias: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, ...]:
        logits = logits.contiguous()
        found = kernel.route(logits, bias, top_k, normalise)
        ctx.save_for_backward(logits, found.experts_TK)
        ctx.normalise = normalise
        ctx.mark_non_differentiable(found.experts_TK, found.counts_E)
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, _experts: None, weights: Any, mean: Any, z: Any, _counts: None) -> Any:
        if weights is None and mean is None and z is None:
            return None, None, None, None
        logits, experts = ctx.saved_tensors
        d_logits = kernel.backward(logits, experts, ctx.normalise, weights, mean, z)
        return d_logits, None, None, None  # bias, top_k, normalise


def route(logits_TE: Tensor, bias_E: Tensor, top_k: int, normalise: bool) -> Routing:
    """As the reference's."""
    if torch.compiler.is_compiling():  # nothing to be compiled in here
        return _apart(logits_TE, bias_E, top_k, normalise)
    return Routing(*_Route.apply(logits_TE, bias_E, top_k, normalise))


@torch.compiler.disable
def _apart(logits_TE: Tensor, bias_E: Tensor, top_k: int, normalise: bool) -> Routing:
    return route(logits_TE, bias_E, top_k, normalise)
