"""occult_train's own models for transformers 5: what no class of transformers holds.

That is routing kept to few devices (Occult, arXiv 2505.13345), routed experts on a shortcut (ScMoE, arXiv 2404.05019)
and a balancing bias, in a Llama-like decoder with a mixture of experts. The file travels with exported models
(`trust_remote_code=True`), needs torch and transformers alone, and has no balancing loss: train with occult_train.

B batch, S sequence, N heads, T = B * S tokens, H width, E experts, K experts a token, D devices, m devices a token.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast


class OccultConfig(PreTrainedConfig):
    """The keys of config.json, which are occult_train's settings under `model`, and two on routing."""

    model_type = "occult"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 1024
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 128
    qk_norm: str = "full"
    attention_bias: str = "none"
    clip_qkv: float = 0.0
    num_experts: int = 64
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False
    dense_layers: list | None = None
    dense_intermediate_size: int = 0
    scmoe: dict | None = None
    """block (none, scmoe or dgmoe), position (pos1, pos2, pos3), every (1 or 2), combine (add, cg1, cg2)."""
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pruning: dict | None = None
    """policy (router or similarity), inherit, groups (D), devices (m by layer); None prunes nothing."""
    expert_bias: bool = False
    """Whether a bias is added to the probabilities that experts are chosen by."""

    @property
    def shortcuts(self) -> dict:
        """`scmoe`, whose block is none by default."""
        return self.scmoe or {"block": "none"}

    @property
    def shortcut(self) -> str:
        """none, scmoe or dgmoe."""
        return self.shortcuts["block"]

    @property
    def mlp_layers(self) -> list:
        """Layers without experts."""
        if self.shortcut == "none":
            return self.dense_layers or []
        return list(range(0, self.num_hidden_layers, 2)) if self.shortcuts["every"] == 2 else []


class OccultRMSNorm(nn.Module):
    """x / rms(x) * weight, in fp32 and cast back before the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class OccultMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class OccultAttention(nn.Module):
    """Causal self-attention with rotary positions, grouped queries, and norms on queries and keys."""

    def __init__(self, config: OccultConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.clip, self.qk_norm = layer, config.clip_qkv, config.qk_norm
        self.heads, self.kv_heads, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        q, kv = self.heads * self.width, self.kv_heads * self.width
        some, all_four = config.attention_bias != "none", config.attention_bias == "all"
        self.q_proj = nn.Linear(config.hidden_size, q, bias=some)
        self.k_proj = nn.Linear(config.hidden_size, kv, bias=some)
        self.v_proj = nn.Linear(config.hidden_size, kv, bias=some)
        self.o_proj = nn.Linear(q, config.hidden_size, bias=all_four)
        if self.qk_norm != "none":
            whole = self.qk_norm == "full"
            self.q_norm = OccultRMSNorm(q if whole else self.width, config.rms_norm_eps)
            self.k_norm = OccultRMSNorm(kv if whole else self.width, config.rms_norm_eps)

    def forward(self, x: Tensor, turn: tuple, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """[B, S, H] -> [B, S, H]; `turn` are cosines and sines [B, 1, S, width]."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.width)).transpose(1, 2) for t in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip:
            q, k, v = (t.clamp(-self.clip, self.clip) for t in (q, k, v))
        q, k = rotate(q, *turn), rotate(k, *turn)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        causal = mask is None and q.shape[2] > 1
        grouped = self.heads != self.kv_heads
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, N, S, width] turned by its positions."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


class OccultGate(nn.Module):
    """Softmax over all experts, then the K best, on at most m devices; computed in fp32."""

    expert_bias: Tensor | None
    device_of_expert: Tensor
    likeness: Tensor | None

    def __init__(self, config: OccultConfig, layer: int) -> None:
        super().__init__()
        experts, self.top_k = config.num_experts, config.num_experts_per_tok
        self.normalise, self.dual = config.norm_topk_prob, config.shortcut == "dgmoe"
        self.weight = nn.Parameter(torch.zeros(experts, config.hidden_size))
        self.register_buffer("expert_bias", torch.zeros(experts, dtype=torch.float32) if config.expert_bias else None)
        self.pruning = config.pruning
        if self.pruning:
            self.devices, self.limit = self.pruning["groups"], self.pruning["devices"][str(layer)]
            similar = self.pruning["policy"] == "similarity"
            ranks = torch.zeros(experts, experts, dtype=torch.int32) if similar else None
            self.register_buffer("device_of_expert", torch.zeros(experts, dtype=torch.int32))
            # the more alike, the larger: row e ranks all experts by their similarity to expert e
            self.register_buffer("likeness", ranks)

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E], and the weights and experts [T, K] of each token."""
        logits = F.linear(x_TH.float(), self.weight.float())
        probs = logits.softmax(dim=-1)
        scores = probs if self.expert_bias is None else probs + self.expert_bias
        if self.dual:
            experts = first = self._choose_twice(scores)
        else:
            experts = first = scores.topk(self.top_k, dim=-1).indices
        if self.pruning and not self.dual and self.limit < self.devices:
            experts = self._prune(scores, first)
        inherited = self.pruning and self.pruning["inherit"]
        weights = probs.gather(1, first if inherited else experts)
        if self.normalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, weights, experts

    def _prune(self, scores: Tensor, first: Tensor) -> Tensor:
        """Open devices in the order of a token's experts [T, K] until m are open; those elsewhere give their place to
        the best unused expert on open ones: the most similar one, or that of the highest score."""
        device = self.device_of_expert.long()
        is_open = torch.zeros(len(first), self.devices, dtype=torch.bool, device=first.device)
        for wanted in device[first].split(1, dim=1):
            allowed = is_open.gather(1, wanted) | (is_open.sum(dim=1, keepdim=True) < self.limit)
            is_open.scatter_(1, wanted, allowed)
        stays = is_open.gather(1, device[first])
        free = is_open[:, device].scatter(1, first, False)
        found = []
        for expert, stay in zip(first.unbind(1), stays.unbind(1)):  # noqa: B905 (as many columns)
            worth = scores if self.likeness is None else self.likeness[expert].float()
            best = worth.masked_fill(~free, float("-inf")).argmax(dim=1)
            found.append(torch.where(stay, expert, best))
            free.scatter_(1, found[-1][:, None], False)
        return torch.stack(found, dim=1)

    def _choose_twice(self, scores: Tensor) -> Tensor:
        """Of rows that are all tokens' shortcuts, then all their current representations: the best expert, where the
        shortcut has taken it the second best."""
        best, second = scores.topk(2, dim=-1).indices.unbind(dim=1)
        earlier, current = best.chunk(2)
        current = torch.where(current == earlier, second.chunk(2)[1], current)
        return torch.cat((earlier, current))[:, None]


class OccultMoE(nn.Module):
    """Routed experts, and a shared one beside them where the layer is not a shortcut's."""

    def __init__(self, config: OccultConfig, layer: int) -> None:
        super().__init__()
        hidden, shared = config.hidden_size, config.shared_expert_intermediate_size
        beside = shared and config.shortcut == "none"
        self.gate = OccultGate(config, layer)
        self.experts = nn.ModuleList(OccultMLP(hidden, config.intermediate_size) for _ in range(config.num_experts))
        self.shared_expert = OccultMLP(hidden, shared) if beside else None
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False) if config.shared_expert_gate else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        x = hidden_states.flatten(0, -2)
        _, weights, experts = self.gate(x)
        out = torch.zeros_like(x)
        for expert in experts.unique().tolist():
            token, place = torch.where(experts == expert)
            part = self.experts[expert](x[token]) * weights[token, place, None].to(x.dtype)
            out.index_add_(0, token, part)
        if self.shared_expert is not None:
            shared = self.shared_expert(x)
            out = out + (shared if self.shared_expert_gate is None else self.shared_expert_gate(x).sigmoid() * shared)
        return out.view_as(hidden_states)


class OccultLayer(nn.Module):
    """A pre-norm block. One with experts on a shortcut has a norm for that, and a shared expert of its own."""

    def __init__(self, config: OccultConfig, layer: int) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        dense = layer in config.mlp_layers
        self.input_layernorm = OccultRMSNorm(hidden, eps)
        self.self_attn = OccultAttention(config, layer)
        self.post_attention_layernorm = OccultRMSNorm(hidden, eps)
        self.mlp = OccultMLP(hidden, config.dense_intermediate_size) if dense else OccultMoE(config, layer)
        self.is_shortcut = not dense and config.shortcut != "none"
        if not self.is_shortcut:
            return
        self.combine, self.dual = config.shortcuts["combine"], config.shortcut == "dgmoe"
        self.shortcut_layernorm = OccultRMSNorm(hidden, eps)
        if not self.dual:
            self.shared_expert = OccultMLP(hidden, config.shared_expert_intermediate_size)
        if self.combine != "add":
            self.combine_gate = nn.Linear(hidden, {"cg1": 1, "cg2": 2}[self.combine], bias=False)

    def attend(self, h: Tensor, *at: Any) -> Tensor:
        """h + Attn(h)."""
        return h + self.self_attn(self.input_layernorm(h), *at)

    def feed(self, a: Tensor) -> Tensor:
        """a + MLP(a), or a + MoE(a)."""
        return a + self.mlp(self.post_attention_layernorm(a))

    def join(self, a: Tensor, shortcut: Tensor) -> Tensor:
        """a + SE(a) + MoE(shortcut), weighed by the gate of cg1 or cg2; of dgmoe a + MoE(a) + MoE(shortcut)."""
        x, s = self.post_attention_layernorm(a), self.shortcut_layernorm(shortcut)
        if self.dual:
            earlier, current = self.mlp(torch.cat((s, x))).chunk(2)
            return a + current + earlier
        routed, shared = self.mlp(s), self.shared_expert(x)
        if self.combine == "add":
            return a + shared + routed
        if self.combine == "cg1":
            return a + self.combine_gate(x).sigmoid() * shared + routed
        share = self.combine_gate(x).softmax(dim=-1)
        return a + share[..., :1] * shared + share[..., 1:] * routed


class OccultPreTrainedModel(PreTrainedModel):
    """What transformers asks of a model."""

    config_class = OccultConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar[list[str]] = ["OccultLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True


class OccultModel(OccultPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: OccultConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(OccultLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = OccultRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(self, h: Tensor, attended: Tensor | None, positions: Tensor | None, cache: Cache | None) -> Tensor:
        """Embeddings [B, S, H] at positions [B, S] to hidden states [B, S, H]; `attended` masks padding."""
        if positions is None:
            seen = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(seen, seen + h.shape[1], device=h.device)[None]
        mask = create_causal_mask(self.config, h, attended, cache, positions)
        at = (self._turn(positions), mask, cache)
        dense = None
        for layer in self.layers:
            if layer.is_shortcut:
                h = self._run_pair(dense, layer, h, at)
                dense = None
            elif self.config.shortcut != "none":
                dense = layer
            else:
                h = layer.feed(layer.attend(h, *at))
        return self.norm(h)

    def _run_pair(self, dense: OccultLayer | None, layer: OccultLayer, h: Tensor, at: tuple) -> Tensor:
        """A dense block, if there is one, and a shortcut block."""
        places = {"pos3": h}
        if dense is not None:
            places["pos2"] = dense.attend(h, *at)
            h = dense.feed(places["pos2"])
        places["pos1"] = h
        return layer.join(layer.attend(h, *at), places[self.config.shortcuts["position"]])

    def _turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, 1, S, width], fp32."""
        width = self.config.head_dim
        half = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device)
        angle = positions[..., None].float() * (1.0 / self.config.rope_theta ** (half / width))
        angle = torch.cat((angle, angle), dim=-1)[:, None]
        return angle.cos(), angle.sin()


class OccultForCausalLM(OccultPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: OccultConfig) -> None:
        super().__init__(config)
        self.model = OccultModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As of every causal model of transformers; `labels` are input_ids, -100 where not counted."""
        h = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        h = self.model(h, attention_mask, position_ids, past_key_values)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(h[:, kept, :])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
