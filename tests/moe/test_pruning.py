"""Pruned layers on ranks, m over layers and steps, and similarity tables, against what is counted here."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_pruning import cosine, prune_token
from test_statistics import statistics
from torch import Tensor

from occult_train.errors import StatisticsError
from occult_train.models.config import ModelConfig
from occult_train.models.gpt import GPT, Runtime
from occult_train.models.init import init_weights
from occult_train.moe.collaboration import CollaborationCounts
from occult_train.moe.layer import MoELayer, MoEOptions
from occult_train.moe.placement import Placement
from occult_train.moe.pruning import PruneConfig, Pruner
from occult_train.moe.router import Router
from occult_train.moe.similarity import LogitProducts, SimilarityTables, cosines
from occult_train.moe.statistics import RoutingStatistics, merge
from occult_train.parallel.grid import Grid
from occult_train.testing import run_distributed

CPU = torch.device("cpu")
EXPERTS, TOP_K, HIDDEN, TOKENS = 16, 4, 8, 21
PLACEMENT = Placement(tuple(torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(5)).tolist()))


def make_layer(grid: Grid, dispatcher: str, prune: PruneConfig, recompute: bool = False) -> MoELayer:
    """The same weights by expert, whatever the grid."""
    options = MoEOptions(HIDDEN, 6, EXPERTS, TOP_K, normalise=True, dispatcher=dispatcher, recompute=recompute)
    pruner = Pruner(prune, 0, EXPERTS)
    pruner.similarity_EE = torch.rand(EXPERTS, EXPERTS, generator=torch.Generator().manual_seed(4))
    layer = MoELayer(options, grid, PLACEMENT, pruner).double()
    generator = torch.Generator().manual_seed(6)
    own = PLACEMENT.by_device(grid.expert_size)[grid.expert_rank]
    with torch.no_grad():
        layer.router.weight.copy_(torch.randn(EXPERTS, HIDDEN, dtype=torch.float64, generator=generator))
        for stack in (layer.experts.w1, layer.experts.w2, layer.experts.w3):
            every = torch.randn(EXPERTS, *stack.shape[1:], dtype=torch.float64, generator=generator)
            stack.copy_(every[own])
    return layer


def passed(layer: MoELayer, x_TH: Tensor) -> dict[str, Tensor]:
    """Output, balancing terms and gradients of x and of the router."""
    x_TH = x_TH.clone().requires_grad_()
    layer.router.weight.grad = None
    y_TH, routing = layer(x_TH)
    (y_TH.sin().sum() + (routing.mean_prob_E * torch.arange(EXPERTS)).sum() + routing.z).backward()
    assert layer.router.weight.grad is not None
    assert x_TH.grad is not None
    return {
        **{"y": y_TH.detach(), "counts": routing.counts_E, "dx": x_TH.grad},
        "router": layer.router.weight.grad.clone(),
    }


def predicted(layer: MoELayer, x_TH: Tensor, prune: PruneConfig, rank: int, ranks: int) -> tuple[int, int, int]:
    """Rows that a token at a time says this rank sends, tokens' ranks in all, and devices of `prune` in all."""
    assert layer.pruner is not None
    assert layer.pruner.similarity_EE is not None
    table = layer.pruner.similarity_EE.tolist() if prune.policy == "similarity" else None
    slots = PLACEMENT.expert_to_slot
    device = [slot // (EXPERTS // prune.groups) for slot in slots]
    rows = spread = used = 0
    for scores in (x_TH @ layer.router.weight.detach().T).softmax(1).tolist():
        experts = prune_token(scores, TOP_K, device, prune.devices, table).experts
        homes = {slots[e] // (EXPERTS // ranks) for e in experts}
        rows, spread = rows + len(homes - {rank}), spread + len(homes)
        used += len({device[e] for e in experts})
    return rows, spread, used


CASES = [("router", 1, 0), ("similarity", 1, 0), ("similarity", 3, 8)]
"""Policy, m, groups; 0 for the ranks."""


def on_ranks(rank: int, ranks: int) -> list[dict[str, Any]]:
    grid = Grid.create(ranks)
    found = []
    for policy, devices, groups in CASES:
        prune = PruneConfig(policy, devices, groups).resolved(ranks)
        x_TH = torch.randn(TOKENS + rank, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
        expected = passed(make_layer(Grid(), "local", prune), x_TH)
        for dispatcher, recompute in (("dedup", False), ("all_to_all", False), ("dedup", True)):
            layer = make_layer(grid, dispatcher, prune, recompute)
            layer.meter.enabled = True
            got = passed(layer, x_TH)
            sent = layer.dispatcher.traffic.drain().rows_sent
            counted = CollaborationCounts(*layer.meter.drain(CPU).tolist())
            errors = {name: float((got[name] - expected[name]).abs().max()) for name in got}
            rows = predicted(layer, x_TH, prune, rank, ranks)
            found.append({"dispatcher": dispatcher, "errors": errors, "sent": sent, "rows": rows, "counted": counted})
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_give_what_one_process_gives_and_send_what_routing_predicts(ranks: int) -> None:
    results = run_distributed(on_ranks, ranks, ranks)
    for case in zip(*results, strict=True):
        for of_rank in case:
            assert max(of_rank["errors"].values()) < 1e-10, of_rank["errors"]
            rows, spread, _ = of_rank["rows"]
            assert of_rank["counted"].devices == spread
            assert of_rank["counted"].remote_devices == rows
            if of_rank["dispatcher"] == "dedup":
                assert of_rank["sent"]["dispatch"] == rows
        rows = sum(of_rank["rows"][0] for of_rank in case)
        if case[0]["dispatcher"] == "dedup":
            for name in case[0]["sent"]:
                assert sum(of_rank["sent"][name] for of_rank in case) == rows, name
    tokens = sum(TOKENS + rank for rank in range(ranks))
    first = [of_rank[0] for of_rank in results]
    assert sum(of_rank["rows"][1] for of_rank in first) == tokens, "m = 1: one device a token"


def test_groups_follow_the_experts_when_they_move() -> None:
    layer = make_layer(Grid(), "local", PruneConfig("router", 1, 4))
    x_TH = torch.randn(50, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = layer.router(x_TH)
    for slots in (torch.arange(EXPERTS), torch.arange(EXPERTS) * 5 % EXPERTS):
        layer.expert_to_slot.copy_(slots)
        assert layer.pruner is not None
        chosen = layer.router.choose(logits, layer.pruner.pruning(layer.expert_to_slot)).experts_TK
        device = slots[chosen] // 4
        assert (device == device[:, :1]).all()


@pytest.mark.parametrize("policy", ["router", "similarity"])
def test_the_fused_router_prunes_alike(policy: str) -> None:
    pruner = Pruner(PruneConfig(policy, 2, 8, inherit=True), 0, EXPERTS)
    pruner.similarity_EE = torch.rand(EXPERTS, EXPERTS, generator=torch.Generator().manual_seed(4))
    routers = [Router(HIDDEN, EXPERTS, TOP_K, True, fused) for fused in (False, True)]
    weight = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(6))
    x_TH = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(1))
    pruning = pruner.pruning(torch.tensor(PLACEMENT.expert_to_slot))
    found = []
    for router in routers:
        router.weight.data.copy_(weight)
        routing = router.choose(router(x_TH), pruning)
        (routing.weights_TK.square().sum() + routing.mean_prob_E.square().sum()).backward()
        assert router.weight.grad is not None
        found.append((routing.experts_TK, routing.counts_E, routing.weights_TK.detach(), router.weight.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    for one, two in zip(found[0][2:], found[1][2:], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_m_by_layer_and_step() -> None:
    prune = PruneConfig("router", 2, 8, layers={3: 5}, schedule={20: 4, 10: 6})
    table = {(layer, step): prune.limit(layer, step) for layer in (0, 3) for step in (0, 9, 10, 19, 20, 10**6)}
    assert [table[0, step] for step in (0, 9, 10, 19, 20, 10**6)] == [6, 6, 4, 4, 2, 2]
    assert [table[3, step] for step in (0, 9, 10, 19, 20, 10**6)] == [6, 6, 5, 5, 5, 5]
    only = PruneConfig("router", 0, 8, layers={3: 5})
    assert (only.limit(0, 0), only.limit(3, 0)) == (8, 5)
    pruner = Pruner(replace(prune, schedule={10: 8}), 0, 16)
    slots = torch.arange(16)
    assert pruner.pruning(slots) is None, "all devices are allowed"
    pruner.set_step(10)
    found = pruner.pruning(slots)
    assert found is not None
    assert (found.devices, found.group_size) == (2, 2)


def test_recomputation_chooses_nothing_anew() -> None:
    """The same loss and gradients, bit for bit, from one choice a layer."""
    config = ModelConfig(64, 16, 8, 2, 2, num_experts=16, num_experts_per_tok=4, max_position_embeddings=16)
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for recompute in (False, True):
        prune = PruneConfig("router", 1, 4, schedule={5: 2})
        model = GPT(config, Runtime(selective_checkpointing=recompute, prune=prune))
        init_weights(model, seed=1)
        choices: list[Tensor] = []
        for layer in model.moe_layers().values():

            def watched(
                logits: Tensor, pruning: Any, choose: Any = layer.router.choose, seen: list[Tensor] = choices
            ) -> Any:
                seen.append(choose(logits, pruning).experts_TK)
                return choose(logits, pruning)

            layer.router.choose = watched  # type: ignore[method-assign, assignment]
        for step in (0, 5):
            model.set_step(step)
            model(ids, labels=ids).backward()
        assert len(choices) == 4
        spread = [max(len(set(row)) for row in (experts // 4).tolist()) for experts in choices]
        assert spread == [2, 2, 1, 1]
        found.append([parameter.grad for parameter in model.parameters()])
    for one, two in zip(*found, strict=True):
        assert one is not None
        assert two is not None
        assert torch.equal(one, two)


# --- similarity


def test_similarity_by_hand() -> None:
    """Columns (3, 0), (0, 2), (4, 4) and 0: cosines 0, 1/sqrt 2, and 0 beside nothing."""
    products = LogitProducts(4)
    products.add(torch.tensor([[3.0, 0, 4, 0]]))
    products.add(torch.tensor([[0.0, 2, 4, 0]]))
    table = cosines(products.products(CPU))
    half = 0.5**0.5
    expected = torch.tensor([[1, 0, half, 0], [0, 1, half, 0], [half, half, 1, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(table, expected, rtol=1e-7, atol=0)


def test_sums_are_those_of_exact_fractions() -> None:
    """Logits of both signs and very different sizes, in batches of all lengths."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 4, generator=generator) * 10 ** torch.randint(-3, 4, (300, 1), generator=generator)
    products = LogitProducts(4)
    for part in logits.split([1, 0, 99, 200]):
        products.add(part)
    columns = logits.T.tolist()
    found = products.products(CPU)
    for i, one in enumerate(columns):
        for j, two in enumerate(columns):
            exact = sum((Fraction(a) * Fraction(b) for a, b in zip(one, two, strict=True)), Fraction(0))
            size = sum(abs(a * b) for a, b in zip(one, two, strict=True))
            assert abs(float(Fraction(float(found[i, j])) - exact)) <= 1e-14 * size
    torch.testing.assert_close(cosines(found), torch.tensor(cosine(columns)), rtol=1e-6, atol=1e-9)


def test_a_stream_longer_than_fp32_bears() -> None:
    """After 2^40 from earlier tokens, 100,000 more move the sum by 0.01 each; fp32 would not have moved at all."""
    products = LogitProducts(2)
    products.add(torch.tensor([[2.0**20, 0.0]]))
    narrow = torch.tensor(2.0**40)
    for _ in range(100):
        products.add(torch.full((1000, 2), 0.1))
        narrow += 1000 * torch.tensor(0.1) ** 2
    assert narrow == 2.0**40
    added = 100_000 * Fraction(float(torch.tensor(0.1))) ** 2
    assert abs(float(products.products(CPU)[0, 0]) - 2.0**40 - float(added)) < 0.01
    assert float(products.products(CPU)[1, 1]) == pytest.approx(float(added), rel=1e-12)


def with_products(seed: int) -> RoutingStatistics:
    made = statistics(30, 20, seed=seed)
    for index in made.layers:
        part = torch.randn(9, 6, generator=torch.Generator().manual_seed(seed + index)).double()
        made.layers[index] = replace(made.layers[index], logit_products_EE=part.T @ part)
        products = made.layers[index].logit_products_EE
        assert products is not None
        made.layers[index] = replace(made.layers[index], logit_products_EE=(products + products.T) / 2)
    return made


def test_files_keep_and_merge_inner_products(tmp_path: Path) -> None:
    parts = [with_products(seed) for seed in (0, 100)]
    for i, part in enumerate(parts):
        part.save(tmp_path / str(i))
    merged = merge([RoutingStatistics.load(tmp_path / str(i)) for i in range(2)])
    merged.check()
    for index, layer in merged.layers.items():
        one, two = (part.layers[index].logit_products_EE for part in parts)
        assert one is not None
        assert two is not None
        assert layer.logit_products_EE is not None
        assert torch.equal(layer.logit_products_EE, one + two)
    with pytest.raises(StatisticsError, match="statistics the first hold similarity, number 2 of those to merge none"):
        merge([parts[0], statistics(30, 20)])
    tables = SimilarityTables.of(merged, "x")
    path = tmp_path / "tables"
    path.write_bytes(tables.to_bytes())
    again = SimilarityTables.load(path)
    assert all(torch.equal(again.tables[i], tables.tables[i]) for i in (0, 2))
    again.check_model([0, 2], 6, "x")


def test_tables_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tables = SimilarityTables.of(with_products(0), "x")
    with pytest.raises(StatisticsError, match=r"similarity x is of layers \[0, 2\], the model has experts in \[0\]"):
        tables.check_model([0], 6, "x")
    with pytest.raises(StatisticsError, match=r"similarity x is \[6, 6\] in layer 0, the model has 8 experts"):
        tables.check_model([0, 2], 8, "x")
    with pytest.raises(StatisticsError, match="statistics y hold no similarity; make them with `occult profile"):
        SimilarityTables.of(statistics(30), "y")
    content = bytearray(tables.to_bytes())
    content[-2] ^= 1
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(StatisticsError, match="is damaged: the checksum does not match"):
        SimilarityTables.load(tmp_path / "bad")
    (tmp_path / "bad").write_bytes(b"text")
    with pytest.raises(StatisticsError, match="is damaged"):
        SimilarityTables.load(tmp_path / "bad")
    with pytest.raises(StatisticsError, match="none cannot be read"):
        SimilarityTables.load(tmp_path / "none")
