"""SwiGLU against float64, its reference, and autograd of what it is the gradient of."""

import pytest
import torch
from groups import check_close, exact, normal
from torch import Tensor
from torch.nn import functional as F

from occult_train.kernels.swiglu import autograd, kernel, reference

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [(1, 1), (3, 63), (5, 100), (2, 255), (4, 256), (3, 600), (2, 2049), (1, 4096)]
"""Rows and widths: less than a step, no multiple of one, several."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gate, up, grad and weight; gates far from zero among them."""
    gate, up, grad = (normal(rows, width, device=device, dtype=dtype, seed=s) for s in range(3))
    gate[:, 0] = torch.tensor([30.0, -30.0, 0.0, 80.0, -80.0])[:rows].to(gate)
    return gate, up, grad, normal(rows, device=device, seed=4)


def run_backward(gate: Tensor, up: Tensor, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = gate.shape
    both, weighted = gate.new_empty(rows, 2 * width), torch.empty_like(gate)
    scalar = torch.empty(rows, device=gate.device)
    kernel.backward(gate, up, grad, weight, both, weighted, scalar)
    return both, weighted, scalar


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,width", SHAPES)
def test_forward(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    gate, up, _, _ = inputs(rows, width, dtype, device)
    got = kernel.forward(gate, up)
    assert got.dtype == dtype
    a, b = exact(gate, up)
    check_close(got, F.silu(a) * b)
    check_close(got, reference.forward(gate, up).double().cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,width", SHAPES)
def test_backward(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    given = inputs(rows, width, dtype, device)
    got, expected = run_backward(*given), reference.backward(*exact(*given))  # type: ignore[arg-type]
    for value, want in zip(got, expected, strict=True):
        check_close(value, want.double())
    assert [value.dtype for value in got] == [dtype, dtype, torch.float32]
    for value, want in zip(got, reference.backward(*given), strict=True):
        assert value.dtype == want.dtype
        check_close(value, want.double().cpu())


def test_backward_is_what_autograd_finds(device: torch.device) -> None:
    """Of y = weight * (silu(gate) * up) w2, row by row, with grad = dy w2."""
    rows, width, hidden = 5, 100, 8
    gate, up, _, weight = inputs(rows, width, torch.float32, device)
    w2, dy = normal(hidden, width, device=device, seed=5), normal(rows, hidden, device=device, seed=6)
    a, b, w, m, d = exact(gate, up, weight, w2, dy)
    leaves = [t.requires_grad_() for t in (a, b, w, m)]
    ((w[:, None] * F.silu(a) * b @ m.t()) * d).sum().backward()
    wanted = [leaf.grad for leaf in leaves]
    both, weighted, scalar = run_backward(gate, up, dy @ w2, weight)
    assert all(g is not None for g in wanted)
    check_close(both[:, :width], wanted[0])  # type: ignore[arg-type]
    check_close(both[:, width:], wanted[1])  # type: ignore[arg-type]
    check_close(scalar, wanted[2], bound=1e-5)  # type: ignore[arg-type]
    check_close(dy.t() @ weighted, wanted[3], bound=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [63, 600])
def test_the_weighted_rows_may_take_the_place_of_the_gradient(width: int, device: torch.device) -> None:
    gate, up, grad, weight = inputs(3, width, torch.bfloat16, device)
    expected = run_backward(gate, up, grad, weight)
    both, scalar = gate.new_empty(3, 2 * width), torch.empty(3, device=device)
    kernel.backward(gate, up, grad, weight, both, grad, scalar)
    for value, want in zip((both, grad, scalar), expected, strict=True):
        assert torch.equal(value, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,width", SHAPES)
def test_gradients(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Of a dense layer's, against autograd in float64 and the reference; the incoming gradient lies anyhow."""
    gate, up, grad, _ = inputs(rows, width, dtype, device)
    a, b, g = exact(gate, up, grad)
    (F.silu(a.requires_grad_()) * b.requires_grad_()).backward(g)
    gate.requires_grad_()
    up.requires_grad_()
    y = autograd._SwiGLU.apply(gate, up)
    y.backward(grad.t().contiguous().t())
    check_close(y.detach(), (F.silu(a) * b).detach())
    for got, want, plain in zip(
        (gate.grad, up.grad),
        (a.grad, b.grad),
        reference.gradients(*exact(gate.detach(), up.detach(), grad)),
        strict=True,
    ):
        assert got is not None
        assert want is not None
        assert got.dtype == dtype
        check_close(got, want)
        torch.testing.assert_close(plain, want)


def test_of_a_dense_layer_wherever_it_runs(device: torch.device) -> None:
    gate, up = (normal(2, 3, 40, device=device, seed=s).requires_grad_() for s in range(2))
    a, b = (t.requires_grad_() for t in exact(gate.detach(), up.detach()))
    y, expected = autograd.swiglu(gate, up), F.silu(a) * b
    assert y.shape == (2, 3, 40)
    y.square().sum().backward()
    expected.square().sum().backward()
    check_close(y.detach(), expected.detach())
    for got, want in ((gate.grad, a.grad), (up.grad, b.grad)):
        assert got is not None
        assert want is not None
        check_close(got, want)


def test_without_rows_nothing_happens(device: torch.device) -> None:
    none = normal(0, 7, device=device)
    assert kernel.forward(none, none).shape == (0, 7)
    assert [v.shape for v in kernel.gradients(none, none, none)] == [(0, 7), (0, 7)]
    assert [v.shape for v in run_backward(none, none, none, none[:, 0])] == [(0, 14), (0, 7), (0,)]


def test_what_does_not_belong_together_is_refused(device: torch.device) -> None:
    a, b = normal(3, 8, device=device), normal(3, 9, device=device)
    with pytest.raises(ValueError, match=r"\(3, 8\).*\(3, 9\)"):
        kernel.forward(a, b)
    with pytest.raises(ValueError, match=r"float32.*bfloat16"):
        kernel.forward(a, a.bfloat16())
    with pytest.raises(ValueError, match="contiguous"):
        kernel.forward(a.t(), a.t())
    with pytest.raises(ValueError, match=r"contiguous \(3, 16\), got \(3, 15\)"):
        kernel.backward(a, a, a, a[:, 0], normal(3, 15, device=device), a, a[:, 0])


@pytest.mark.parametrize("width,columns", [(1, 256), (256, 256), (257, 512), (512, 512), (600, 256), (768, 256)])
def test_columns_waste_few_lanes(width: int, columns: int) -> None:
    assert kernel._columns(width) == columns
