"""DeepSeek-MoE for transformers 5, which has no class for it: a Llama whose MLPs are experts after the first layers.

It travels with exported models (`trust_remote_code=True`) and has no balancing loss: train with occult_train.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM


class DeepseekConfig(LlamaConfig):
    """The keys of DeepSeek-MoE-16B's config.json; those beyond Llama's become attributes as they are."""

    model_type = "deepseek"


class DeepseekMLP(nn.Module):
    """SwiGLU under the names of the hub."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DeepseekGate(nn.Module):
    """Softmax over all experts, then the K best; computed in fp32."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.top_k, self.normalise = config.num_experts_per_tok, config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E], and the weights and experts [T, K] of each token."""
        logits = F.linear(x_TH.float(), self.weight.float())
        weights, experts = logits.softmax(dim=-1).topk(self.top_k, dim=-1)
        if self.normalise and self.top_k > 1:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, weights, experts


class DeepseekMoE(nn.Module):
    """Routed experts, and shared ones that compute as one of their widths' sum."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.gate = DeepseekGate(config)
        self.experts = nn.ModuleList(DeepseekMLP(hidden, width) for _ in range(config.n_routed_experts))
        shared = config.n_shared_experts
        self.shared_experts = DeepseekMLP(hidden, width * shared) if shared else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        x = hidden_states.flatten(0, -2)
        _, weights, experts = self.gate(x)
        out = torch.zeros_like(x)
        for expert in experts.unique().tolist():
            token, place = torch.where(experts == expert)
            part = self.experts[expert](x[token]) * weights[token, place, None].to(x.dtype)
            out.index_add_(0, token, part)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return out.view_as(hidden_states)


class DeepseekForCausalLM(LlamaForCausalLM):
    """The language model."""

    config_class = DeepseekConfig

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            if index >= config.first_k_dense_replace and index % config.moe_layer_freq == 0:
                layer.mlp = DeepseekMoE(config)
        self.post_init()
