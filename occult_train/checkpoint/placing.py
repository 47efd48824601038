"""The placement that a checkpoint records: setting it, and whether a run that continues goes on with it.

Tensors in a checkpoint are by expert, so that another placement is nothing but another record.
"""

import re
from pathlib import Path
from typing import Any

from occult_train.checkpoint.store import Checkpoint, change_state, open_checkpoint
from occult_train.moe.layer import MoELayer
from occult_train.moe.placement import Placement, check_placements, from_table, to_table

_ROUTER = re.compile(r"layers\.(\d+)\.moe\.router\.weight")


def apply(checkpoint: Path, placements: dict[int, Placement]) -> None:
    """Record placements in a checkpoint, or the latest of a run; layers not named keep theirs. All at once or not at
    all. A run that continues from it has its experts there: see `moe.placement` in the configuration.

    Raises:
        CheckpointError: missing, damaged, or the disk does not take it.
        PlacementError: of another model.
    """
    opened = open_checkpoint(checkpoint)
    experts = experts_of(opened)
    check_placements(placements, experts, f"checkpoint {opened.folder}")
    before = {layer: Placement.contiguous(count) for layer, count in experts.items()} | recorded(opened)
    change_state(opened, {"placement": to_table(before | placements)})


def experts_of(checkpoint: Checkpoint) -> dict[int, int]:
    """Number of experts by layer, of the layers that have them."""
    found = {_ROUTER.fullmatch(name): entry for name, entry in checkpoint.entries.items()}
    return {int(match[1]): entry.shape[0] for match, entry in found.items() if match}


def recorded(checkpoint: Checkpoint) -> dict[int, Placement]:
    """The placement at the time of saving, or the one applied since; empty where none is recorded."""
    return from_table(checkpoint.state.get("placement", {}))


def given(setting: str, placements: dict[int, Placement]) -> dict[str, Any]:
    """For the state of a checkpoint: what `moe.placement` a run was started with, and what that meant."""
    return {"placement_given": {"setting": setting, "placement": to_table(placements)}}


def place(layers: dict[int, MoELayer], setting: str, placements: dict[int, Placement], checkpoint: Checkpoint) -> str:
    """Set where the experts are in a run that continues a checkpoint, before they are loaded.

    Args: as of `continued`.

    Returns:
        words on it for the user, empty where there was no choice.
    """
    found, chosen = recorded(checkpoint), continued(setting, placements, checkpoint)
    for index, layer in layers.items():
        layer.place(chosen[index])
    if found in ({}, placements):
        return ""
    return ", with its placement" if chosen == found else f", with moe.placement={setting} in place of its own"


def continued(setting: str, placements: dict[int, Placement], checkpoint: Checkpoint) -> dict[int, Placement]:
    """Where the experts are in a run that continues a checkpoint.

    Args:
        setting: `moe.placement`.
        placements: what it means without a checkpoint.

    Returns:
        the checkpoint's placement if the setting is `auto` or the one that its run was last started with, else
        `placements`. Those too if the record is of other layers or experts: such a checkpoint does not load.
    """
    found = recorded(checkpoint)
    known = given(setting, placements)["placement_given"] == checkpoint.state.get("placement_given")
    sizes = {layer: len(p.slot_to_expert) for layer, p in placements.items()}
    fits = {layer: len(p.slot_to_expert) for layer, p in found.items()} == sizes
    return found if fits and (setting == "auto" or known) else placements
