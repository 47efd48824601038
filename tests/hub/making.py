"""Random Hugging Face models of every family, of odd sizes, and what their own code computes."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plain_deepseek
import torch
import transformers
from torch import Tensor

from occult_train.hub.source import open_model
from occult_train.inference import fill_model
from occult_train.models.gpt import GPT, Runtime

logging.getLogger("transformers").setLevel(logging.ERROR)
COMMON: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,
    "eos_token_id": 1,
    "pad_token_id": None,
    "router_aux_loss_coef": 0.05,
}
QWEN: dict[str, Any] = {"moe_intermediate_size": 20, "num_experts": 12, "intermediate_size": 37}
CONFIGS: dict[str, Callable[[], Any]] = {
    "olmoe": lambda: transformers.OlmoeConfig(**COMMON, intermediate_size=20, num_experts=12),
    "olmoe, clipped, biased, tied, normalised": lambda: transformers.OlmoeConfig(
        **COMMON,
        intermediate_size=21,
        num_experts=8,
        clip_qkv=1.25,
        attention_bias=True,
        tie_word_embeddings=True,
        norm_topk_prob=True,
    ),
    "mixtral": lambda: transformers.MixtralConfig(**COMMON, intermediate_size=20, num_local_experts=12, head_dim=10),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **COMMON, **QWEN, shared_expert_intermediate_size=29, mlp_only_layers=[1]
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **COMMON,
        **QWEN,
        head_dim=12,
        norm_topk_prob=True,
        decoder_sparse_step=2,
        rope_parameters={"rope_theta": 5e5, "rope_type": "default"},
    ),
}
DEEPSEEKS: dict[str, dict[str, Any]] = {
    "deepseek": {"n_routed_experts": 12, "aux_loss_alpha": 0.05},
    "deepseek, biased, every second layer": {
        **{"attention_bias": True, "moe_layer_freq": 2, "num_hidden_layers": 5, "norm_topk_prob": True},
        **{"n_shared_experts": 1, "aux_loss_alpha": 0.02},
    },
    "deepseek, one expert a token": {"num_experts_per_tok": 1, "norm_topk_prob": True, "aux_loss_alpha": 0.05},
    "deepseek, nothing shared": {"n_shared_experts": None, "num_key_value_heads": 4, "first_k_dense_replace": 0},
}
NAMES = [*CONFIGS, *DEEPSEEKS]
MAIN = ["olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek"]


@dataclass(frozen=True)
class Theirs:
    """A model of a family, and its own code."""

    folder: Path
    vocab_size: int
    logits: Callable[[Tensor], Tensor]
    """Of token ids [B, S]."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """Of ids and labels [B, S], which are not shifted: cross-entropy and the family's balancing loss."""
    weights: dict[str, Tensor]
    """By the names that its own code has for them in memory; gradients accumulate there."""
    saved: dict[str, Tensor]
    """By the names of the hub."""


def make(name: str, folder: Path, dtype: torch.dtype = torch.float32, **saving: Any) -> Theirs:
    """Make a model, and save it as its own code does."""
    if name in DEEPSEEKS:
        return _make_deepseek(name, folder, dtype)
    torch.manual_seed(NAMES.index(name))
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), experts_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:  # norms are ones and biases zeros: that would hide what is mixed up
                parameter.add_(0.1 * torch.randn_like(parameter))
            parameter.copy_(parameter.to(dtype))
    model.to(dtype).save_pretrained(folder, **saving)
    model.float()

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        return model(ids, labels=ids, shift_labels=labels, output_router_logits=True).loss

    weights = dict(model.named_parameters())
    return Theirs(folder, 257, lambda ids: model(ids).logits, loss, weights, read_all(folder))


def _make_deepseek(name: str, folder: Path, dtype: torch.dtype) -> Theirs:
    config, weights = plain_deepseek.make(NAMES.index(name), **DEEPSEEKS[name])
    saved = {key: weight.to(dtype) for key, weight in weights.items()}
    plain_deepseek.save(folder, config, saved)
    weights = {key: weight.float().requires_grad_() for key, weight in saved.items()}

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        logits, balance, _ = plain_deepseek.forward(config, weights, ids)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()) + balance

    def logits(ids: Tensor) -> Tensor:
        return plain_deepseek.forward(config, weights, ids)[0]

    return Theirs(folder, config["vocab_size"], logits, loss, weights, saved)


def read_all(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's files, as the safetensors library reads them."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def ours(folder: Path, runtime: Runtime | None = None) -> GPT:
    """Our model with a folder's weights."""
    model = open_model(folder)
    filled = fill_model(model.config.model, model)
    if runtime is None:
        return filled
    wired = GPT(model.config.model, runtime)
    wired.load_state_dict(filled.state_dict())
    return wired


def difference(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖/‖expected‖"""
    return float((got - expected).norm() / expected.norm())


def add_tokenizer(folder: Path, begins: bool = False) -> None:
    """A byte-level tokenizer of 257 ids, as the hub's models have them, with a chat template.

    Args:
        begins: texts begin with its one special token, as Mixtral's do.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    tokenizer.add_special_tokens([end])
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{end} $A", special_tokens=[(end, 256)])
        config |= {"add_bos_token": True, "bos_token": end}
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


def words() -> Any:
    """A tokenizer of 290 ids."""
    from occult_train.data.sentencepiece_training import train_sentencepiece

    return train_sentencepiece(["the cat sat on the mat and saw seven dogs run home\n" * 3], 290)
