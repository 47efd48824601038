"""Moving experts between the ranks of a live engine: weights, fp32 masters and both moments, bit for bit.

A stack of experts [L, ...] lies flattened on its ranks, in runs that ZeRO cuts without regard to experts. Each kind of
value of one parameter at a time goes from the runs that hold it to the runs that shall, in one all-to-all of bytes:
nothing is gathered, and beside the engine there is room for what one rank sends and receives of one kind of one
parameter. n elements an expert, E experts, L of them on a device.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from occult_train.moe.placement import Placement, check_placements
from occult_train.parallel import zero
from occult_train.parallel.zero import Held

Run = tuple[int, int]
"""First and last + 1 element of a flattened stack that a rank holds."""


@dataclass(frozen=True)
class Moved:
    """What a move did."""

    experts: int
    """Experts that changed their device, over all layers; each lives on world / EP ranks."""
    nbytes: int
    """Bytes that all ranks sent to others."""
    seconds: float


@dataclass(frozen=True)
class Piece:
    """Elements that go from one rank's run to another's; the offsets are within the runs."""

    source: int
    source_at: int
    target_at: int
    length: int


@dataclass(frozen=True)
class Layout:
    """Where one kind of one parameter lies before and after a move."""

    runs: tuple[Run, ...]
    """By rank. Device d's ranks are d, d + D, ..., and hold the same stack: in shares, or each the whole."""
    devices: int
    size: int
    """n."""

    def holder(self, device: int, element: int, preferred: int) -> int:
        """The rank of a device that holds an element; `preferred` if it does."""
        start, end = self.runs[preferred]
        if preferred % self.devices == device and start <= element < end:
            return preferred
        ranks = range(device, len(self.runs), self.devices)
        held = [rank for rank in ranks if self.runs[rank][0] < self.runs[rank][1]]
        return held[bisect_right([self.runs[rank][0] for rank in held], element) - 1]

    def pieces(self, target: int, old: Placement, new: Placement) -> Iterator[Piece]:
        """What has to come to a rank, in the order of its run."""
        local = len(new.slot_to_expert) // self.devices
        device, replica = target % self.devices, target // self.devices
        begin, end = self.runs[target]
        for i in range(begin // self.size, -(-end // self.size)):
            slot = device * local + i
            source = old.expert_to_slot[new.slot_to_expert[slot]]
            if source == slot:
                continue
            home, shift = divmod(source, local)
            shift = (shift - i) * self.size  # from an element here to the same one there
            element, stop = max(begin, i * self.size), min(end, (i + 1) * self.size)
            while element < stop:
                rank = self.holder(home, element + shift, replica * self.devices + home)
                start, last = self.runs[rank]
                length = min(stop, last - shift) - element
                yield Piece(rank, element + shift - start, element - begin, length)
                element += length


@torch.no_grad()
def move(engine: Any, placements: dict[int, Placement]) -> Moved:
    """Bring every expert to where `placements` has it. Collective over all ranks; between optimizer steps alone.

    Training goes on as if nothing had happened but the order of sums: masters, moments and weights keep their bits,
    and the balancing bias, which is by expert, is not concerned.

    Args:
        engine: DeepSpeed's, around a GPT, at any ZeRO stage.
        placements: by layer; layers not named stay as they are.

    Raises:
        PlacementError: of other layers or another number of experts; nothing was moved.
        RuntimeError: in the middle of an accumulation, or the ranks do not ask for the same.
    """
    started = perf_counter()
    layers = engine.module.moe_layers()
    check_placements(placements, {i: layer.num_experts for i, layer in layers.items()}, "the model")
    if not zero.between_steps(engine):
        raise RuntimeError("experts cannot move while gradients are being accumulated")
    changed = {i: p for i, p in placements.items() if p != layers[i].placement}
    _check_agreement(changed)
    sent, experts = 0, 0
    for index, placement in sorted(changed.items()):
        layer = layers[index]
        for parameter in layer.experts.parameters():
            sent += _move_parameter(engine, parameter, layer, placement)
        experts += _travellers(layer.placement, placement, layer.ep_size)
        layer.place(placement)
    total = torch.tensor([sent], device=engine.device)
    dist.all_reduce(total)
    return Moved(experts, int(total), perf_counter() - started)


def _check_agreement(placements: dict[int, Placement]) -> None:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, placements)
    if any(other != placements for other in everyone):
        raise RuntimeError("the ranks were given different placements to move experts to")


def _travellers(old: Placement, new: Placement, devices: int) -> int:
    local = len(new.slot_to_expert) // devices
    homes = zip(old.expert_to_slot, new.expert_to_slot, strict=True)
    return sum(before // local != after // local for before, after in homes)


def _move_parameter(engine: Any, parameter: torch.nn.Parameter, layer: Any, new: Placement) -> int:
    """Move all kinds of values of one stack; returns the bytes that this rank sent to others."""
    held = zero.held(engine, parameter)
    size = torch.Size(zero.full_shape(parameter)[1:]).numel()
    own = {kind: (h.start, h.start + h.values.numel()) for kind, h in held.items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    sent = 0
    for kind in sorted(held):
        layout = Layout(tuple(runs[kind] for runs in everyone), layer.ep_size, size)
        sent += _exchange(held[kind], layout, layer.placement, new)
    return sent


def _exchange(held: Held, layout: Layout, old: Placement, new: Placement) -> int:
    """Move one kind of values; returns the bytes that this rank sent to others."""
    rank, ranks = dist.get_rank(), range(dist.get_world_size())
    leaving = {r: [p for p in layout.pieces(r, old, new) if p.source == rank] for r in ranks}
    arriving = list(layout.pieces(rank, old, new))
    coming = {r: [p for p in arriving if p.source == r] for r in ranks}
    values = held.values
    outbox = torch.cat([values[:0], *(values[p.source_at :][: p.length] for r in ranks for p in leaving[r])])
    inbox = values.new_empty(sum(p.length for p in arriving))
    sizes = [[sum(p.length for p in part[r]) * values.element_size() for r in ranks] for part in (coming, leaving)]
    dist.all_to_all_single(_bytes(inbox), _bytes(outbox), *sizes)
    at = 0
    for piece in (p for r in ranks for p in coming[r]):
        values[piece.target_at :][: piece.length] = inbox[at : at + piece.length]
        at += piece.length
    return sum(sizes[1]) - sizes[1][rank]


def _bytes(values: Tensor) -> Tensor:
    return values.view(torch.uint8)
