"""Initial weights: a function of the seed, a parameter's name and an expert's id alone."""

import hashlib

import torch
from torch import Tensor

from occult_train.models.gpt import GPT


@torch.no_grad()
def init_weights(model: GPT, seed: int) -> None:
    """Draw every matrix from N(0, initializer_range); norms stay one, biases are zero.

    The result is the same logical model whatever the number of ranks, expert-parallel size and placement.
    """
    std = model.config.initializer_range
    stacks = {
        f"layers.{i}.moe.experts.{name}": layer.expert_placement_descriptor["ranks"][layer.ep_rank]["experts"]
        for i, layer in model.moe_layers().items()
        for name in ("w1", "w2", "w3")
    }
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            if name.endswith(".bias"):
                parameter.zero_()
            continue
        if name in stacks:
            for weight, expert in zip(parameter, stacks[name], strict=True):
                draw(weight, std, f"{seed}/{name}/{expert}")
        else:
            draw(parameter, std, f"{seed}/{name}")


def draw(weight: Tensor, std: float, key: str) -> None:
    """Fill a weight from N(0, std); the key, `seed/name` or `seed/name/expert`, decides the numbers."""
    generator = torch.Generator(weight.device)
    generator.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1)
    weight.normal_(0.0, std, generator=generator)
