"""Which expert lives in which slot. Slot s belongs to device s // L; placement changes where, never what."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from occult_train.errors import PlacementError


@dataclass(frozen=True)
class Placement:
    """A permutation of one layer's experts: slot s holds expert slot_to_expert[s]."""

    slot_to_expert: tuple[int, ...]

    def __post_init__(self) -> None:
        if sorted(self.slot_to_expert) != list(range(len(self.slot_to_expert))):
            raise PlacementError(f"slots {list(self.slot_to_expert)} are not a permutation of the experts")

    @classmethod
    def contiguous(cls, experts: int) -> "Placement":
        """Expert e in slot e."""
        return cls(tuple(range(experts)))

    @cached_property
    def is_identity(self) -> bool:
        """Whether every expert's slot has its number."""
        return self.slot_to_expert == tuple(range(len(self.slot_to_expert)))

    @property
    def expert_to_slot(self) -> tuple[int, ...]:
        """The inverse: expert e lives in slot expert_to_slot[e]."""
        inverse = [0] * len(self.slot_to_expert)
        for slot, expert in enumerate(self.slot_to_expert):
            inverse[expert] = slot
        return tuple(inverse)

    def by_device(self, devices: int) -> list[list[int]]:
        """Experts of each device, in slot order."""
        local = len(self.slot_to_expert) // devices
        return [list(self.slot_to_expert[d * local : (d + 1) * local]) for d in range(devices)]


def resolve(setting: str, layers: list[int], experts: int) -> dict[int, Placement]:
    """The placement of every MoE layer from `moe.placement`: `contiguous`, a file as `read` takes it, or `auto`, which
    is contiguous where there is no checkpoint to take it from."""
    if setting in ("auto", "contiguous"):
        return dict.fromkeys(layers, Placement.contiguous(experts))
    return read(Path(setting), layers, experts)


def read(path: Path, layers: list[int], experts: int) -> dict[int, Placement]:
    """Read a placement file: `{"num_experts": E, "slot_to_expert": {"0": [...], ...}}`, one list for each MoE layer.

    Raises:
        PlacementError: missing, damaged, or of another model.
    """
    try:
        if path.is_char_device() or path.is_fifo():  # they may never end
            raise PlacementError(f"moe.placement={path} is no file")
        raw = json.loads(path.read_text())
        found = {int(layer): tuple(slots) for layer, slots in raw["slot_to_expert"].items()}
        named = raw.get("num_experts", experts)
    except OSError as error:
        raise PlacementError(f"moe.placement={path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PlacementError(f"moe.placement={path} is not a placement file: {error!r}") from None
    if sorted(found) != sorted(layers):
        raise PlacementError(f"moe.placement={path} places layers {sorted(found)}, the model has experts in {layers}")
    if named != experts:
        raise PlacementError(f"moe.placement={path} has num_experts={named}, the model has model.num_experts={experts}")
    for layer, slots in found.items():
        wrong = [slot for slot in slots if not isinstance(slot, int) or isinstance(slot, bool)]
        if wrong:
            raise PlacementError(f"moe.placement={path}: layer {layer} holds {wrong[0]}, which is no expert's id")
        if sorted(slots) != list(range(experts)):
            raise PlacementError(
                f"moe.placement={path}: layer {layer} is not a permutation of model.num_experts={experts} experts"
            )
    return {layer: Placement(slots) for layer, slots in found.items()}


def to_json(placements: dict[int, Placement]) -> str:
    """The file that `read` takes."""
    experts = len(next(iter(placements.values())).slot_to_expert)
    return json.dumps({"num_experts": experts, "slot_to_expert": to_table(placements)})


def to_table(placements: dict[int, Placement]) -> dict[str, list[int]]:
    """Plain values for JSON: slot_to_expert by layer."""
    return {str(layer): list(p.slot_to_expert) for layer, p in placements.items()}


def from_table(table: dict[str, list[int]]) -> dict[int, Placement]:
    """What `to_table` made a table of."""
    return {int(layer): Placement(tuple(slots)) for layer, slots in table.items()}


def check_placements(placements: dict[int, Placement], experts: dict[int, int], whose: str) -> None:
    """Raise PlacementError unless each placement is of a layer that has experts, and of that many.

    Args:
        experts: how many, by layer.
        whose: layers they are, in words.
    """
    for index, placement in placements.items():
        if index not in experts:
            raise PlacementError(f"the placement names layer {index}, {whose} has experts in {sorted(experts)}")
        if len(placement.slot_to_expert) != experts[index]:
            raise PlacementError(
                f"the placement of layer {index} is of {len(placement.slot_to_expert)} experts, {whose} has "
                f"{experts[index]} there"
            )
