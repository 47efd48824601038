"""The fused layer against every token times its own experts in float64, on several ranks.

On CPU the kernels are interpreted, and memory that all ranks map stands for symmetric memory: rows are then written by
the same kernels through the same address tables.
"""

import itertools
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from occult_train.moe import transport
from occult_train.moe.fused import FusedExperts, Way
from occult_train.moe.transport import SymmetricBox
from occult_train.parallel.grid import Grid
from occult_train.parallel.traffic import PASSES, Traffic
from occult_train.testing import requires_gpus, run_distributed

HIDDEN, WIDTH = 40, 24
NAMES = ("y", "dx", "dweights", "dw1", "dw2", "dw3")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""‖got − ref‖/‖ref‖; measured: fp32 3e-7, bf16 5e-3, fp16 7e-4."""


@dataclass(frozen=True)
class Problem:
    """Tokens of each rank, and where they go."""

    tokens: tuple[int, ...]
    experts: int
    top_k: int
    aim: str = "anywhere"
    """anywhere, or all at the experts of one device."""

    def slots(self) -> list[Tensor]:
        """[T, K] of each rank."""
        generator = torch.Generator().manual_seed(7)
        local = self.experts // len(self.tokens)
        found = []
        for tokens in self.tokens:
            scores = torch.rand(tokens, self.experts, generator=generator)
            if self.aim == "last device":
                scores[:, :-local] -= 2
            found.append(scores.topk(self.top_k, dim=1).indices)
        return found

    def rows(self) -> list[list[int]]:
        """Rows from each rank to each device by METHODS: a token crosses once a device, never to its own."""
        local = self.experts // len(self.tokens)
        table = []
        for rank, slots in enumerate(self.slots()):
            sets = [{int(s) // local for s in token} - {rank} for token in slots]
            table.append([sum(d in s for s in sets) for d in range(len(self.tokens))])
        return table


PROBLEMS = {
    "one rank": Problem((70,), 6, 3),
    "primes": Problem((67, 131), 8, 3),
    "a rank without tokens": Problem((0, 7), 8, 3),
    "no tokens at all": Problem((0, 0), 8, 3),
    "one device": Problem((65, 3), 8, 4, "last device"),
    "all experts": Problem((5, 11), 6, 6),
    "four ranks": Problem((65, 0, 130, 3), 8, 3),
    "one expert a rank": Problem((13, 29, 5, 17), 4, 2),
}


@cache
def exact(problem: Problem) -> dict[str, list[Tensor]]:
    """NAMES by rank, in float64: each token times the weights of each of its experts."""
    generator = torch.Generator().manual_seed(3)
    e, local = problem.experts, problem.experts // len(problem.tokens)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).bfloat16().double().requires_grad_()

    w1, w3 = (draw(e, WIDTH, HIDDEN) for _ in range(2))
    w2 = draw(e, HIDDEN, WIDTH)
    inputs: dict[str, list[Tensor]] = {name: [] for name in ("x", "weights", "dy", "y")}
    for tokens, slots in zip(problem.tokens, problem.slots(), strict=True):
        x, weights, dy = draw(tokens, HIDDEN), draw(tokens, problem.top_k), draw(tokens, HIDDEN)
        y = torch.zeros(tokens, HIDDEN, dtype=torch.float64) + 0 * w1.sum()
        for k in range(problem.top_k):
            s = slots[:, k]
            h = F.silu(torch.einsum("tfh,th->tf", w1[s], x)) * torch.einsum("tfh,th->tf", w3[s], x)
            y = y + weights[:, k, None] * torch.einsum("thf,tf->th", w2[s], h)
        for name, value in zip(inputs, (x, weights, dy, y), strict=True):
            inputs[name].append(value)
    sum((y * dy.detach()).sum() for y, dy in zip(inputs["y"], inputs["dy"], strict=True)).backward()  # type: ignore
    found = {name: [v.detach() for v in values] for name, values in inputs.items()}
    found["dx"] = [_grad(x) for x in inputs["x"]]
    found["dweights"] = [_grad(w) for w in inputs["weights"]]
    for name, w in (("w1", w1), ("w2", w2), ("w3", w3)):
        found[name], found[f"d{name}"] = list(w.detach().split(local)), list(_grad(w).split(local))
    return found


def _grad(value: Tensor) -> Tensor:
    return torch.zeros_like(value) if value.grad is None else value.grad


class MappedBox(SymmetricBox):
    """Symmetric memory of processes of one machine without GPUs: files that all of them map."""

    folder = Path()

    def _grow(self, nbytes: int) -> None:
        rank, size = dist.get_rank(self.grid.expert_group), self.grid.expert_size
        name = next(n for (_, n), box in transport._BOXES.items() if box is self)
        with (self.folder / f"{name}-{nbytes}-{rank}").open("wb") as file:
            file.write(torch.full((nbytes // 4,), float("nan")).numpy().tobytes())
        dist.barrier(self.grid.expert_group)
        self._maps = []
        for peer in range(size):
            with (self.folder / f"{name}-{nbytes}-{peer}").open("r+b") as file:
                self._maps.append(torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=torch.uint8))
        self._memory = self._maps[rank]
        self.address_D = torch.tensor([m.data_ptr() for m in self._maps])
        self.nbytes = nbytes

    def barrier(self) -> None:
        dist.barrier(self.grid.expert_group)


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


def rank_runs(rank: int, cases: list[tuple[str, Way, bool]], dtype: torch.dtype, folder: Path) -> list[Any]:
    """Each case on this rank: its outputs, gradients and traffic."""
    cuda = dist.get_backend() == "nccl"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if not cuda:
        MappedBox.folder = folder
        transport.SymmetricBox = MappedBox  # type: ignore
    grid = Grid.create(dist.get_world_size())
    answers = []
    for name, way, recompute in cases:
        problem = PROBLEMS[name]
        data = {key: value[rank].to(device) for key, value in exact(problem).items()}
        leaves = [data[n].to(dtype).requires_grad_() for n in ("x", "w1", "w2", "w3")]
        weights = data["weights"].float().requires_grad_()
        traffic = Traffic()
        layer = FusedExperts(grid, problem.experts, traffic, way, recompute)
        with entering(grid) as entered:
            y = layer(leaves[0], problem.slots()[rank].to(device), weights, *leaves[1:])
            y.backward(data["dy"].to(dtype))
        if way.transport == "collective":
            check_entered(entered, traffic)
        got = (y.detach(), leaves[0].grad, weights.grad, *(leaf.grad for leaf in leaves[1:]))
        answers.append(([g.cpu() for g in got], traffic))  # type: ignore[union-attr]
    return answers


def check_entered(entered: list[Entered], traffic: Traffic) -> None:
    """The counters tell what the collectives were given, and that is no row of one's own."""
    assert sum(call.rows for call in entered) == sum(traffic.rows_sent.values())
    assert sum(call.nbytes for call in entered) == sum(traffic.bytes_sent.values())
    assert not any(call.own_rows for call in entered)


def check(name: str, rank: int, got: list[Tensor], traffic: Traffic, dtype: torch.dtype) -> None:
    """Values within the type's error, and exactly the rows that METHODS counts."""
    want = exact(PROBLEMS[name])
    for label, value in zip(NAMES, got, strict=True):
        expected = want[label][rank]
        assert value.shape == expected.shape
        error = float((value.double() - expected).norm()) / max(float(expected.norm()), 1e-30)
        assert error <= TOLERANCE[dtype], f"{label} is {error:.1e} off on rank {rank}"
    table = PROBLEMS[name].rows()
    sent, arrived = sum(table[rank]), sum(row[rank] for row in table)
    forth, back = (sent, arrived), (arrived, sent)
    for passed, (out, into) in zip(PASSES, (forth, back, forth, back), strict=True):
        assert (traffic.rows_sent[passed], traffic.rows_received[passed]) == (out, into), passed


WAYS = [Way("triton", "collective", c) for c in (0, 1, 3)] + [Way("triton", "symmetric", 0)]


def groups(names: list[str]) -> list[tuple[int, list[tuple[str, Way, bool]]]]:
    """Cases by number of ranks; recomputing goes with every other one."""
    found: dict[int, list[tuple[str, Way, bool]]] = {}
    for number, (name, way) in enumerate(itertools.product(names, WAYS)):
        ranks = len(PROBLEMS[name].tokens)
        if ranks > 1 or way == WAYS[0]:
            found.setdefault(ranks, []).append((name, way, number % 2 == 1))
    return sorted(found.items())


@pytest.mark.timeout(400)
@pytest.mark.parametrize("ranks,cases", groups(list(PROBLEMS)), ids=lambda v: str(v) if isinstance(v, int) else "cases")
def test_ranks_compute_each_token_times_its_experts(
    ranks: int, cases: list[tuple[str, Way, bool]], tmp_path: Path
) -> None:
    by_rank = run_distributed(rank_runs, ranks, cases, torch.float32, tmp_path, timeout=380)
    for rank, answers in enumerate(by_rank):
        for (name, way, recompute), (got, traffic) in zip(cases, answers, strict=True):
            try:
                check(name, rank, got, traffic, torch.float32)
            except AssertionError as error:
                raise AssertionError(f"{name}, {way}, recompute={recompute}: {error}") from None


@pytest.mark.gpu
@requires_gpus(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_two_gpus_compute_each_token_times_its_experts(dtype: torch.dtype, tmp_path: Path) -> None:
    names = [name for name, problem in PROBLEMS.items() if len(problem.tokens) == 2]
    ways = [w for w in WAYS if w.transport == "collective" or os.environ.get("NCCL_P2P_DISABLE") != "1"]
    matmuls = ("triton", "library") if dtype == torch.bfloat16 else ("triton",)
    cases = [
        (n, Way(m, w.transport, w.chunks), i % 2 == 1)
        for i, (n, m, w) in enumerate(itertools.product(names, matmuls, ways))
    ]
    by_rank = run_distributed(rank_runs, 2, cases, dtype, tmp_path, timeout=380, backend="nccl")
    for rank, answers in enumerate(by_rank):
        for (name, _, _), (got, traffic) in zip(cases, answers, strict=True):
            check(name, rank, got, traffic, dtype)
