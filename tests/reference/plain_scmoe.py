"""Shortcut-connected blocks in plain torch, after the formulas of ScMoE (arXiv 2404.05019), as the tests' yardstick.

Like plain_moe, whose attention, experts and training loop it uses, it imports nothing of the package. For a pair of
layers l (dense) and l+1, with every sub-layer under its own norm:

    a_l = h_{l-1} + Attn_l(h_{l-1});  h_l = a_l + MLP_l(a_l);  a_{l+1} = h_l + Attn_{l+1}(h_l)
    scmoe: h_{l+1} = a_{l+1} + SE(a_{l+1}) + MoE(s), s = h_l (pos1), a_l (pos2), h_{l-1} (pos3)
    dgmoe: h_{l+1} = a_{l+1} + MoE(a_{l+1}) + MoE(a_l), each the best expert; the first takes another than the second

Parameters of layer l+1 beside plain_moe's attention, attention_norm, mlp_norm (of a_{l+1}), router and experts:

    layers.{i}.shortcut_norm.weight             [H]
    layers.{i}.shared_expert.{w1,w2,w3}.weight  unless dgmoe
    layers.{i}.combine_gate.weight              [1, H] of cg1, [2, H] of cg2 (first the shared expert's score)
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from plain_moe import (
    Params,
    PlainConfig,
    PlainOutput,
    Routing,
    attention,
    attention_mask,
    moe,
    rms_norm,
    silu,
    swiglu,
)
from plain_moe import param_shapes as plain_shapes
from torch import Tensor


@dataclass
class PlainScMoE(PlainConfig):
    """Shape of the model."""

    scmoe: Any = None
    """Has block (scmoe or dgmoe), position, every and combine."""

    @property
    def choices_per_token(self) -> int:
        """Assignments of a token to experts in a layer."""
        return 2 if self.scmoe.block == "dgmoe" else self.num_experts_per_tok

    @property
    def moe_layers(self) -> list[int]:
        """Layers with routed experts, ascending."""
        return list(range(self.scmoe.every - 1, self.num_hidden_layers, self.scmoe.every))


def param_shapes(config: PlainScMoE) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter."""
    dense = [i for i in range(config.num_hidden_layers) if i not in config.moe_layers]
    fields = {name: getattr(config, name) for name in PlainConfig.__dataclass_fields__}
    plain = replace(PlainConfig(**fields), dense_layers=dense, shared_expert_intermediate_size=0)
    shapes = plain_shapes(plain)
    h, width = config.hidden_size, config.shared_expert_intermediate_size
    for i in config.moe_layers:
        shapes[f"layers.{i}.shortcut_norm.weight"] = (h,)
        if config.scmoe.block == "scmoe":
            shapes[f"layers.{i}.shared_expert.w1.weight"] = (width, h)
            shapes[f"layers.{i}.shared_expert.w2.weight"] = (h, width)
            shapes[f"layers.{i}.shared_expert.w3.weight"] = (width, h)
        if config.scmoe.combine != "add":
            shapes[f"layers.{i}.combine_gate.weight"] = (1 if config.scmoe.combine == "cg1" else 2, h)
    return shapes


def dense(params: Params, name: str, x: Tensor) -> Tensor:
    """The SwiGLU MLP of that name."""
    return swiglu(x, *(params[f"{name}.{w}.weight"] for w in ("w1", "w2", "w3")))


def routed(params: Params, i: int, config: PlainScMoE, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Routing]:
    """Routed experts alone, of normed x [B, S, H]."""
    alone = replace(config, shared_expert_intermediate_size=0)
    out, routing = moe(params, f"layers.{i}.moe", alone, x.reshape(-1, x.shape[-1]), bias)
    return out.reshape(x.shape), routing


def one_expert(params: Params, i: int, x: Tensor, expert: int) -> Tensor:
    """One token [H] through one expert."""
    w1, w2, w3 = (params[f"layers.{i}.moe.experts.{w}"][expert] for w in ("w1", "w2", "w3"))
    return w2 @ (silu(w1 @ x) * (w3 @ x))


def dual(params: Params, i: int, earlier: Tensor, current: Tensor, bias: Tensor | None) -> tuple[Tensor, Routing]:
    """MoE(earlier) + MoE(current) of normed [B, S, H], token by token, and the choices, first all of the earlier."""
    old, new = earlier.flatten(0, 1), current.flatten(0, 1)
    router = params[f"layers.{i}.moe.router.weight"]
    logits = torch.cat([old, new]) @ router.T
    probs = torch.softmax(logits, dim=-1)
    out, chosen, gap = [], [[], []], math.inf
    for t in range(len(old)):
        taken = -1
        for half, x in enumerate((old[t], new[t])):
            row = probs[half * len(old) + t]
            score = [float(p) + (0.0 if bias is None else float(bias[e])) for e, p in enumerate(row.detach())]
            order = sorted((e for e in range(len(score)) if e != taken), key=lambda e: -score[e])
            if len(order) > 1:
                gap = min(gap, score[order[0]] - score[order[1]])
            taken = order[0]
            chosen[half].append(taken)
            part = row[taken] * one_expert(params, i, x, taken)
            out.append(part) if half == 0 else out.append(out.pop() + part)
    experts = torch.tensor(chosen[0] + chosen[1])[:, None]
    routing = Routing(logits=logits, probs=probs, experts=experts, weights=probs.gather(1, experts), topk_gap=gap)
    return torch.stack(out).reshape(earlier.shape), routing


def combine(params: Params, i: int, config: PlainScMoE, x: Tensor, experts: Tensor) -> Tensor:
    """SE(x) and the experts' output, joined; x is the normed current representation."""
    shared = dense(params, f"layers.{i}.shared_expert", x)
    if config.scmoe.combine == "add":
        return shared + experts
    score = x @ params[f"layers.{i}.combine_gate.weight"].T
    if config.scmoe.combine == "cg1":
        return torch.sigmoid(score[..., 0])[..., None] * shared + experts
    c = torch.exp(score) / torch.exp(score).sum(dim=-1, keepdim=True)
    return c[..., 0][..., None] * shared + c[..., 1][..., None] * experts


def forward(
    params: Params,
    config: PlainScMoE,
    input_ids: Tensor,
    document_ids: Tensor | None = None,
    expert_bias: dict[int, Tensor] | None = None,
) -> PlainOutput:
    """As plain_moe.forward."""
    allowed = attention_mask(input_ids.shape, document_ids)

    def norm(name: str, x: Tensor) -> Tensor:
        return rms_norm(x, params[f"{name}.weight"], config.rms_norm_eps)

    def attend(i: int, x: Tensor) -> Tensor:
        return x + attention(params, f"layers.{i}.attention", config, norm(f"layers.{i}.attention_norm", x), allowed)

    h = params["embed_tokens.weight"][input_ids]
    router = []
    for i in config.moe_layers:
        places = {"pos3": h}
        if config.scmoe.every == 2:
            places["pos2"] = attend(i - 1, h)
            h = places["pos2"] + dense(params, f"layers.{i - 1}.mlp", norm(f"layers.{i - 1}.mlp_norm", places["pos2"]))
        places["pos1"] = h
        a = attend(i, h)
        bias = None if expert_bias is None else expert_bias[i]
        s = norm(f"layers.{i}.shortcut_norm", places[config.scmoe.position])
        x = norm(f"layers.{i}.mlp_norm", a)
        if config.scmoe.block == "dgmoe":
            out, routing = dual(params, i, s, x, bias)
            h = a + out
        else:
            out, routing = routed(params, i, config, s, bias)
            h = a + combine(params, i, config, x, out)
        router.append(routing)
    h = norm("norm", h)
    head = params["embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return PlainOutput(logits=h @ head.T, router=router)
