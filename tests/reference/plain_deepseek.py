"""DeepSeek-MoE (arXiv 2401.06066) in plain torch under the hub's tensor names, written from the paper and the layout of
DeepSeek-MoE-16B. Loops over heads, tokens and experts; shares no code with the package.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
    "model_type": "deepseek",
    "moe_intermediate_size": 10,
    "moe_layer_freq": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": 131,
}
"""The keys of DeepSeek-MoE-16B's config.json, with a small model's sizes."""


def make(seed: int, **changes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A config and random fp32 weights."""
    config = {**CONFIG, **changes}
    generator = torch.Generator().manual_seed(seed)
    h, heads, kv = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    width = h // heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], h)}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        shapes |= {f"{at}input_layernorm.weight": (h,), f"{at}post_attention_layernorm.weight": (h,)}
        for name, rows, columns in (
            ("q", heads * width, h),
            ("k", kv * width, h),
            ("v", kv * width, h),
            ("o", h, heads * width),
        ):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (rows, columns)
            if config["attention_bias"]:
                shapes[f"{at}self_attn.{name}_proj.bias"] = (rows,)
        if is_dense(config, i):
            mlps = {"mlp.": config["intermediate_size"]}
        else:
            shapes[f"{at}mlp.gate.weight"] = (config["n_routed_experts"], h)
            mlps = {f"mlp.experts.{e}.": config["moe_intermediate_size"] for e in range(config["n_routed_experts"])}
            if config["n_shared_experts"]:
                mlps["mlp.shared_experts."] = config["moe_intermediate_size"] * config["n_shared_experts"]
        for name, f in mlps.items():
            shapes |= {f"{at}{name}gate_proj.weight": (f, h), f"{at}{name}up_proj.weight": (f, h)}
            shapes[f"{at}{name}down_proj.weight"] = (h, f)
    shapes["model.norm.weight"] = (h,)
    shapes["lm_head.weight"] = (config["vocab_size"], h)
    weights = {}
    for name, shape in shapes.items():
        draw = torch.randn(shape, generator=generator) * 0.2
        weights[name] = draw + 1 if "norm" in name else draw
    return config, weights


def save(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Write config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def is_dense(config: dict[str, Any], layer: int) -> bool:
    """Whether a layer has no experts."""
    return layer < config["first_k_dense_replace"] or layer % config["moe_layer_freq"] != 0


def forward(config: dict[str, Any], weights: dict[str, Tensor], ids: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits [B, S, V], the balancing loss that training adds, and the chosen experts of each MoE layer [B, S, K]."""
    logits, losses, chosen = [], [], []
    for sequence in ids:
        one, loss, picks = _sequence(config, weights, sequence)
        logits.append(one)
        losses.append(loss)
        chosen.append(picks)
    return torch.stack(logits), torch.stack(losses).mean(), [torch.stack(layer) for layer in zip(*chosen, strict=True)]


def _sequence(config: dict[str, Any], w: dict[str, Tensor], ids: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    h = w["model.embed_tokens.weight"][ids]
    total, chosen = torch.zeros(()), []
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        h = h + _attention(config, w, at, _norm(h, w[f"{at}input_layernorm.weight"], config))
        x = _norm(h, w[f"{at}post_attention_layernorm.weight"], config)
        if is_dense(config, i):
            h = h + _mlp(w, f"{at}mlp.", x)
            continue
        out, loss, picks = _moe(config, w, f"{at}mlp.", x)
        h, total = h + out, total + loss
        chosen.append(picks)
    return _norm(h, w["model.norm.weight"], config) @ w["lm_head.weight"].T, total, chosen


def _norm(x: Tensor, weight: Tensor, config: dict[str, Any]) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * weight


def _mlp(w: dict[str, Tensor], at: str, x: Tensor) -> Tensor:
    gate, up = x @ w[f"{at}gate_proj.weight"].T, x @ w[f"{at}up_proj.weight"].T
    return (gate * torch.sigmoid(gate) * up) @ w[f"{at}down_proj.weight"].T


def _moe(config: dict[str, Any], w: dict[str, Tensor], at: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    experts, k, length = config["n_routed_experts"], config["num_experts_per_tok"], x.shape[0]
    scores = torch.softmax(x @ w[f"{at}gate.weight"].T, dim=-1)
    rows, counts, picks = [], torch.zeros(experts), []
    for t in range(length):
        row_scores = scores[t].tolist()
        best = sorted(range(experts), key=lambda e: -row_scores[e])[:k]
        picks.append(torch.tensor(best))
        norm = scores[t, best].sum() + 1e-20 if config["norm_topk_prob"] and k > 1 else 1.0
        row = sum(scores[t, e] / norm * _mlp(w, f"{at}experts.{e}.", x[t]) for e in best)
        if config["n_shared_experts"]:
            row = row + _mlp(w, f"{at}shared_experts.", x[t])
        rows.append(row)
        for e in best:
            counts[e] += 1
    frequency = counts * experts / (k * length)
    loss = config["aux_loss_alpha"] * (frequency * scores.mean(0)).sum()
    return torch.stack(rows), loss, torch.stack(picks)


def _attention(config: dict[str, Any], w: dict[str, Tensor], at: str, x: Tensor) -> Tensor:
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    width, length = config["hidden_size"] // heads, x.shape[0]

    def project(name: str, y: Tensor) -> Tensor:
        out = y @ w[f"{at}self_attn.{name}_proj.weight"].T
        bias = w.get(f"{at}self_attn.{name}_proj.bias")
        return out if bias is None else out + bias

    q, k, v = project("q", x), project("k", x), project("v", x)
    out = torch.zeros(length, heads * width)
    causal = torch.ones(length, length).tril().bool()
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        shared = slice(head // (heads // kv) * width, (head // (heads // kv) + 1) * width)
        scores = _rotate(q[:, own], config) @ _rotate(k[:, shared], config).T / width**0.5
        probs = torch.softmax(scores.masked_fill(~causal, float("-inf")), dim=-1)
        out[:, own] = probs @ v[:, shared]
    return project("o", out)


def _rotate(x: Tensor, config: dict[str, Any]) -> Tensor:
    """Dimension j turns with j + width / 2, by position / theta^(2j / width)."""
    length, width = x.shape
    half = width // 2
    angle = torch.arange(length)[:, None] / config["rope_theta"] ** (torch.arange(half)[None] * 2 / width)
    a, b = x[:, :half], x[:, half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), dim=1)
