"""Counting the routing of a whole model, on every rank, and adding the ranks up."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from occult_train.moe.collaboration import LayerStatistics, RoutingCounter
from occult_train.moe.layer import MoELayer
from occult_train.moe.sampling import pick, shares
from occult_train.moe.similarity import LogitProducts
from occult_train.moe.statistics import RoutingStatistics

DEFAULT_SAMPLE = 100_000


class RoutingCollector:
    """A counter for each MoE layer, attached while `counting`.

    Args:
        layers: by index.
        sample: whole choices to keep of each layer, over all ranks.
        seed: of the sample.
        device: of the layers.
        similarity: accumulate inner products of router logits as well.
    """

    def __init__(
        self, layers: dict[int, MoELayer], sample: int, seed: int, device: torch.device, similarity: bool = False
    ) -> None:
        self.layers, self.sample, self.seed, self.device = layers, sample, seed, device
        self.rank: int = dist.get_rank() if dist.is_initialized() else 0
        self.ranks: int = dist.get_world_size() if dist.is_initialized() else 1
        self.counters = {
            index: RoutingCounter(layer.options.experts, layer.options.top_k, sample, (seed, self.rank))
            for index, layer in layers.items()
        }
        self.products = {i: LogitProducts(layer.options.experts) for i, layer in layers.items()} if similarity else {}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what the layers route in the block."""
        for index, products in self.products.items():
            self.layers[index].logit_products = products
        for index, layer in self.layers.items():
            layer.counters.append(self.counters[index])
        try:
            yield
        finally:
            for index in self.products:
                self.layers[index].logit_products = None
            for index, layer in self.layers.items():
                layer.counters.remove(self.counters[index])

    def state(self) -> dict[str, Tensor]:
        """What this rank counted, for `load_state` of the same rank of as many."""
        states = {index: counter.state(self.device) for index, counter in self.counters.items()}
        return {f"layers.{index}.{name}": tensor for index, state in states.items() for name, tensor in state.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave: the same will be counted and sampled as without the break."""
        for index, counter in self.counters.items():
            counter.load_state({name: state[f"layers.{index}.{name}"].to(self.device) for name in counter.STATE})

    def gather(self, provenance: dict[str, Any]) -> RoutingStatistics:
        """What was counted so far, of all ranks and on all ranks. Collective; counting may go on afterwards."""
        counters = list(self.counters.values())
        pairs_LEE = torch.stack([counter.pairs(self.device) for counter in counters])
        tokens_RL = torch.tensor([[counter.tokens for counter in counters]], device=self.device)
        if self.ranks > 1:
            dist.all_reduce(pairs_LEE)
            tokens_RL = torch.cat(_all_gather(tokens_RL))
        layers = {}
        for at, (index, counter) in enumerate(self.counters.items()):
            tokens = tokens_RL[:, at].tolist()
            sets_NK = self._sets(counter, tokens)
            layers[index] = LayerStatistics.of(sum(tokens), pairs_LEE[at], sets_NK, self._products(index))
        first = counters[0]
        return RoutingStatistics(first.experts, first.top_k, layers, provenance)

    def _products(self, index: int) -> Tensor | None:
        """Inner products of a layer's logits, of all ranks."""
        if index not in self.products:
            return None
        total_EE = self.products[index].products(self.device).clone()
        if self.ranks > 1:
            dist.all_reduce(total_EE)
        return total_EE

    def _sets(self, counter: RoutingCounter, tokens: list[int]) -> Tensor:
        """One uniform sample of all ranks' tokens; each rank sends only its share of it."""
        sets_NK = counter.sets(self.device)
        if self.ranks == 1:
            return sets_NK
        counts = shares(tokens, [min(n, self.sample) for n in tokens], self.sample, self.seed)
        padded_NK = sets_NK.new_zeros(max(counts), counter.top_k)
        padded_NK[: counts[self.rank]] = pick(sets_NK, counts[self.rank], self.seed, self.rank)
        parts = _all_gather(padded_NK.view(torch.uint8))  # neither gloo nor NCCL knows int16
        return torch.cat([p.view(torch.int16)[:n] for p, n in zip(parts, counts, strict=True)])


def _all_gather(tensor: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return parts
