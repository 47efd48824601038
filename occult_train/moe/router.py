"""Top-k softmax routing. T tokens, H model width, E experts, K experts a token."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from occult_train.kernels.pruning.reference import Pruning
from occult_train.kernels.routing import autograd, reference
from occult_train.kernels.routing.reference import Routing


class _WideProduct(torch.autograd.Function):
    """x @ weight^T with half-precision inputs, whose products fp32 holds exactly, summed and returned in fp32.

    Its gradient is rounded to the inputs' type, as that of a product in that type would be.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype)
        return grad @ weight, grad.t() @ x


class Router(nn.Module):
    """Softmax over all experts, then the K best.

    `expert_bias` [E] is added to the probabilities for choosing alone (loss-free balancing, arXiv 2408.15664); the
    weights are the unbiased probabilities. It is zero unless the balancing changes it.
    """

    expert_bias: Tensor

    def __init__(
        self, hidden: int, experts: int, top_k: int, normalise: bool, fused: bool = False, dual: bool = False
    ) -> None:
        """fused: choose with a Triton kernel (fp32 logits), else in plain torch. dual: by `route_dual`, in torch."""
        super().__init__()
        self.top_k, self.normalise, self.dual = top_k, normalise, dual
        self.route = autograd.route if fused else reference.route
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        self.register_buffer("expert_bias", torch.zeros(experts, dtype=torch.float32), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        """Move, or change the type of what it holds; the bias stays fp32, for its steps are small."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        self.expert_bias = bias.to(self.expert_bias.device)
        return self

    def forward(self, x_TH: Tensor) -> Tensor:
        """Logits [T, E], computed in fp32 whatever the model's type."""
        if x_TH.is_cuda and x_TH.dtype in (torch.bfloat16, torch.float16) and x_TH.dtype == self.weight.dtype:
            return _WideProduct.apply(x_TH, self.weight)
        wide = torch.promote_types(x_TH.dtype, torch.float32)
        return F.linear(x_TH.to(wide), self.weight.to(wide))

    def choose(self, logits_TE: Tensor, pruning: Pruning | None = None) -> Routing:
        """Pick experts and weights from the logits, on few devices if `pruning` says so."""
        if self.dual:  # a row's one expert is on one device
            return reference.route_dual(logits_TE, self.expert_bias, self.top_k, self.normalise)
        return self.route(logits_TE, self.expert_bias, self.top_k, self.normalise, pruning)
