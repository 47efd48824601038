"""The routing kernels with gradients."""

from typing import Any

import torch
from torch import Tensor

from occult_train.kernels.pruning.reference import Pruning
from occult_train.kernels.routing import kernel
from occult_train.kernels.routing.reference import Routing


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, bias: Tensor, top_k: int, normalise: bool, pruning: Pruning | None
    ) -> tuple[Tensor, ...]:
        logits = logits.contiguous()
        found, weighed = kernel.forward(logits, bias, top_k, normalise, pruning)
        ctx.save_for_backward(logits, weighed)
        ctx.normalise = normalise
        ctx.mark_non_differentiable(found.experts_TK, found.counts_E)
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, _experts: None, weights: Any, mean: Any, z: Any, _counts: None) -> Any:
        if weights is None and mean is None and z is None:
            return None, None, None, None, None
        logits, weighed = ctx.saved_tensors
        d_logits = kernel.backward(logits, weighed, ctx.normalise, weights, mean, z)
        return d_logits, None, None, None, None  # bias, top_k, normalise, pruning


def route(
    logits_TE: Tensor, bias_E: Tensor, top_k: int, normalise: bool, pruning: Pruning | None = None
) -> Routing:  # fmt: skip
    """As the reference's."""
    if torch.compiler.is_compiling():  # nothing to be compiled in here
        return _apart(logits_TE, bias_E, top_k, normalise, pruning)
    return Routing(*_Route.apply(logits_TE, bias_E, top_k, normalise, pruning))


@torch.compiler.disable
def _apart(
    logits_TE: Tensor, bias_E: Tensor, top_k: int, normalise: bool, pruning: Pruning | None
) -> Routing:  # fmt: skip
    return route(logits_TE, bias_E, top_k, normalise, pruning)
