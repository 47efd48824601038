"""The fused layer against every token times its own experts in float64, on several ranks.

On CPU the kernels are interpreted, and memory that all ranks map stands for symmetric memory: rows are then written by
the same kernels through the same address tables.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fused_problems import LARGE, PROBLEMS, MappedBox, Problem, Run, check_values
from torch import Tensor

from occult_train.kernels.gather_matmul import kernel as gather
from occult_train.kernels.grouped_matmul import outer, rows
from occult_train.moe.fused import FusedExperts, Way
from occult_train.moe.transport import SymmetricTransport
from occult_train.parallel.grid import Grid
from occult_train.parallel.traffic import PASSES, Traffic
from occult_train.testing import requires_gpus, run_distributed

WAYS = [Way("triton", "collective", c) for c in (0, 1, 3)] + [Way("triton", "symmetric", 0)]
FEWER = {
    "no tokens at all": WAYS[::2] + WAYS[3:],
    "several chunks": WAYS[2:3],
    "all experts": WAYS[::3],
    "one device": WAYS[2:],
    "four ranks": WAYS[::2] + WAYS[3:],
    "eight ranks": [WAYS[1], Way("joint", "symmetric", 0)],
    "one expert a rank": WAYS[1::2],
    "primes": [*WAYS, Way("joint", "symmetric", 0), Way("joint", "collective", 1)],
}
"""Ways of problems that do not take all: even an empty one takes the interpreter half a second."""
Case = tuple[str, Way, bool]
"""A problem, how it is computed, and whether the pre-activations are recomputed."""


@dataclass(frozen=True)
class Entered:
    """What one all-to-all was given."""

    rows: int
    own_rows: int
    nbytes: int


@contextmanager
def entering(grid: Grid) -> Iterator[list[Entered]]:
    """Note every all-to-all that really happens."""
    calls: list[Entered] = []
    original = dist.all_to_all_single

    def record(target: Tensor, source: Tensor, arrives: list[int], sends: list[int], **kwargs: Any) -> Any:
        calls.append(Entered(sum(sends), sends[grid.expert_rank], source.numel() * source.element_size()))
        return original(target, source, arrives, sends, **kwargs)

    dist.all_to_all_single = record
    try:
        yield calls
    finally:
        dist.all_to_all_single = original


def rank_runs(rank: int, cases: list[Case], problems: dict[str, Problem], dtype: torch.dtype, folder: Path) -> Any:
    """Each case on this rank: its outputs, gradients and traffic."""
    cuda = dist.get_backend() == "nccl"
    if cuda:
        for settings in (rows.HOPPER, outer.HOPPER, gather.HOPPER):
            del settings[1:]  # how fast they are is not the question here, and measuring it takes minutes
    else:
        MappedBox.install(folder)
    grid = Grid.create(dist.get_world_size())
    answers = []
    for name, way, recompute in cases:
        traffic = Traffic()
        layer = FusedExperts(grid, problems[name].experts, traffic, way, recompute)
        device = f"cuda:{rank}" if cuda else "cpu"
        if layer.transport.one_sided:  # from the second time on it does not wait for the counts
            Run(layer, problems[name], rank, dtype, device).backward()
            traffic.drain()
        with entering(grid) as entered:
            got = Run(layer, problems[name], rank, dtype, device).backward()
        if way.transport == "collective":
            check_entered(entered, traffic)
        answers.append((got, traffic))
    return answers


def check_entered(entered: list[Entered], traffic: Traffic) -> None:
    """The counters tell what the collectives were given, and that is no row of one's own."""
    assert sum(call.rows for call in entered) == sum(traffic.rows_sent.values())
    assert sum(call.nbytes for call in entered) == sum(traffic.bytes_sent.values())
    assert not any(call.own_rows for call in entered)


def check_traffic(problem: Problem, rank: int, traffic: Traffic) -> None:
    """Exactly the rows that METHODS counts."""
    table = problem.rows()
    sent, arrived = sum(table[rank]), sum(row[rank] for row in table)
    forth, back = (sent, arrived), (arrived, sent)
    for passed, (out, into) in zip(PASSES, (forth, back, forth, back), strict=True):
        assert (traffic.rows_sent[passed], traffic.rows_received[passed]) == (out, into), passed


def check(cases: list[Case], problems: dict[str, Problem], dtype: torch.dtype, by_rank: list[Any]) -> None:
    """Values and traffic of all cases on all ranks; a failure names its case."""
    for rank, answers in enumerate(by_rank):
        for (name, way, recompute), (got, traffic) in zip(cases, answers, strict=True):
            try:
                check_values(problems[name], rank, got, dtype)
                check_traffic(problems[name], rank, traffic)
            except AssertionError as error:
                raise AssertionError(f"{name}, {way}, recompute={recompute}: {error}") from None


def groups() -> list[tuple[int, list[Case]]]:
    """Cases by number of ranks; each way recomputes in every other problem."""
    found: dict[int, list[Case]] = {}
    for number, (name, problem) in enumerate(PROBLEMS.items()):
        ranks = len(problem.tokens)
        for turn, way in enumerate(FEWER.get(name, WAYS if ranks > 1 else WAYS[:1])):
            found.setdefault(ranks, []).append((name, way, (number + turn) % 2 == 1))
    return sorted(found.items())


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "ranks,cases",
    [pytest.param(*group, marks=pytest.mark.slow if group[0] > 4 else ()) for group in groups()],
    ids=lambda v: str(v) if isinstance(v, int) else "cases",
)
def test_ranks_compute_each_token_times_its_experts(ranks: int, cases: list[Case], tmp_path: Path) -> None:
    by_rank = run_distributed(rank_runs, ranks, cases, PROBLEMS, torch.float32, tmp_path, timeout=380)
    check(cases, PROBLEMS, torch.float32, by_rank)


@pytest.mark.gpu
@requires_gpus(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_two_gpus_compute_each_token_times_its_experts(dtype: torch.dtype, tmp_path: Path) -> None:
    problems = LARGE | {name: problem for name, problem in PROBLEMS.items() if len(problem.tokens) == 2}
    ways = [w for w in WAYS if w.transport == "collective" or os.environ.get("NCCL_P2P_DISABLE") != "1"]
    matmuls = ("joint", "library") if dtype == torch.bfloat16 else ("triton",)
    cases = [
        (name, Way(matmul, way.transport, way.chunks), (number + m + w) % 2 == 1)
        for number, name in enumerate(problems)
        for m, matmul in enumerate(matmuls)
        for w, way in enumerate(ways)
    ]
    by_rank = run_distributed(rank_runs, 2, cases, problems, dtype, tmp_path, timeout=380, backend="nccl")
    check(cases, problems, dtype, by_rank)


IN_A_ROW = [Problem((1, 1), 8, 3), Problem((5, 6), 8, 3), Problem((5, 6), 8, 3, "last device"), Problem((4, 6), 8, 3)]
"""The second needs larger buffers and more room than the first left behind; the third, room for more expanded rows in
the same buffers; the fourth less, but not much."""


def rank_runs_in_a_row(rank: int, ways: list[Way], folder: Path) -> list[Any]:
    """For each way, one layer's answers to all problems, the rows that it expected and the bytes of its buffer."""
    MappedBox.install(folder)
    grid = Grid.create(2)
    found = []
    for way in ways:
        layer = FusedExperts(grid, 8, Traffic(), way)
        answers, expected, nbytes = [], [], []
        for problem in IN_A_ROW:
            answers.append(Run(layer, problem, rank).backward())
            assert layer.room is not None
            expected.append(layer.room.expanded)
            nbytes += [layer.transport.boxes[0].nbytes] if isinstance(layer.transport, SymmetricTransport) else []
        found.append((answers, expected, nbytes))
    return found


def test_a_layer_grows_with_its_problems(tmp_path: Path) -> None:
    ways = WAYS[2:]
    for rank, found in enumerate(run_distributed(rank_runs_in_a_row, 2, ways, tmp_path)):
        for answers, expected, _ in found:
            for problem, got in zip(IN_A_ROW, answers, strict=True):
                check_values(problem, rank, got)
            assert expected[0] < expected[1] < expected[2]
        first, second, third, fourth = found[-1][2]
        assert 0 < first < second == third == fourth
