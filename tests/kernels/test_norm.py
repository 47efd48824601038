"""RMSNorm against float64, the reference and autograd."""

import pytest
import torch
from groups import check_close, exact, normal
from torch import Tensor
from torch.nn import functional as F

from occult_train.kernels.norm import autograd, kernel, reference

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [(1, 1), (37, 8), (5, 100), (33, 128), (3, 2048), (2, 2049), (3, 4099)]
"""Rows and widths: several rows to a tile and one, no multiple of either."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


def inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows (the first of zeros), weight, the output's gradient and x's from elsewhere."""
    x, grad, beside = (normal(rows, width, device=device, dtype=dtype, seed=s) for s in range(3))
    x[:1] = 0
    return x, normal(width, device=device, dtype=dtype, seed=3), grad, beside


@pytest.mark.parametrize("alone", [False, True], ids=["branch", "alone"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,width", SHAPES)
def test_both_ways(rows: int, width: int, dtype: torch.dtype, alone: bool, device: torch.device) -> None:
    x, weight, grad, beside = inputs(rows, width, dtype, device)
    a, w, g, b = exact(x, weight, grad, beside)
    a.requires_grad_()
    w.requires_grad_()
    expected = F.rms_norm(a, (width,), w, EPS)
    torch.autograd.backward([expected] if alone else [expected, a * 1], [g] if alone else [g, b])
    _, scale_N = reference.forward(*exact(x, weight), EPS)
    plain = reference.backward(*exact(x, weight), scale_N, g, None if alone else b)

    x.requires_grad_()
    weight.requires_grad_()
    same, y = autograd._Branch.apply(x, weight, EPS)
    assert same.data_ptr() == x.data_ptr()
    torch.autograd.backward([y] if alone else [y, same], [grad] if alone else [grad, beside.t().contiguous().t()])
    for got, want in ((y, expected), (x.grad, a.grad), (weight.grad, w.grad)):
        assert got is not None
        assert want is not None
        assert got.dtype == dtype
        check_close(got.detach(), want.detach())
    for other, want in zip(plain, (a.grad, w.grad), strict=True):
        torch.testing.assert_close(other, want)


def test_more_rows_than_programs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs take several tiles, the last of which are not full; the weight's gradient has all."""
    monkeypatch.setattr(kernel, "PROGRAMS", 3)
    monkeypatch.setattr(kernel, "_multiprocessors", lambda device: 1)
    x, weight, grad, _ = inputs(2 * 7 * 16 - 1, 128, torch.float32, device)
    y, scale_N = kernel.forward(x, weight, EPS)
    right = reference.forward(*exact(x, weight), EPS)
    check_close(y, right[0])
    wanted = reference.backward(*exact(x, weight), right[1], *exact(grad))
    for got, want in zip(kernel.backward(x, weight, scale_N, grad), wanted, strict=True):
        check_close(got, want)


def test_a_weight_of_a_wider_type_widens_the_output(device: torch.device) -> None:
    x, weight, grad, _ = inputs(5, 100, torch.bfloat16, device)
    y, scale_N = kernel.forward(x, weight.float(), EPS)
    d_x, d_weight = kernel.backward(x, weight.float(), scale_N, grad)
    assert (y.dtype, d_x.dtype, d_weight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    check_close(y, reference.forward(*exact(x, weight), EPS)[0])


def test_differentiable_wherever_it_runs(device: torch.device) -> None:
    """Rows of a batch that lie apart in memory; what is returned for them is used in their place."""
    x = normal(3, 2, 40, device=device).transpose(0, 1).requires_grad_()
    weight = normal(40, device=device, seed=1).requires_grad_()
    a, w = (t.requires_grad_() for t in exact(x.detach(), weight.detach()))
    same, y = autograd.branch(x, weight, EPS)
    (same * 3 + y.square()).sum().backward()
    (a * 3 + F.rms_norm(a, (40,), w, EPS).square()).sum().backward()
    for got, want in ((y, F.rms_norm(a, (40,), w, EPS)), (x.grad, a.grad), (weight.grad, w.grad)):
        assert got is not None
        assert want is not None
        check_close(got.detach(), want.detach())


def test_only_what_was_used_has_gradients(device: torch.device) -> None:
    x, weight, _, beside = (t.requires_grad_() for t in inputs(3, 8, torch.float32, device))
    autograd._Branch.apply(x, weight, EPS)[0].backward(beside)
    assert weight.grad is None
    assert x.grad is not None
    assert torch.equal(x.grad, beside)


def test_without_rows_nothing_happens(device: torch.device) -> None:
    none, weight = normal(0, 7, device=device), normal(7, device=device)
    y, scale_N = kernel.forward(none, weight, EPS)
    d_x, d_weight = kernel.backward(none, weight, scale_N, none)
    assert (y.shape, scale_N.shape, d_x.shape) == ((0, 7), (0,), (0, 7))
    assert torch.equal(d_weight, torch.zeros_like(weight))


def test_what_does_not_belong_together_is_refused(device: torch.device) -> None:
    x, weight = normal(3, 8, device=device), normal(8, device=device)
    with pytest.raises(ValueError, match=r"\(3, 8\), \(9,\)"):
        kernel.forward(x, normal(9, device=device), EPS)
    with pytest.raises(ValueError, match=r"\(3, 8\), \(8,\), \(3, 9\)"):
        kernel.backward(x, weight, normal(3, device=device), normal(3, 9, device=device))
    with pytest.raises(ValueError, match="contiguous rows are needed, got strides"):
        kernel.forward(normal(8, 3, device=device).t(), weight, EPS)
    with pytest.raises(ValueError, match=r"up to 16384 are normed, got 16385"):
        kernel.forward(normal(1, 16385, device=device), normal(16385, device=device), EPS)
