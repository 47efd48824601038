"""The routed experts that this rank holds."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from occult_train.kernels.experts.reference import experts


class Experts(nn.Module):
    """L SwiGLU experts, stacked: w1 (gate) and w3 (up) [L, F, H], w2 (down) [L, H, F].

    Args:
        function: what to compute, from the inputs of forward, then w1, w2 and w3. It is called inside this module, so
            that engines which gather its weights just in time do.
    """

    def __init__(
        self, local_experts: int, hidden: int, intermediate: int, function: Callable[..., Tensor] = experts
    ) -> None:
        super().__init__()
        self.function = function
        self.w1 = nn.Parameter(torch.empty(local_experts, intermediate, hidden))
        self.w2 = nn.Parameter(torch.empty(local_experts, hidden, intermediate))
        self.w3 = nn.Parameter(torch.empty(local_experts, intermediate, hidden))

    def forward(self, *inputs: Tensor, function: Callable[..., Tensor] | None = None) -> Tensor:
        """By default rows [R, H], their local experts and weights to rows; see kernels/experts. Or see moe/fused.

        Args:
            function: to compute this in place of what was given first.
        """
        return (function or self.function)(*inputs, self.w1, self.w2, self.w3)
