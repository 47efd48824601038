"""Counting a model's routing: exact whatever the number of ranks and micro-batches, and a sample that is uniform."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_statistics import EXPERTS, TOP_K, choices, plain_count
from torch import Tensor

from occult_train.moe import collaboration
from occult_train.moe.collaboration import RoutingCounter, mean_devices
from occult_train.moe.collecting import RoutingCollector
from occult_train.moe.layer import MoELayer, MoEOptions
from occult_train.moe.placement import Placement
from occult_train.moe.sampling import reservoir_draw
from occult_train.moe.statistics import RoutingStatistics
from occult_train.parallel.grid import Grid
from occult_train.testing import requires_gpu, run_distributed

CPU = torch.device("cpu")


def count(experts_TK: Tensor, batches: list[int], sample: int = 10**4, seed: int = 0) -> RoutingCounter:
    counter = RoutingCounter(EXPERTS, experts_TK.shape[1], sample, (seed,))
    for batch in experts_TK.split(batches):
        counter.add(batch)
    return counter


@given(st.lists(st.integers(0, 50), min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 60), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_counts_are_those_of_a_plain_counter(batches: list[int], top_k: int, sample: int, seed: int) -> None:
    experts_TK = choices(sum(batches), seed, top_k=top_k)
    counter, plain = count(experts_TK, batches, sample, seed), plain_count(experts_TK)
    assert counter.tokens == plain.tokens
    assert torch.equal(counter.pairs(CPU), plain.pairs_EE + plain.loads_E.diag())
    sets = counter.sets(CPU)
    assert sets.shape == (min(sample, plain.tokens), top_k)
    all_sets = Counter(map(tuple, plain.sets_NK.tolist()))
    assert not Counter(map(tuple, sets.tolist())) - all_sets, "a set that no token chose, or more often"
    if sample >= plain.tokens:
        assert torch.equal(sets, plain.sets_NK)


def test_counts_beyond_what_fp32_holds_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 stands still at 2^24, which is what one micro-batch is cut to; sums over micro-batches go on."""
    counter = RoutingCounter(3, 2, 1, (0,))
    counter.add(torch.tensor([[0, 1], [0, 2]]))
    assert counter._sums is not None
    counter._sums[0][0, 1] += 2**24 + 2**30
    counter.add(torch.tensor([[1, 0]]))
    assert counter.pairs(CPU)[0].tolist() == [3, 2**24 + 2**30 + 2, 1]
    monkeypatch.setattr(collaboration, "EXACT_IN_FP32", 7)
    experts_TK = choices(100)
    plain = plain_count(experts_TK)
    assert torch.equal(count(experts_TK, [64, 36]).pairs(CPU), plain.pairs_EE + plain.loads_E.diag())


@requires_gpu
@pytest.mark.gpu
def test_counts_on_a_gpu_are_exact() -> None:
    """300,000 tokens whose choices include one pair each time: far beyond bf16's 256, and a rounded sum would show."""
    tokens = 300_001
    generator = torch.Generator().manual_seed(0)
    others = torch.rand(tokens, 62, generator=generator).topk(6).indices + 2
    experts_TK = torch.cat((torch.tensor([[0, 1]]).expand(tokens, 2), others), dim=1).cuda()
    counter = RoutingCounter(64, 8, 1000, (0,))
    counter.add(experts_TK)
    pairs = counter.pairs(experts_TK.device)
    assert pairs[0, 1] == pairs[0, 0] == tokens
    assert torch.equal(pairs.diagonal(), experts_TK.flatten().bincount(minlength=64))
    assert torch.equal(pairs[0].cpu(), pairs[1].cpu())
    on_cpu = RoutingCounter(64, 8, 1000, (0,))
    on_cpu.add(experts_TK.cpu())
    assert torch.equal(pairs.cpu(), on_cpu.pairs(CPU))
    assert torch.equal(counter.sets(experts_TK.device).cpu(), on_cpu.sets(CPU))


def test_every_token_is_as_likely_to_be_sampled() -> None:
    """60 tokens in uneven micro-batches into 12 places, 4000 times: chi-squared over tokens, and over neighbours."""
    tokens, places, rounds = 60, 12, 4000
    seen, together = torch.zeros(tokens), 0
    for seed in range(rounds):
        kept, at = torch.zeros(places, dtype=torch.int64), 0
        for batch in (5, 11, 1, 30, 0, 13):
            items, at_places = reservoir_draw((seed,), at, batch, places, CPU)
            kept[at_places] = at + items
            at += batch
        assert len(set(kept.tolist())) == places
        seen[kept] += 1
        together += int((kept.sort().values.diff() == 1).sum())
    chance = places / tokens
    # of the tokens' counts, which sum to rounds * places: tokens - 1 degrees of freedom
    deviation = ((seen - rounds * chance) ** 2).sum() / (rounds * chance * (1 - chance))
    assert 28 < float(deviation) * (tokens - 1) / tokens < 102, "both tails of chi-squared at 3e-4"
    pairs = rounds * places * (places - 1) / tokens
    assert abs(together - pairs) < 4 * pairs**0.5


def test_the_sample_depends_on_the_seed_alone() -> None:
    experts_TK = choices(500)
    sets = [count(experts_TK, [200, 300], 20, seed).sets(CPU) for seed in (1, 1, 2)]
    assert torch.equal(sets[0], sets[1])
    assert not torch.equal(sets[0], sets[2])


def test_mean_devices_against_plain_sets() -> None:
    experts_TK = choices(300)
    device_of = torch.tensor([0, 1, 0, 2, 2, 1])
    expected = sum(len({int(device_of[e]) for e in row}) for row in experts_TK.tolist()) / 300
    assert mean_devices(plain_count(experts_TK).sets_NK, device_of) == pytest.approx(expected, rel=1e-12)
    assert mean_devices(torch.zeros(0, 3, dtype=torch.int16), device_of) != 1


TOKENS = 96


def experts_over(ranks: int) -> int:
    return 8 if EXPERTS % ranks else EXPERTS


def gathered(rank: int, ranks: int, sample: int) -> tuple[RoutingStatistics, list[Tensor]]:
    """Statistics of a layer, expert-parallel over all ranks and placed backwards, over this rank's part of the tokens.

    Returns:
        what `gather` gives, and the choices that the router made of all tokens.
    """
    grid = Grid.create(ranks)
    options = MoEOptions(
        8, 8, EXPERTS if EXPERTS % ranks == 0 else 8, TOP_K, dispatcher="dedup" if ranks > 1 else "local"
    )
    layer = MoELayer(options, grid, Placement(tuple(reversed(range(options.experts)))))
    torch.manual_seed(0)
    router = torch.randn(options.experts, 8)
    x_TH = torch.randn(TOKENS, 8)
    layer.router.weight.data.copy_(router)
    for parameter in layer.experts.parameters():
        torch.nn.init.normal_(parameter)
    collector = RoutingCollector({4: layer}, sample, 7, CPU)
    layer(x_TH)  # not counted
    with collector.counting():
        # an uneven cut: rank 0 gets more, in two micro-batches
        first = TOKENS - (ranks - 1) * 20
        mine = x_TH[:first] if rank == 0 else x_TH[first + (rank - 1) * 20 :][:20]
        for half in mine.chunk(2):
            layer(half)
    layer(x_TH)
    expected = (x_TH @ router.T).softmax(-1).topk(TOP_K).indices
    assert layer.counters == []
    return collector.gather({"ranks": ranks}), [expected]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_gather_the_same_counts_and_a_sample_of_all(ranks: int) -> None:
    for sample in (1000, 15):
        results: list[Any] = run_distributed(gathered, ranks, ranks, sample)
        experts_TK = results[0][1][0]
        plain = plain_count(experts_TK, experts_over(ranks))
        for statistics, _ in results:
            statistics.check()
            layer = statistics.layers[4]
            assert layer.tokens == TOKENS
            assert torch.equal(layer.loads_E, plain.loads_E)
            assert torch.equal(layer.pairs_EE, plain.pairs_EE)
            assert len(layer.sets_NK) == min(sample, TOKENS)
            assert torch.equal(layer.sets_NK, results[0][0].layers[4].sets_NK), "all ranks have the same"
            kept = Counter(map(tuple, layer.sets_NK.tolist()))
            assert not kept - Counter(map(tuple, plain.sets_NK.tolist()))
