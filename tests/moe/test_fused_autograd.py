"""What the fused layer keeps, what it skips, and how it gets on with the rest of torch."""

import weakref
from typing import Any

import pytest
import torch
from fused_problems import HIDDEN, INPUTS, WIDTH, Problem, Run, check_values
from torch import Tensor

from occult_train.moe import fused
from occult_train.moe.fused import FusedExperts, Way
from occult_train.moe.fused_backward import Backward
from occult_train.moe.fused_forward import Forward
from occult_train.moe.routes import Routes
from occult_train.parallel.grid import Grid
from occult_train.parallel.traffic import Traffic
from occult_train.testing import run_distributed

ONE = Problem((3,), 6, 2)
TWO = Problem((2, 3), 8, 3)
LEAST_ROW = 32
"""Bytes to which a row on the wire is rounded up."""


def layer_of(problem: Problem, chunks: int = 0, recompute: bool = False, grid: Grid | None = None) -> FusedExperts:
    return FusedExperts(grid or Grid(), problem.experts, Traffic(), Way("triton", "collective", chunks), recompute)


def storages(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes of the memory that tensors live in, by address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}


def kept_by(routes: Routes) -> list[Tensor]:
    """Maps as long as there are tokens; the layout's few numbers are not counted."""
    return [routes.position_TK, routes.own_TK, routes.send_TD]


def rank_measures(rank: int, cases: list[tuple[int, bool]]) -> list[tuple[int, int]]:
    """Bytes that a forward keeps beside its inputs, and what the formula of `fused.py` says."""
    grid = Grid.create(2)
    found = []
    for chunks, recompute in cases:
        layer = layer_of(TWO, chunks, recompute, grid)
        run = Run(layer, TWO, rank)
        saved = [*run.y.grad_fn.saved_tensors, *run.y.grad_fn.kept]
        steps = run.y.grad_fn.steps
        inputs = storages([*run.leaves.values()])
        kept = storages([*saved, *kept_by(steps.routes)])
        nbytes = sum(size for address, size in kept.items() if address not in inputs)
        tokens, k, arrived = TWO.tokens[rank], TWO.top_k, sum(row[rank] for row in TWO.rows())
        row = -(-(HIDDEN * 4 + 2 * k * 4) // LEAST_ROW) * LEAST_ROW
        pre_activations = 0 if recompute else 2 * steps.counts.expanded * WIDTH * 4
        maps = sum(-(-tokens * width * 4 // 16) * 16 for width in (k, k, 2))
        found.append((nbytes, arrived * row + pre_activations + maps))
    return found


def test_backward_keeps_what_is_documented() -> None:
    cases = [(0, False), (0, True), (2, False), (2, True)]
    for rank, found in enumerate(run_distributed(rank_measures, 2, cases)):
        for case, (kept, formula) in zip(cases, found, strict=True):
            assert kept == formula, (rank, case)


def test_memory_of_rows_is_free_before_the_last_weight_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The expanded dy, of which nothing but x's expanded rows may live beside the gradients of w1 and w3."""
    rows: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    class Spy(Backward):
        def begin(self) -> None:
            super().begin()
            assert self.rows_XH is not None
            rows.append(weakref.ref(self.rows_XH))

        def _gate_up_gradients(self) -> tuple[Tensor | None, Tensor | None]:
            alive.append(rows[0]() is not None)
            return super()._gate_up_gradients()

    monkeypatch.setattr(fused, "Backward", Spy)
    Run(layer_of(ONE), ONE, 0).backward()
    assert alive == [False]


def test_without_grad_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    forwards: list[Forward] = []

    class Spy(Forward):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            forwards.append(self)

    monkeypatch.setattr(fused, "Forward", Spy)
    with torch.no_grad():
        run = Run(layer_of(ONE), ONE, 0)
    assert not run.y.requires_grad
    assert not forwards[0].keep
    assert not forwards[0].kept
    frozen = Run(layer_of(ONE), ONE, 0, without=INPUTS)
    assert not frozen.y.requires_grad
    assert not forwards[1].kept
    assert Run(layer_of(ONE), ONE, 0).y.requires_grad
    assert len(forwards[2].kept) == 2


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("without", INPUTS)
def test_what_needs_no_gradient_gets_none(without: str, recompute: bool) -> None:
    run = Run(layer_of(ONE, recompute=recompute), ONE, 0, without=(without,))
    check_values(ONE, 0, run.backward(), without=without)


def test_weight_products_are_left_out_without_weight_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(ONE)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a weight gradient was computed")

    run = Run(layer, ONE, 0, without=("w1", "w2", "w3"))
    monkeypatch.setattr(fused.triton_matmul, "tn", refuse)
    got = run.backward()
    assert got[3:] == [None, None, None]
    assert got[1] is not None


def test_a_second_run_gives_the_same_bits() -> None:
    first, second = (Run(layer_of(ONE), ONE, 0).backward() for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_recomputing_gives_the_same_bits() -> None:
    kept, anew = (Run(layer_of(ONE, recompute=r), ONE, 0).backward() for r in (False, True))
    for a, b in zip(kept, anew, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_backward_runs_once() -> None:
    run = Run(layer_of(ONE), ONE, 0)
    run.y.backward(run.dy, retain_graph=True)
    with pytest.raises(RuntimeError, match="backward runs only once"):
        run.y.backward(run.dy)


def test_a_compiled_module_around_it_runs() -> None:
    layer = layer_of(ONE)

    class Around(torch.nn.Module):
        def forward(self, x: Tensor, slots: Tensor, *weights: Tensor) -> Tensor:
            return 2 * layer(x * 1, slots, *weights).relu()

    torch._dynamo.reset()
    compiled = torch.compile(Around(), backend="aot_eager")
    plain = Run(layer, ONE, 0)
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in plain.leaves.items()}
    x, *weights = leaves.values()
    compiled(x, ONE.slots()[0], *weights).backward(plain.dy)
    (2 * plain.y.relu()).backward(plain.dy)
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, plain.leaves[name].grad), name  # type: ignore[arg-type]
