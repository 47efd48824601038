"""The routed experts that this rank holds."""

import torch
from torch import Tensor, nn

from occult_train.kernels.experts.reference import experts


class Experts(nn.Module):
    """L SwiGLU experts, stacked: w1 (gate) and w3 (up) [L, F, H], w2 (down) [L, H, F]."""

    def __init__(self, local_experts: int, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(local_experts, intermediate, hidden))
        self.w2 = nn.Parameter(torch.empty(local_experts, hidden, intermediate))
        self.w3 = nn.Parameter(torch.empty(local_experts, intermediate, hidden))

    def forward(self, rows_RH: Tensor, ids_RM: Tensor, weights_RM: Tensor) -> Tensor:
        """Weighted sum over each row's experts, [R, H]; see kernels/experts."""
        return experts(rows_RH, ids_RM, weights_RM, self.w1, self.w2, self.w3)
