"""`occult bench`: problems that are what they say, layers that must be right, counts, tables, and failing systems."""

import csv
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from occult_train.errors import UserError
from occult_train.moe.placement import Placement, to_json
from occult_train.moe.statistics import RoutingStatistics
from occult_train.moe.synthetic import statistics_of
from occult_train.parallel.grid import Grid
from occult_train.testing import requires_gpu, run_distributed
from occult_train.tools.bench.breakdown import Kernel, break_down, covered
from occult_train.tools.bench.layer_command import LAYER_COLUMNS, counts
from occult_train.tools.bench.measure_layer import measure
from occult_train.tools.bench.problem import Problem, make_problem, relative, right_answer
from occult_train.tools.bench.ranks import Launch, run_tasks
from occult_train.tools.bench.results import geometric_mean, ratio_table, ratios, write_csv
from occult_train.tools.bench.routing import draw_experts, draws, popularity
from occult_train.tools.bench.shapes import (
    LAYER_SYSTEMS,
    SHAPES,
    Law,
    LayerTask,
    Shape,
    StepTask,
    parse_routing,
    parse_shape,
    parse_system,
    read_value,
)
from occult_train.tools.bench.step_command import step_settings
from occult_train.tools.bench.timing import Times, counted_all_to_all

TINY = Shape("tiny", 32, 24, 8, 3)
PAIRS = Shape("pairs", 32, 24, 8, 2)
TOKENS = 96
CPU = torch.device("cpu")


# ---------------------------------------------------------------- what is typed


def test_shapes_by_name_and_by_numbers() -> None:
    assert parse_shape("qwen1.5-moe") == Shape("qwen1.5-moe", 2048, 1408, 60, 4)
    assert parse_shape("64,32,8,2") == Shape("64x32x8x2", 64, 32, 8, 2)
    for wrong in ("olmo", "64,32,8", "64,32,8,9", "64,32,8,1", "64,0,8,2", "64,32,8,x"):
        with pytest.raises(UserError, match=wrong):
            parse_shape(wrong)


def test_layer_flops_are_those_of_its_three_products() -> None:
    assert Shape("", 5, 7, 4, 2).flops(11) == 3 * 2 * 5 * 7 * 2 * 11


def test_routings_and_systems() -> None:
    assert [parse_routing(text).exponent for text in ("uniform", "zipf:0.8", "zipf:0")] == [0.0, 0.8, 0.0]
    assert parse_routing("chosen:a:b/c:3") == Law(path=Path("a:b/c"), layer=3)
    assert parse_routing("chosen:a:b/c") == Law(path=Path("a:b/c"))
    for wrong in ("zipf", "uniform:1", "zipf:x", "zipf:-1", "zipf:inf", "pareto:1", "chosen", "chosen:"):
        with pytest.raises(UserError, match=wrong):
            parse_routing(wrong)
    assert parse_system("ours:a=nccl,b=2", LAYER_SYSTEMS) == ("ours", {"a": "nccl", "b": "2"})
    for wrong in ("our", "ours:a"):
        with pytest.raises(UserError, match=wrong):
            parse_system(wrong, LAYER_SYSTEMS)
    assert [read_value(text) for text in ("true", "false", "12", "nccl", "-1")] == [True, False, 12, "nccl", "-1"]
    assert counts("--tokens", "256 8192") == [256, 8192]
    for wrong in ("", "0", "8 x", "-1"):
        with pytest.raises(UserError, match="--tokens"):
            counts("--tokens", wrong)


# ---------------------------------------------------------------- routing


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.2, 3.0])
def test_popularity_is_zipfs_law_cut_at_once_a_token(shape: Shape, exponent: float) -> None:
    ordered = popularity(shape, exponent).sort(descending=True).values
    assert float(ordered.sum()) == pytest.approx(shape.top_k, abs=1e-12)
    assert float(ordered[0]) <= 1
    rank = torch.arange(1, shape.experts + 1, dtype=torch.float64)
    constant = ordered * rank**exponent
    below = ordered < 1
    assert below.sum() > shape.experts // 2
    assert torch.allclose(constant[below], constant[below][0].expand(int(below.sum())), rtol=1e-12)
    assert bool((constant[~below] <= constant[below][0]).all()), "cut though the law gives less"


def test_popular_experts_are_dealt_over_devices_and_always_alike() -> None:
    share_E = popularity(SHAPES["olmoe"], 1.2)
    assert torch.equal(share_E, popularity(SHAPES["olmoe"], 1.2))
    first = float(share_E[:32].sum()) / 8
    assert 0.3 < first < 0.7
    assert not torch.equal(share_E, share_E.sort(descending=True).values)


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.2])
def test_drawn_experts_are_different_and_as_frequent_as_wished(exponent: float) -> None:
    shape, tokens = SHAPES["qwen1.5-moe"], 20_000
    share_E = popularity(shape, exponent)
    experts_TK = draw_experts(share_E, tokens, torch.Generator().manual_seed(5))
    assert experts_TK.shape == (tokens, shape.top_k)
    assert bool((experts_TK.diff(dim=1) > 0).all()), "ascending and different"
    got_E = torch.bincount(experts_TK.flatten(), minlength=shape.experts) / tokens
    sigma_E = (share_E * (1 - share_E) / tokens).sqrt()
    assert bool(((got_E - share_E).abs() <= 5 * sigma_E + 1e-9).all())


def test_drawn_experts_meet_all_others() -> None:
    """With a fixed order of experts, neighbours would never be chosen together."""
    experts_TK = draw_experts(torch.full((8,), 0.25, dtype=torch.float64), 5000, torch.Generator().manual_seed(5))
    pairs = torch.zeros(8, 8).index_put((experts_TK[:, 0], experts_TK[:, 1]), torch.ones(5000), accumulate=True)
    upper = pairs[*torch.triu_indices(8, 8, 1)]
    expected = 5000 / 28
    assert bool(((upper - expected).abs() < 5 * math.sqrt(expected)).all())


@pytest.fixture(scope="module")
def grid() -> Grid:
    return Grid()


@pytest.mark.parametrize("routing", ["uniform", "zipf:1.2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_router_chooses_what_was_drawn(grid: Grid, routing: str, dtype: torch.dtype) -> None:
    shape = Shape("", 256, 8, 64, 8)
    problem = make_problem(shape, grid, 500, routing, dtype, CPU)
    for batch in problem.batches:
        logits = F.linear(batch.x_TH, problem.router_EH).float()
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, batch.experts_TK, True)
        assert bool((chosen.sum(1) == 8).all())
        # measured 0.98 in bfloat16
        assert float((logits[chosen].min() - logits[~chosen].max()).detach()) > 0.9
    share_E = popularity(shape, parse_routing(routing).exponent)
    drawn = torch.cat([batch.experts_TK for batch in problem.batches])
    got_E = torch.bincount(drawn.flatten(), minlength=64) / len(drawn)
    assert float((got_E - share_E).abs().max()) < 0.06
    assert len({batch.x_TH.sum().item() for batch in problem.batches}) == len(problem.batches)


@pytest.fixture
def seen(tmp_path: Path) -> Path:
    """Statistics of PAIRS' experts, used in pairs half of the experts apart; layer 3 has others."""
    pairs, others = torch.tensor([[0, 4], [1, 5], [2, 6], [3, 7]]), torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    layers = {1: statistics_of(pairs.repeat(25, 1), 8), 3: statistics_of(others.repeat(25, 1), 8)}
    RoutingStatistics(8, 2, layers).save(tmp_path / "seen.safetensors")
    return tmp_path / "seen.safetensors"


def test_choices_are_those_of_the_statistics(grid: Grid, seen: Path) -> None:
    for text, apart in ((f"chosen:{seen}", 4), (f"chosen:{seen}:3", 1)):
        problem = make_problem(PAIRS, grid, TOKENS, text, torch.float32, CPU)
        drawn = torch.cat([batch.experts_TK for batch in problem.batches])
        assert bool((drawn[:, 1] - drawn[:, 0] == apart).all())
        assert len(drawn.unique(dim=0)) == 4
    for text, shape, wrong in (
        (f"chosen:{seen}:2", PAIRS, "no layer 2, only 1, 3"),
        (f"chosen:{seen}", Shape("", 8, 8, 8, 3), "num_experts_per_tok 2 there, 3 here"),
        ("chosen:nowhere", PAIRS, "nowhere"),
    ):
        with pytest.raises(UserError, match=wrong):
            draws(parse_routing(text), shape)


def test_a_placement_is_measured_and_right(seen: Path, tmp_path: Path) -> None:
    """Two ranks: every token needs both devices where experts are in order, and one where they are placed."""
    file = tmp_path / "placement.json"
    file.write_text(to_json(dict.fromkeys((1, 3), Placement((0, 4, 1, 5, 2, 6, 3, 7)))))
    systems = [f"ours:placement={file}", "ours", f"ours:placement={tmp_path / 'none.json'}"]
    tasks = [LayerTask(s, PAIRS, TOKENS, f"chosen:{seen}", 2, "float32", 0.01, False) for s in systems]
    tasks.append(LayerTask(systems[0], PAIRS, TOKENS, "uniform", 2, "float32", 0.01, False))
    placed, plain, missing, needless = run_distributed(measured, 2, tasks, timeout=120)[0]
    assert (placed["c_t"], plain["c_t"]) == (1.0, 2.0)
    assert 0 < placed["sent_bytes"] < plain["sent_bytes"]
    assert "none.json" in missing["error"]
    assert "needs --routing chosen:FILE" in needless["error"]


def measured(_rank: int, tasks: list[LayerTask]) -> list[dict[str, Any]]:
    return [measure(task) for task in tasks]


def plain_layer(problem: Problem) -> dict[str, torch.Tensor]:
    """Every expert on every token, masked; autograd does the rest. In fp64."""
    batch = problem.batches[0]
    w1, w2, w3, router = (
        w.double().requires_grad_() for w in (problem.w1_EFH, problem.w2_EHF, problem.w3_EFH, problem.router_EH)
    )
    x = batch.x_TH.detach().double().requires_grad_()
    probs = (x @ router.T).softmax(-1)
    mask = torch.zeros_like(probs).scatter(1, batch.experts_TK, 1.0)
    weights = probs * mask / (probs * mask).sum(1, keepdim=True)
    h = F.silu(torch.einsum("th,efh->tef", x, w1)) * torch.einsum("th,efh->tef", x, w3)
    y = torch.einsum("te,tef,ehf->th", weights, h, w2)
    y.backward(batch.dy_TH.double())
    grads = {"dx": x.grad, "router": router.grad, "w1": w1.grad, "w2": w2.grad, "w3": w3.grad}
    return {"y": y.detach()} | {name: grad for name, grad in grads.items() if grad is not None}


def test_the_right_answer_is_right(grid: Grid) -> None:
    problem = make_problem(TINY, grid, TOKENS, "zipf:0.8", torch.float32, CPU)
    answer, plain = right_answer(problem), plain_layer(problem)
    loads = torch.bincount(problem.batches[0].experts_TK.flatten(), minlength=8)
    assert int(loads[answer.expert]) == int(loads.max())
    got = {"y": answer.y_TH, "dx": answer.dx_TH, "router": answer.router_EH}
    for name, tensor in got.items():
        assert relative(tensor, plain[name]) < 1e-6, name
    for name, tensor in zip(("w1", "w2", "w3"), answer.expert_gradients, strict=True):
        assert relative(tensor, plain[name][answer.expert]) < 1e-6, name


def test_a_problem_whose_router_chooses_otherwise_is_refused(grid: Grid) -> None:
    problem = make_problem(TINY, grid, TOKENS, "uniform", torch.float32, CPU)
    other = replace(problem.batches[0], experts_TK=(problem.batches[0].experts_TK + 1) % 8)
    with pytest.raises(RuntimeError, match="does not choose"):
        right_answer(replace(problem, batches=(other,)))


def test_relative_error_of_nothing_and_of_nan() -> None:
    assert relative(torch.zeros(3), torch.zeros(3)) == 0
    assert relative(torch.tensor([math.nan]), torch.ones(1)) == math.inf


# ---------------------------------------------------------------- layers on two ranks


def task(system: str, dtype: str = "bfloat16") -> LayerTask:
    return LayerTask(system, TINY, TOKENS, "zipf:0.8", 2, dtype, 0.01, False)


def measure_all(rank: int, systems: list[str]) -> dict[str, Any]:
    from occult_train.tools.bench import measure_layer as layer
    from occult_train.tools.bench.systems import Layer, build_torch

    def swapped(problem: Problem, options: dict[str, str]) -> Layer:
        return build_torch(replace(problem, w1_EFH=problem.w3_EFH, w3_EFH=problem.w1_EFH), options)

    rows = {system: layer.measure(task(system)) for system in systems}
    rows["float32"] = layer.measure(task("ours", "float32"))
    layer.BUILDS["torch"] = swapped
    rows["swapped"] = layer.measure(task("torch"))
    with counted_all_to_all() as count:
        rows["counts"] = count_some(rank, count)
    problem, _ = layer._problem(TINY, TOKENS, "zipf:0.8", 2, "bfloat16", CPU)
    return rows | {"experts": problem.batches[0].experts_TK}


def count_some(rank: int, count: Any) -> list[int]:
    """Bytes counted of an even and two uneven exchanges, one of them empty on rank 1."""
    seen = []
    a = torch.zeros(4, 3)
    dist.all_to_all_single(torch.empty_like(a), a)
    seen.append(count.total)
    rows = [[1, 2], [4, 0]][rank]
    back = [[1, 4], [2, 0]][rank]
    b = torch.zeros(sum(rows), 5, dtype=torch.float64)
    dist.all_to_all_single(b.new_empty(sum(back), 5), b, back, rows)
    seen.append(count.total)
    c = torch.zeros(0 if rank else 2, 2)
    dist.all_to_all_single(c.new_empty(2 if rank else 0, 2), c, [2, 0] if rank else [0, 0], [0, 0] if rank else [0, 2])
    return [*seen, count.total]


SYSTEMS = ["ours", "ours-reference", "autoep", "torch", "deepspeed-moe"]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Rows of all systems, from each of two ranks."""
    return run_distributed(
        measure_all,
        2,
        [
            *SYSTEMS,
            "scattermoe",
            "megablocks",
            "ours:depth=3",
            "ours:recompute=true",
            "ours:prune=1",
            "autoep:tuned=true",
        ],
    )


@pytest.mark.parametrize("system", [*SYSTEMS, "ours:recompute=true", "ours:prune=1", "float32"])
def test_systems_are_right_and_measured(rows: list[dict[str, Any]], system: str) -> None:
    row = rows[0][system]
    assert "error" not in row
    limit = 1e-6 if system == "float32" else 0.01
    for name in ("y", "dx", "dw", "router"):
        # measured at most 0.0064 and 2.5e-7
        assert row[f"error_{name}"] < limit, name
    assert 0 < row["forward_p10"] <= row["forward_ms"] <= row["forward_p90"]
    assert 0 < row["train_p10"] <= row["train_ms"] <= row["train_p90"]
    assert row["repetitions"] >= 5
    expected = 3 * TINY.flops(TOKENS) / row["train_ms"] / 1e9 / row["peak_tflops"]
    assert row["share_of_peak"] == pytest.approx(expected)
    assert {key: value for key, value in row.items() if key.startswith("error_")} == {
        key: value for key, value in rows[1][system].items() if key.startswith("error_")
    }


def test_a_pruned_layer_sends_one_row_a_token_that_leaves(rows: list[dict[str, Any]]) -> None:
    """At m = 1 on two ranks each token has one device, its home or the other, and the answer is another."""
    sent = [rows[0][system]["sent_bytes"] for system in ("ours", "ours:prune=1")]
    assert sent[1] < 0.75 * sent[0]
    assert rows[0]["ours:prune=1"]["error_y"] != rows[0]["ours"]["error_y"]


def test_a_wrong_layer_gets_no_number(rows: list[dict[str, Any]]) -> None:
    row = rows[0]["swapped"]
    assert row["error"].startswith("not right: y is off by")
    assert "dw is off by" in row["error"]
    assert not [key for key in row if key.endswith("_ms")]


def test_what_cannot_run_says_why(rows: list[dict[str, Any]]) -> None:
    assert "no expert parallelism" in rows[0]["scattermoe"]["error"]
    assert "on a GPU only" in rows[0]["megablocks"]["error"]
    assert "on a GPU only" in rows[0]["autoep:tuned=true"]["error"]
    assert "no option depth, only dispatcher" in rows[0]["ours:depth=3"]["error"]


def test_bytes_sent_are_those_of_the_rows_for_other_ranks(rows: list[dict[str, Any]]) -> None:
    """Two bytes a number, four passes; K copies for the peers, one row a device for ours."""
    row_bytes = TINY.hidden * 2
    copies = devices = 0
    for rank, result in enumerate(rows):
        remote_TK = result["experts"] // 4 != rank
        copies += int(remote_TK.sum())
        devices += int(remote_TK.any(dim=1).sum())
    counts_exchanged = {"autoep": 2 * 4 * 4, "torch": 2 * 4 * 8}  # for the other rank's 4 experts, int32 and int64
    for system, extra in counts_exchanged.items():
        assert rows[0][system]["sent_bytes"] == 4 * copies * row_bytes + extra, system
    # ids and weights of 3 experts travel beside a row, weights' gradients back
    assert rows[0]["ours"]["sent_bytes"] == devices * (4 * row_bytes + 3 * (4 + 4 + 4))


def measure_spread(rank: int, ranks: int) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """Rows of ours and AutoEP, and what this rank's tokens choose."""
    from occult_train.tools.bench import measure_layer as layer

    law = (TINY, TOKENS, "zipf:0.8", ranks, "float32")
    found = [layer.measure(LayerTask(system, *law, 0.01, False)) for system in ("ours", "autoep")]
    return found, layer._problem(*law, CPU)[0].batches[0].experts_TK


@pytest.mark.parametrize("ranks", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_more_ranks_are_right_and_send_a_row_for_each_other_device(ranks: int) -> None:
    """Ours sends as many rows as tokens have devices that are not their home, AutoEP one for each expert there."""
    results = run_distributed(measure_spread, ranks, ranks, timeout=300)
    local, row_bytes = TINY.experts // ranks, TINY.hidden * 4
    devices = [[{e // local for e in token} for token in experts_TK.tolist()] for _, experts_TK in results]
    rows = sum(len(token - {rank}) for rank, tokens in enumerate(devices) for token in tokens)
    copies = sum(int((experts_TK // local != rank).sum()) for rank, (_, experts_TK) in enumerate(results))
    ours, autoep = results[0][0]
    assert "error" not in ours
    assert "error" not in autoep
    assert ours["sent_bytes"] == rows * (4 * row_bytes + min(TINY.top_k, local) * (4 + 4 + 4))
    assert autoep["sent_bytes"] == 4 * copies * row_bytes + ranks * (ranks - 1) * local * 4
    assert ours["c_t"] == pytest.approx(sum(len(token) for tokens in devices for token in tokens) / (ranks * TOKENS))


def test_collectives_are_counted(rows: list[dict[str, Any]]) -> None:
    assert rows[0]["counts"] == [24, 24 + 2 * 40, 24 + 2 * 40 + 16]
    assert rows[1]["counts"] == [24, 24 + 4 * 40, 24 + 4 * 40]


# ---------------------------------------------------------------- whole steps

STEP_SHAPE = Shape("64x32x8x2", 64, 32, 8, 2)


def measure_steps(rank: int, zero: int) -> list[dict[str, Any]]:
    from occult_train.tools.bench import measure_step as step

    settings = tuple(step_settings(STEP_SHAPE, 2, 48, 2, 384, 2, zero))
    found = []
    for system in ("ours", "autoep", "fsdp"):
        for accumulation in (1, 2):
            made = StepTask(system, STEP_SHAPE.name, settings, accumulation, 0.01, None, False)
            found.append(step.measure(made))
    off = StepTask(
        "fsdp", STEP_SHAPE.name, settings, 1, 0.01, (found[0]["first_loss"], 2 * found[0]["first_norm"]), False
    )
    return [*found, step.measure(off)]


@pytest.mark.parametrize("zero", [1, 2])
def test_trainers_take_the_same_first_step(zero: int) -> None:
    *found, off = run_distributed(measure_steps, 2, zero)[0]
    first = found[0]
    for row in found:
        place = (row["system"], row["accumulation"])
        assert "error" not in row, place
        assert row["zero"] == zero
        # measured 7e-5 and 1e-4
        assert row["first_loss"] == pytest.approx(first["first_loss"], abs=1e-3), place
        assert row["first_norm"] == pytest.approx(first["first_norm"], rel=1e-2), place
        assert row["warm_loss"] < row["first_loss"], place
        tokens = 2 * 48 * row["accumulation"]
        assert row["tokens_per_second"] == pytest.approx(tokens / row["step_ms"] * 1000), place
        assert row["steps"] >= 2
    assert off["error"].startswith("not right: the first gradient norm is")
    assert "step_ms" not in off


# ---------------------------------------------------------------- tables


def test_geometric_mean() -> None:
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4)
    assert geometric_mean([3.0]) == pytest.approx(3)


def result(system: str, shape: str, routing: str, ms: float | None) -> dict[str, Any]:
    row = {"system": system, "shape": shape, "routing": routing}
    return row | ({"error": "not right"} if ms is None else {"ms": ms})


RESULTS = [
    result("ours", "a", "uniform", 2.0),
    result("peer", "a", "uniform", 4.0),
    result("ours", "b", "uniform", 1.0),
    result("peer", "b", "uniform", 8.0),
    result("ours", "c", "uniform", 1.0),
    result("peer", "c", "uniform", None),
    result("ours", "a", "zipf", 5.0),
    result("peer", "a", "zipf", 5.0),
]


def test_ratios_are_to_the_base_on_the_same_problem() -> None:
    assert ratios(RESULTS, "ours", "ms", ("routing",), "shape") == {"peer": [2.0, 8.0, 1.0]}
    assert ratios(RESULTS, "peer", "ms", ("routing",), "shape") == {"ours": [0.5, 0.125, 1.0]}


def test_ratio_table_has_a_line_for_each_setting() -> None:
    table = ratio_table(RESULTS, "ours", {"ms": "time"}, ("routing",), "shape")
    cells = [list(column.cells) for column in table.columns]
    assert cells == [["uniform", "zipf"], ["peer", "peer"], ["4.00 (2)", "1.00 (1)"]]


def test_csv_keeps_columns_and_leaves_gaps_empty(tmp_path: Path) -> None:
    write_csv(
        tmp_path / "a.csv", ("system", "ms", "error"), [{"system": "x", "ms": 1.5}, {"system": "y", "error": "a,b"}]
    )
    assert list(csv.DictReader((tmp_path / "a.csv").open())) == [
        {"system": "x", "ms": "1.5", "error": ""},
        {"system": "y", "ms": "", "error": "a,b"},
    ]
    with pytest.raises(ValueError, match="depth"):
        write_csv(tmp_path / "a.csv", ("system",), [{"system": "x", "depth": 3}])


def test_times_are_ordered() -> None:
    assert Times.of([5.0, 1.0, 3.0]) == Times(3.0, 1.0, 5.0, 3)
    assert Times.of([float(i) for i in range(101)]) == Times(50.0, 10.0, 90.0, 101)


def test_breakdown_of_kernels_drawn_by_hand() -> None:
    r"""
    matmul  |====|            0-4, and nothing from 9 to 10
    nccl       |=====|        3-9: from 6 on alone
    copy        |==|          4-6
    silu                |==|  10-12
    """
    kernels = [
        Kernel("nvjet_sm90_tst_128x256", 0, 4000),
        Kernel("ncclDevKernel_SendRecv", 3000, 9000),
        Kernel("Memcpy DtoD", 4000, 6000),
        Kernel("triton_swiglu", 10000, 12000),
    ]
    parts = break_down(kernels, 2, top=2)
    assert (parts.matmul, parts.communication, parts.exposed, parts.other, parts.idle) == (2.0, 3.0, 1.5, 2.0, 0.5)
    assert parts.top == (("ncclDevKernel_SendRecv", 3.0, 0), ("nvjet_sm90_tst_128x256", 2.0, 0))
    assert covered([(0, 2), (1, 3), (5, 6)]) == 4


def test_kernels_are_sorted_by_name() -> None:
    kinds = {
        "matmul": [
            "void cutlass::device_kernel<GroupedGemm>",
            "_scatter2scatter",
            "sm90_xmma_gemm_bf16",
            "_groupXtY",
            "rows_kernel",
        ],
        "communication": ["ncclDevKernel_AllReduce_Sum_f32", "Memcpy DtoH (Device -> Pinned)", "barrier_kernel"],
        "other": ["vectorized_elementwise_kernel", "DeviceRadixSortOnesweepKernel", "gather_rows_kernel"],
    }
    for kind, names in kinds.items():
        assert [Kernel(name, 0, 1).kind for name in names] == [kind] * len(names)


# ---------------------------------------------------------------- ranks


def test_a_rank_that_fails_dies_or_hangs_costs_its_task_alone() -> None:
    path = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
    launch = Launch(2, cpu=True, environment={"PYTHONPATH": path}, task_seconds=5, start_seconds=60)
    tasks = ["well", "raise", "die", "hang", "well"]
    found = list(run_tasks("bench_tasks:misbehave", tasks, launch))
    assert [(index, value) for index, value, _ in found] == [(0, [1, 2]), (1, None), (2, None), (3, None), (4, [1, 2])]
    raised, died, hung = (error for _, _, error in found[1:4])
    assert "ValueError: rank 1 does not like this" in raised
    assert died.startswith("rank 0 ended with exit code 9")
    assert hung == "no result within 5 s"


def occult(*words: str) -> "subprocess.CompletedProcess[str]":
    program = [sys.executable, "-m", "occult_train.launcher.cli", "bench", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # models this small are computed fastest by one thread
    return subprocess.run(program, env=environment, capture_output=True, text=True, timeout=120)


def test_the_command_writes_tables_and_csv(tmp_path: Path) -> None:
    where = tmp_path / "a.csv"
    words = ["--shape", "32,16,8,2 16,16,4,2", "--tokens", "40", "--seconds", "0.01", "--csv", str(where)]
    done = occult("layer", "--cpu", "--system", "ours torch scattermoe", *words)
    assert done.returncode == 0, done.stderr
    with where.open() as file:
        reader = csv.DictReader(file)
        lines = list(reader)
    assert tuple(reader.fieldnames or ()) == LAYER_COLUMNS
    assert [(line["shape"], line["system"]) for line in lines] == [
        (shape, system) for shape in ("32x16x8x2", "16x16x4x2") for system in ("ours", "torch", "scattermoe")
    ]
    for line in lines:
        assert bool(line["error"]) == (line["system"] == "scattermoe")
        assert bool(line["train_ms"] and line["sent_bytes"]) != bool(line["error"])
    assert "times ours (geometric mean over shapes)" in done.stdout
    assert "scattermoe 32x16x8x2: ScatterMoE has no expert parallelism" in done.stdout


@pytest.mark.parametrize(
    "words, message",
    [
        (["layer", "--cpu", "--system", "our"], "error: system 'our' is not one of ours, "),
        (["layer", "--cpu", "--dtype", "float64"], "error: --dtype=float64 is neither bfloat16 nor float32"),
        (["generate", "--cpu", "--prefill", "10", "--sequence", "4"], "error: --prefill=10 is not a multiple of "),
        (
            ["generate", "--cpu", "--system", "ours:prune=2", "--ep", "1"],
            "error: moe.prune.policy=router needs moe.prun",
        ),
        (["generate", "--cpu", "--system", "ours:prune=x"], "error: system 'ours:prune=x': prune=x is not a number"),
        (["generate", "--cpu", "--system", "ours:m=1"], "error: system 'ours:m=1' has no option m, only dispatcher, "),
        (["layer", "--cpu", "--p2p", "no"], "error: --p2p=no is neither on nor off"),
        (["step", "--cpu", "--accumulation", "x"], "error: --accumulation='x' must be positive whole numbers"),
    ],
)
def test_a_users_mistake_is_one_line(words: list[str], message: str) -> None:
    done = occult(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_generation_is_right_and_measured(tmp_path: Path) -> None:
    """Two ranks; every system computes what our plain model does, else it would have no times."""
    where = tmp_path / "a.csv"
    systems = ["ours", "ours:dispatcher=all_to_all", "ours:prune=1", "autoep", "transformers"]
    words = ["--shape", "64,32,8,2", "--layers", "2", "--vocabulary", "320", "--prefill", "40", "--sequence", "20"]
    words += ["--decode", "3", "--context", "8", "--new", "12", "--seconds", "0.01", "--csv", str(where)]
    done = occult("generate", "--cpu", "--system", " ".join(systems), *words)
    assert done.returncode == 0, done.stdout + done.stderr
    with where.open() as file:
        lines = list(csv.DictReader(file))
    stages = ["prefill 2x20", "decode 3"]
    assert [(line["system"], line["stage"]) for line in lines] == [(s, stage) for s in systems for stage in stages]
    for line in lines:
        assert not line["error"], line
        assert float(line["error_logits"]) < 1e-5
        tokens = 40 if line["stage"] == stages[0] else int(line["batch"])
        assert float(line["tokens_per_second"]) == pytest.approx(tokens / float(line["ms"]) * 1000)


def measure_on_gpu(rank: int) -> dict[str, Any]:
    from occult_train.tools.bench import measure_layer as layer

    made = LayerTask("autoep", Shape("", 256, 128, 8, 2), 512, "uniform", 1, "bfloat16", 0.05, True)
    return layer.measure(made)


@pytest.mark.gpu
@requires_gpu
def test_memory_and_breakdown_on_a_gpu() -> None:
    (row,) = run_distributed(measure_on_gpu, 1, backend="nccl")
    weights = 3 * 8 * 256 * 128 * 2 + 8 * 256 * 2
    assert row["gradients_bytes"] >= weights
    assert row["peak_bytes"] > row["gradients_bytes"] > 0
    # inputs of the products, kept at least once: 2 x 512 rows of 256 and 128
    assert row["saved_bytes"] > 2 * 512 * (256 + 128) * 2
    assert row["matmul_ms"] > 0
    assert row["other_ms"] > 0
    assert row["top"]
