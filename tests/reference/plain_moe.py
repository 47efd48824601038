"""A mixture-of-experts GPT and its training loop in plain torch, on one process, as the tests' yardstick.

It imports nothing of the package and follows the formulas, not the fast way to compute them: parameters are a flat dict
of tensors, experts are a Python loop, and data-parallel ranks and accumulation steps are nested lists. Meant for small
models in float64 (or float32).

Names and shapes of the parameters, weights being [out, in]:

    embed_tokens.weight                                  [V, H]
    layers.{i}.attention_norm.weight                     [H]
    layers.{i}.attention.{q,k,v,o}_proj.weight
    layers.{i}.attention.{q,k}_norm.weight               unless qk_norm is none
    layers.{i}.mlp_norm.weight                           [H]
    layers.{i}.moe.router.weight                         [E, H]
    layers.{i}.moe.experts.{w1,w3}                       [E, F, H]
    layers.{i}.moe.experts.w2                            [E, H, F]
    layers.{i}.moe.shared_expert.{w1,w2,w3}.weight       if there is a shared expert
    layers.{i}.moe.shared_expert_gate.weight             [1, H]
    layers.{i}.mlp.{w1,w2,w3}.weight                     of a dense layer, in place of moe
    norm.weight                                          [H]
    lm_head.weight                                       [V, H], absent if tied
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypedDict

import torch
from torch import Tensor

Params = dict[str, Tensor]
MicroBatch = tuple[Tensor, Tensor]
"""(input_ids [B, S], labels [B, S]); labels are the tokens to predict at each position, already shifted."""
Shapes = dict[str, tuple[int, ...]]
Batches = list[list[list[MicroBatch]]]
"""Indexed by optimizer step, then accumulation step, then data-parallel rank."""


@dataclass
class PlainConfig:
    """Shape of the model."""

    vocab_size: int = 0
    hidden_size: int = 2048
    intermediate_size: int = 1024
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int = 0
    """0 means as many as attention heads."""
    head_dim: int = 0
    """0 means hidden_size / num_attention_heads."""
    qk_norm: str = "full"
    """none, full (one RMSNorm over all heads together, before RoPE) or head (the same RMSNorm on each head)."""
    num_experts: int = 64
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False
    dense_layers: list[int] = field(default_factory=list)
    dense_intermediate_size: int = 0
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    prune: Callable[[list[float]], list[int]] | None = None
    """A token's experts by its scores, if they are not the K best."""

    @property
    def kv_heads(self) -> int:
        """Key/value heads with the default resolved."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def dim_per_head(self) -> int:
        """Width of one head with the default resolved."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def choices_per_token(self) -> int:
        """Assignments of a token to experts in a layer."""
        return self.num_experts_per_tok

    @property
    def moe_layers(self) -> list[int]:
        """Layers with routed experts, ascending."""
        return [i for i in range(self.num_hidden_layers) if i not in self.dense_layers]


class Routing(TypedDict):
    """What one MoE layer's router did with its T tokens."""

    logits: Tensor
    """[T, E]"""
    probs: Tensor
    """[T, E], the softmax over all experts."""
    experts: Tensor
    """[T, K], chosen experts, best first."""
    weights: Tensor
    """[T, K], factors of the chosen experts' outputs."""
    topk_gap: float
    """Least difference between the K-th and the (K+1)-th selection score of a token; inf if every expert is chosen."""


@dataclass
class PlainOutput:
    """Result of `forward`."""

    logits: Tensor
    """[B, S, V]"""
    router: list[Routing]
    """One for each of `config.moe_layers`, in that order."""


def param_shapes(config: PlainConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the order of the forward pass."""
    c, h, d = config, config.hidden_size, config.dim_per_head
    q, kv = c.num_attention_heads * d, c.kv_heads * d
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (c.vocab_size, h)}
    for i in range(c.num_hidden_layers):
        attention = f"layers.{i}.attention"
        shapes[f"layers.{i}.attention_norm.weight"] = (h,)
        shapes[f"{attention}.q_proj.weight"] = (q, h)
        shapes[f"{attention}.k_proj.weight"] = (kv, h)
        shapes[f"{attention}.v_proj.weight"] = (kv, h)
        shapes[f"{attention}.o_proj.weight"] = (h, q)
        if c.qk_norm != "none":
            shapes[f"{attention}.q_norm.weight"] = (q if c.qk_norm == "full" else d,)
            shapes[f"{attention}.k_norm.weight"] = (kv if c.qk_norm == "full" else d,)
        shapes[f"layers.{i}.mlp_norm.weight"] = (h,)
        if i in c.dense_layers:
            shapes.update(_swiglu_shapes(f"layers.{i}.mlp", h, c.dense_intermediate_size))
            continue
        e, f = c.num_experts, c.intermediate_size
        shapes[f"layers.{i}.moe.router.weight"] = (e, h)
        shapes[f"layers.{i}.moe.experts.w1"] = (e, f, h)
        shapes[f"layers.{i}.moe.experts.w2"] = (e, h, f)
        shapes[f"layers.{i}.moe.experts.w3"] = (e, f, h)
        if c.shared_expert_intermediate_size:
            shapes.update(_swiglu_shapes(f"layers.{i}.moe.shared_expert", h, c.shared_expert_intermediate_size))
            if c.shared_expert_gate:
                shapes[f"layers.{i}.moe.shared_expert_gate.weight"] = (1, h)
    shapes["norm.weight"] = (h,)
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, h)
    return shapes


def _swiglu_shapes(name: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.w1.weight": (inner, hidden),
        f"{name}.w2.weight": (hidden, inner),
        f"{name}.w3.weight": (inner, hidden),
    }


def init_params(
    config: PlainConfig, seed: int, dtype: torch.dtype = torch.float64, shapes: Shapes | None = None
) -> Params:
    """Normal weights of standard deviation `initializer_range`; norms' weights are spread likewise, around 1.
    `shapes` in place of `param_shapes` are those of another model.

    Drawn in float64 and rounded to `dtype`, so that every dtype gets the same model.
    """
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for name, shape in (shapes or param_shapes(config)).items():
        value = config.initializer_range * torch.randn(shape, generator=generator, dtype=torch.float64)
        params[name] = (1 + value if "norm" in name else value).to(dtype)
    return params


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale the last dimension to a root mean square of 1, then by `weight`."""
    return weight * x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps)


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    return x * torch.sigmoid(x)


def swiglu(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """w2 (silu(w1 x) * w3 x)."""
    return (silu(x @ w1.T) * (x @ w3.T)) @ w2.T


def rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotate [B, heads, S, D] by its positions [B, S]; dimension j pairs with j + D/2.

    Angles are computed in float64 whatever the dtype of x.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions[:, None, :, None].to(torch.float64) * frequencies
    cos, sin = torch.cos(angles).to(x.dtype), torch.sin(angles).to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention_mask(shape: torch.Size, document_ids: Tensor | None) -> Tensor:
    """[B, S, S], true where a position (second index) may look at another (third): earlier, in the same document."""
    batch, length = shape
    index = torch.arange(length)
    allowed = (index[:, None] >= index[None, :]).expand(batch, length, length)
    if document_ids is not None:
        allowed = allowed & (document_ids[:, :, None] == document_ids[:, None, :])
    return allowed


def positions_in_document(allowed: Tensor) -> Tensor:
    """[B, S], how many tokens of its document come before each; attention scores depend on differences only."""
    return allowed.sum(dim=-1) - 1


def attention(params: Params, name: str, config: PlainConfig, x: Tensor, allowed: Tensor) -> Tensor:
    """Causal self-attention of [B, S, H]."""
    batch, length, _ = x.shape
    dim, heads, kv_heads = config.dim_per_head, config.num_attention_heads, config.kv_heads
    q = x @ params[f"{name}.q_proj.weight"].T
    k = x @ params[f"{name}.k_proj.weight"].T
    v = x @ params[f"{name}.v_proj.weight"].T
    if config.qk_norm == "full":
        q = rms_norm(q, params[f"{name}.q_norm.weight"], config.rms_norm_eps)
        k = rms_norm(k, params[f"{name}.k_norm.weight"], config.rms_norm_eps)
    q = q.reshape(batch, length, heads, dim).transpose(1, 2)
    k = k.reshape(batch, length, kv_heads, dim).transpose(1, 2)
    v = v.reshape(batch, length, kv_heads, dim).transpose(1, 2)
    if config.qk_norm == "head":
        q = rms_norm(q, params[f"{name}.q_norm.weight"], config.rms_norm_eps)
        k = rms_norm(k, params[f"{name}.k_norm.weight"], config.rms_norm_eps)

    positions = positions_in_document(allowed)
    q, k = rope(q, positions, config.rope_theta), rope(k, positions, config.rope_theta)
    k = k.repeat_interleave(heads // kv_heads, dim=1)
    v = v.repeat_interleave(heads // kv_heads, dim=1)

    scores = q @ k.transpose(2, 3) / math.sqrt(dim)
    scores = scores.masked_fill(~allowed[:, None], -math.inf)
    out = torch.softmax(scores, dim=-1) @ v
    return out.transpose(1, 2).reshape(batch, length, heads * dim) @ params[f"{name}.o_proj.weight"].T


def route(logits: Tensor, config: PlainConfig, bias: Tensor | None = None) -> Routing:
    """Choose experts for tokens with router logits [T, E]; the bias [E] moves the choice only, not the weights."""
    k = config.num_experts_per_tok
    probs = torch.softmax(logits, dim=-1)
    scores = probs.detach() if bias is None else probs.detach() + bias.to(probs.dtype)
    ordered, order = torch.sort(scores, dim=-1, descending=True, stable=True)
    experts = order[:, :k]
    gap = math.inf if k == config.num_experts else float((ordered[:, k - 1] - ordered[:, k]).min())
    if config.prune is not None:
        experts = torch.tensor([config.prune(row) for row in scores.tolist()])
        gap = float((ordered[:, :-1] - ordered[:, 1:]).min())  # it hangs on the order of all
    weights = probs.gather(1, experts)
    if config.norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routing(logits=logits, probs=probs, experts=experts, weights=weights, topk_gap=gap)


def moe(params: Params, name: str, config: PlainConfig, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Routing]:
    """The mixture of experts on tokens [T, H]."""
    routing = route(x @ params[f"{name}.router.weight"].T, config, bias)
    w1, w2, w3 = (params[f"{name}.experts.{w}"] for w in ("w1", "w2", "w3"))
    out = torch.zeros_like(x)
    for expert in range(config.num_experts):
        chosen = routing["experts"] == expert  # [T, K], true at most once a row
        tokens = chosen.any(dim=1)
        factor = (routing["weights"] * chosen).sum(dim=1)[tokens]
        part = torch.zeros_like(x)
        part[tokens] = factor[:, None] * swiglu(x[tokens], w1[expert], w2[expert], w3[expert])
        out = out + part
    if config.shared_expert_intermediate_size:
        shared = swiglu(x, *(params[f"{name}.shared_expert.{w}.weight"] for w in ("w1", "w2", "w3")))
        if config.shared_expert_gate:
            shared = shared * torch.sigmoid(x @ params[f"{name}.shared_expert_gate.weight"].T)
        out = out + shared
    return out, routing


def forward(
    params: Params,
    config: PlainConfig,
    input_ids: Tensor,
    document_ids: Tensor | None = None,
    expert_bias: dict[int, Tensor] | None = None,
) -> PlainOutput:
    """Run the model on [B, S] tokens.

    `document_ids` [B, S] gives every document of a row its own number: tokens attend inside their document, and
    positions start at 0 in each. `expert_bias` maps a layer's index to the bias [E] on its selection scores.
    """
    allowed = attention_mask(input_ids.shape, document_ids)
    eps = config.rms_norm_eps
    h = params["embed_tokens.weight"][input_ids]
    router = []
    for i in range(config.num_hidden_layers):
        x = rms_norm(h, params[f"layers.{i}.attention_norm.weight"], eps)
        h = h + attention(params, f"layers.{i}.attention", config, x, allowed)
        x = rms_norm(h, params[f"layers.{i}.mlp_norm.weight"], eps)
        if i in config.dense_layers:
            h = h + swiglu(x, *(params[f"layers.{i}.mlp.{w}.weight"] for w in ("w1", "w2", "w3")))
        else:
            bias = None if expert_bias is None else expert_bias[i]
            out, routing = moe(params, f"layers.{i}.moe", config, x.reshape(-1, config.hidden_size), bias)
            h = h + out.reshape(h.shape)
            router.append(routing)
    h = rms_norm(h, params["norm.weight"], eps)
    head = params["embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return PlainOutput(logits=h @ head.T, router=router)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over tokens of -log softmax(logits)[label]; logits [..., V], labels [...]."""
    log_probs = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    return -log_probs.gather(-1, labels[..., None]).mean()


def expert_counts(experts: Tensor, num_experts: int) -> Tensor:
    """[E], how often each expert occurs among the chosen ones [T, K]."""
    return torch.stack([(experts == e).sum() for e in range(num_experts)])


def load_balancing_loss(counts: Tensor, probs: Tensor, total_tokens: int, k: int) -> Tensor:
    """One layer's E * sum over experts of f * P; 1 when balanced.

    f is an expert's share of the total_tokens * k assignments counted in `counts` [E], P its mean probability over the
    tokens of `probs` [T, E]. The counts may come from more tokens than those T.
    """
    fraction = counts.to(probs.dtype) / (total_tokens * k)
    return probs.shape[1] * (fraction * probs.mean(dim=0)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """One layer's mean over tokens of the squared logsumexp of the router logits [T, E]."""
    return (torch.logsumexp(logits, dim=-1) ** 2).mean()


def bias_update(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """Raise the bias of experts below the mean count by `rate`, lower that of experts above it."""
    load = counts.to(torch.float64)
    return bias + rate * torch.sign(load.mean() - load).to(bias.dtype)


def clip_scale(grads: Params, clip: float) -> tuple[float, float]:
    """Global L2 norm, and the factor that brings it to at most `clip` (0 means no clipping)."""
    norm = math.sqrt(sum(float((g.to(torch.float64) ** 2).sum()) for g in grads.values()))
    return norm, min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0


def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    t: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The t-th AdamW step (t counts from 1); returns the new parameter and moments."""
    beta1, beta2 = betas
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    denom = torch.sqrt(exp_avg_sq) / math.sqrt(1 - beta2**t) + eps
    param = param * (1 - lr * weight_decay) - lr / (1 - beta1**t) * exp_avg / denom
    return param, exp_avg, exp_avg_sq


@dataclass
class TrainRecord:
    """What `train` did; lists are indexed by optimizer step."""

    losses: list[float] = field(default_factory=list)
    """Cross-entropy, mean over the step's micro-batches."""
    aux_losses: list[float] = field(default_factory=list)
    """Load balancing loss before its coefficient, likewise; reported whether or not it is trained on."""
    z_losses: list[float] = field(default_factory=list)
    grads: list[Params] = field(default_factory=list)
    """Before clipping."""
    grad_norms: list[float] = field(default_factory=list)
    """Before clipping."""
    params: list[Params] = field(default_factory=list)
    """After the step."""
    counts: list[dict[int, Tensor]] = field(default_factory=list)
    """Layer to [E] assignments over the global batch."""
    expert_bias: list[dict[int, Tensor]] = field(default_factory=list)
    """Layer to [E] bias after the step; all 0 unless balance is bias."""
    exp_avg: Params = field(default_factory=dict)
    """Adam's first moment at the end."""
    exp_avg_sq: Params = field(default_factory=dict)
    """Adam's second moment at the end."""
    min_topk_gap: float = math.inf
    """Least `topk_gap` of any layer in any forward pass."""


def mean(values: list[Tensor]) -> Tensor:
    """Mean of equally shaped tensors."""
    return torch.stack(values).mean(dim=0)


def step_gradient(
    config: PlainConfig,
    params: Params,
    batch: list[list[MicroBatch]],
    bias: dict[int, Tensor],
    record: TrainRecord,
    *,
    aux_coef: float,
    z_coef: float,
    aux_scope: str,
    run: Callable[..., PlainOutput],
) -> Params:
    """Gradient of one optimizer step, `batch` being accumulation steps of ranks; appends losses and counts."""
    e, k = config.num_experts, config.choices_per_token
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    grads = {name: torch.zeros_like(value) for name, value in params.items()}
    micro_batches = sum(len(ranks) for ranks in batch)
    ce_sum, aux_sum, z_sum = 0.0, 0.0, 0.0
    # Over all ranks and the accumulation steps so far.
    seen_counts = {i: torch.zeros(e, dtype=torch.int64) for i in config.moe_layers}
    seen_tokens = 0

    for ranks in batch:
        outputs = [run(leaves, config, input_ids, expert_bias=bias) for input_ids, _ in ranks]
        for (input_ids, _), output in zip(ranks, outputs, strict=True):
            seen_tokens += input_ids.numel()
            for i, routing in zip(config.moe_layers, output.router, strict=True):
                seen_counts[i] = seen_counts[i] + expert_counts(routing["experts"], e)
                record.min_topk_gap = min(record.min_topk_gap, routing["topk_gap"])

        for (input_ids, labels), output in zip(ranks, outputs, strict=True):
            aux_layers, z_layers = [], []
            for i, routing in zip(config.moe_layers, output.router, strict=True):
                if aux_scope == "global_batch":
                    counts, tokens = seen_counts[i], seen_tokens
                else:
                    counts, tokens = expert_counts(routing["experts"], e), input_ids.numel()
                aux_layers.append(load_balancing_loss(counts, routing["probs"], tokens, k))
                z_layers.append(z_loss(routing["logits"]))
            ce, aux, z = cross_entropy(output.logits, labels), mean(aux_layers), mean(z_layers)
            loss = ce + aux_coef * aux + z_coef * z
            for name, grad in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
                grads[name] = grads[name] + grad / micro_batches
            ce_sum, aux_sum, z_sum = ce_sum + ce.item(), aux_sum + aux.item(), z_sum + z.item()

    record.losses.append(ce_sum / micro_batches)
    record.aux_losses.append(aux_sum / micro_batches)
    record.z_losses.append(z_sum / micro_batches)
    record.counts.append(seen_counts)
    return grads


def train(
    config: PlainConfig,
    params: Params,
    batches: Batches,
    *,
    lr: float | Callable[[int], float],
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    aux_coef: float = 0.01,
    z_coef: float = 0.001,
    balance: str = "aux_loss",
    aux_scope: str = "micro_batch",
    bias_rate: float = 0.001,
    decay: Callable[[str], bool] = lambda name: True,
    run: Callable[..., PlainOutput] = forward,
) -> TrainRecord:
    """Train from `params` (left as they are), one optimizer step for each of `batches`.

    The gradient is the mean over accumulation steps and ranks of the micro-batches' gradients of
    ce + aux_coef * aux + z_coef * z, where aux and z are means over the MoE layers; aux counts only if `balance` is
    aux_loss, z always. With `aux_scope` global_batch, the experts' shares in aux are those over all ranks and over the
    accumulation steps of this optimizer step up to the present one; the mean probabilities stay the micro-batch's own.
    `balance` bias updates each layer's bias after a step by the counts over the whole step. `lr` may be a function of
    the step, counted from 0. `decay` says by name which parameters decay.
    `run` is the model's forward.
    """
    if balance not in ("aux_loss", "bias", "none") or aux_scope not in ("micro_batch", "global_batch"):
        raise ValueError(f"balance={balance}, aux_scope={aux_scope}")
    record = TrainRecord()
    params = {name: value.detach().clone() for name, value in params.items()}
    bias = {i: torch.zeros(config.num_experts, dtype=torch.float64) for i in config.moe_layers}
    exp_avg = {name: torch.zeros_like(value) for name, value in params.items()}
    exp_avg_sq = {name: torch.zeros_like(value) for name, value in params.items()}

    for step, batch in enumerate(batches):
        grads = step_gradient(
            config,
            params,
            batch,
            bias,
            record,
            aux_coef=aux_coef if balance == "aux_loss" else 0.0,
            z_coef=z_coef,
            aux_scope=aux_scope,
            run=run,
        )
        norm, scale = clip_scale(grads, clip)
        updated = {}
        for name, value in params.items():
            updated[name], exp_avg[name], exp_avg_sq[name] = adamw(
                value,
                grads[name] * scale,
                exp_avg[name],
                exp_avg_sq[name],
                step + 1,
                lr=lr(step) if callable(lr) else lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay if decay(name) else 0.0,
            )
        params = updated
        if balance == "bias":
            bias = {i: bias_update(bias[i], record.counts[-1][i], bias_rate) for i in config.moe_layers}
        record.grads.append(grads)
        record.grad_norms.append(norm)
        record.params.append(params)
        record.expert_bias.append(bias)

    record.exp_avg, record.exp_avg_sq = exp_avg, exp_avg_sq
    return record
