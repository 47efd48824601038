"""How a checkpoint's model routes, as our own modelling file reads it: settings, and tensors beside the weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from occult_train.checkpoint.placing import recorded
from occult_train.checkpoint.store import Checkpoint
from occult_train.config import Config
from occult_train.errors import ConfigError
from occult_train.models.families.occult import BIAS, GATE, PRUNING
from occult_train.moe.placement import Placement
from occult_train.moe.pruning import PruneConfig
from occult_train.moe.similarity import FILE_NAME, SimilarityTables

FILE = "model-routing.safetensors"


def has_bias(checkpoint: Checkpoint) -> bool:
    """Whether a balancing bias takes part in choosing experts."""
    return any(value != 0 for bias in checkpoint.state.get("expert_bias", {}).values() for value in bias)


def check_pruned(config: Config, checkpoint: Checkpoint) -> None:
    """Raise ConfigError for a checkpoint that was not trained with pruning."""
    if not config.moe.prune.active:
        raise ConfigError(
            f"--pruned: moe.prune.policy={config.moe.prune.policy} in the training of {checkpoint.folder}"
        )


def keys(checkpoint: Checkpoint, config: Config, pruned: bool) -> dict[str, Any]:
    """Keys of config.json."""
    found: dict[str, Any] = {BIAS: has_bias(checkpoint)}
    if pruned:
        prune = config.moe.prune.resolved(config.parallel.expert)
        limits = {str(layer): prune.limit(layer, checkpoint.step) for layer in config.model.moe_layers}
        words = {"policy": prune.policy, "inherit": prune.inherit, "groups": prune.groups}
        found[PRUNING] = {**words, "devices": limits}
    return found


def describe(prune: PruneConfig, checkpoint: Checkpoint, layers: list[int]) -> str:
    """A line on pruned routing. `prune` is resolved."""
    limits = {layer: prune.limit(layer, checkpoint.step) for layer in layers}
    several = ", ".join(f"{m} in layer {layer}" for layer, m in limits.items())
    m = f"{next(iter(limits.values()))}" if len(set(limits.values())) == 1 else several
    return f"each token's experts on at most {m} of {prune.groups} devices (moe.prune.policy={prune.policy})"


def tensors(checkpoint: Checkpoint, config: Config, pruned: bool) -> dict[str, Tensor]:
    """What the gates hold beside their weights, by the hub's names: balancing bias [E] fp32; with pruning the device
    of each expert [E] int32, and for similarity `likeness` [E, E] int32, see `likeness`."""
    found = {}
    biases = checkpoint.state["expert_bias"] if has_bias(checkpoint) else {}
    for layer, bias in biases.items():
        found[f"{GATE.format(i=layer)}.expert_bias"] = torch.tensor(bias, dtype=torch.float32)
    if not pruned:
        return found
    prune, experts = config.moe.prune.resolved(config.parallel.expert), config.model.num_experts
    placements = recorded(checkpoint)
    similar = prune.policy == "similarity"
    tables = SimilarityTables.load(checkpoint.folder / FILE_NAME).tables if similar else {}
    for layer in config.model.moe_layers:
        gate = GATE.format(i=layer)
        slots = torch.tensor((placements.get(layer) or Placement.contiguous(experts)).expert_to_slot)
        found[f"{gate}.device_of_expert"] = (slots // (experts // prune.groups)).to(torch.int32)
        if similar:
            found[f"{gate}.likeness"] = likeness(tables[layer])
    return found


def likeness(similarity_EE: Tensor) -> Tensor:
    """[E, E] int32: in row e the place of each expert when all are put in order of their similarity to expert e, the
    most similar last, and of equals the lower id. It keeps its values in whatever type a model is loaded."""
    order_EE = similarity_EE.sort(dim=1, descending=True, stable=True).indices
    places_E = torch.arange(len(order_EE) - 1, -1, -1, dtype=torch.int32)
    return torch.zeros(order_EE.shape, dtype=torch.int32).scatter_(1, order_EE, places_E.expand_as(order_EE))


def write(found: dict[str, Tensor], output: Path) -> dict[str, str]:
    """Write the tensors into a file of their own. Returns its name by tensor, for the index.

    Raises:
        OSError: the disk does not take it.
    """
    if found:
        import safetensors.torch

        (output / FILE).write_bytes(safetensors.torch.save(found, {"format": "pt"}))
    return dict.fromkeys(found, FILE)
