"""Routed experts in host memory, those in use copied to the device (ScMoE, arXiv 2404.05019). For inference alone.

The experts of all layers share places on the device. What a layer's tokens have chosen and is in no place is copied
there, on a stream of its own, over what was used longest ago; as soon as the choice is known, if `ahead`. With
shortcut-connected experts that is before their window's operators are computed, and the copies run beside those. Other
experts are needed at once, and so their copies are waited for. Pinned memory is what torch allocates for it: of each
stack the next power of two.

T tokens, H width, F expert width, E experts a layer, K experts a token.
"""

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from occult_train.errors import UserError
from occult_train.kernels.experts.reference import apply_grouped, experts
from occult_train.kernels.reindex.reference import RowIndex
from occult_train.moe.experts import Experts

if TYPE_CHECKING:
    from occult_train.moe.layer import MoELayer

SETTING = "--expert-budget"


class LeastRecent:
    """Which key is in which of a number of places; a new one takes the place of the one that was used longest ago."""

    def __init__(self, places: int) -> None:
        self.size = places
        self._free = list(range(places))[::-1]
        self._places: OrderedDict[Hashable, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._places)

    def use(self, keys: Sequence[Hashable]) -> tuple[list[int], list[int]]:
        """Places of different keys, at most `size`, and which of the keys (by number) were in none before."""
        if len(keys) > self.size:
            raise ValueError(f"{len(keys)} keys at once, there are {self.size} places")
        for key in keys:
            if key in self._places:
                self._places.move_to_end(key)
        new = [number for number, key in enumerate(keys) if key not in self._places]
        for number in new:
            self._places[keys[number]] = self._free.pop() if self._free else self._places.popitem(last=False)[1]
        for key in keys:
            self._places.move_to_end(key)
        return [self._places[key] for key in keys], new


@dataclass
class Tally:
    """What was asked for."""

    uses: int = 0
    """Experts that a layer's tokens needed, summed over layers and runs of the model."""
    fetched: int = 0
    """Of them, those that were copied to the device."""


class Places:
    """Room for experts on the device, and the copies into it."""

    def __init__(self, first: Experts, total: int, top_k: int, budget: int, device: torch.device) -> None:
        """Room for as many of `total` experts, of the sizes of `first`, as the budget in bytes holds.

        Raises:
            UserError: that is not enough for one token, which needs top_k experts at once.
        """
        weights = (first.w1, first.w2, first.w3)
        self.expert_bytes = sum(weight[0].numel() * weight.element_size() for weight in weights)
        self.budget, self.tally = budget, Tally()
        self.held = LeastRecent(min(budget // self.expert_bytes, total))
        if self.held.size < top_k:
            raise UserError(f"{self._room()}, and a token needs {self._megabytes(top_k)} in a layer")
        self.w1, self.w2, self.w3 = (
            torch.empty((self.held.size, *weight.shape[1:]), dtype=weight.dtype, device=device) for weight in weights
        )
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def nbytes(self) -> int:
        """On the device."""
        return self.held.size * self.expert_bytes

    def bring(self, layer: int, wanted: list[int], store: Experts) -> tuple[list[int], Any]:
        """Places of a layer's experts, and an event behind their copies (None where copies are done).

        Raises:
            UserError: there are more of them than places.
        """
        if len(wanted) > self.held.size:
            raise UserError(f"{self._room()}, and layer {layer} needs {self._megabytes(len(wanted))} for these tokens")
        places, new = self.held.use([(layer, expert) for expert in wanted])
        self.tally.uses += len(wanted)
        self.tally.fetched += len(new)
        copies = [(places[number], wanted[number]) for number in new]
        if self.stream is None:
            self._copy(copies, store)
            return places, None
        # what is computed with a place before comes before it is written
        self.stream.wait_stream(torch.cuda.current_stream(self.w1.device))
        with torch.cuda.stream(self.stream):
            self._copy(copies, store)
            return places, self.stream.record_event()

    def matrices(self, place: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gate [F, H], down [H, F] and up [F, H] of the expert there."""
        return self.w1[place], self.w2[place], self.w3[place]

    def _copy(self, copies: list[tuple[int, int]], store: Experts) -> None:
        for place, expert in copies:
            for target, source in ((self.w1, store.w1), (self.w2, store.w2), (self.w3, store.w3)):
                target[place].copy_(source[expert], non_blocking=True)

    def _room(self) -> str:
        return f"{SETTING}={self.budget / 1e9:g} has room for {self._megabytes(self.held.size)}"

    def _megabytes(self, experts: int) -> str:
        return f"{experts} experts ({experts * self.expert_bytes / 1e6:,.1f} MB)"


@dataclass(frozen=True)
class Fetched:
    """Experts that a layer's tokens have chosen, in the order of their ids."""

    tokens: list[int]
    """Of each."""
    places: list[int]
    event: Any
    entry_X: Tensor
    index: RowIndex
    """As kernels/reindex `expert_rows` gives them."""


class HostExperts:
    """What the experts of one layer compute, in place of kernels/experts."""

    def __init__(self, places: Places, layer: int, store: Experts, ahead: bool) -> None:
        self.places, self.layer, self.store, self.ahead = places, layer, store, ahead
        self.fetched: Fetched | None = None

    def announce(self, slots_TK: Tensor) -> None:
        """These tokens' experts are what will be computed next here: begin to copy. The host waits for the choice."""
        self.fetched = self._fetch(slots_TK) if self.ahead else None

    def __call__(self, rows_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor, *_store: Tensor) -> Tensor:
        """As kernels/experts: [T, H] -> [T, H]."""
        fetched, self.fetched = self.fetched or self._fetch(slots_TK), None
        if fetched.event is not None:
            torch.cuda.current_stream(rows_TH.device).wait_event(fetched.event)
        matrices = [self.places.matrices(place) for place in fetched.places]
        return apply_grouped(rows_TH, weights_TK, fetched.index, fetched.entry_X, fetched.tokens, matrices)

    def _fetch(self, slots_TK: Tensor) -> Fetched:
        flat = slots_TK.reshape(-1).cpu()
        # the host must know the experts; so it sorts their rows too, which takes it less than to launch that
        entry_X = flat.argsort(stable=True)
        row_X = torch.empty_like(entry_X).scatter_(0, entry_X, torch.arange(len(entry_X)))
        maps = torch.stack((entry_X, entry_X // slots_TK.shape[1], row_X))
        maps = maps.to(slots_TK.device, non_blocking=True)  # in front of the experts, not behind them
        used = {slot: count for slot, count in enumerate(flat.bincount().tolist()) if count}
        places, event = self.places.bring(self.layer, list(used), self.store)
        index = RowIndex(maps[1], maps[2].view_as(slots_TK))
        return Fetched(list(used.values()), places, event, maps[0], index)


def usual_budget(layers: "Mapping[int, MoELayer]") -> int:
    """Bytes for twice what a token uses in all layers, and at least one whole layer."""
    first = next(iter(layers.values()))
    expert = sum(weight[0].numel() * weight.element_size() for weight in first.experts.parameters())
    return expert * max(first.num_experts, 2 * first.options.top_k * len(layers))


def offload(layers: "Mapping[int, MoELayer]", device: torch.device, budget: int, ahead: bool = True) -> Places:
    """Keep the experts of layers in (pinned) host memory from now on, and compute with those in places on the device.

    Args:
        layers: by their index in the model, with all experts here. Again for another budget.
        budget: bytes for experts on the device.
        ahead: copy as soon as tokens are routed; else when the experts are computed.

    Raises:
        UserError: the budget is too small for one token.
    """
    for layer in layers.values():
        layer.host, layer.fused, layer.experts.function = None, None, experts
        for weight in layer.experts.parameters():
            there = weight.data.to("cpu")
            weight.data = there.pin_memory() if device.type == "cuda" and not there.is_pinned() else there
    first = next(iter(layers.values()))
    places = Places(first.experts, first.num_experts * len(layers), first.options.top_k, budget, device)
    for index, layer in layers.items():
        layer.host = HostExperts(places, index, layer.experts, ahead)
        layer.experts.function = layer.host
    return places
