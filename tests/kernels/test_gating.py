"""Rows times the sigmoid of a number each, against float64, the reference and autograd."""

import pytest
import torch
from groups import check_close, exact, normal
from torch import Tensor

from occult_train.kernels.gating import autograd, kernel, reference

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [(1, 1), (3, 63), (5, 100), (2, 256), (3, 600), (2, 2049), (2, 4099)]
"""Rows and widths: less than a step, no multiple of one, several."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, logits (some far from zero) and the output's gradient."""
    x, grad = (normal(rows, width, device=device, dtype=dtype, seed=s) for s in range(2))
    logit = normal(rows, device=device, dtype=dtype, seed=2)
    logit[:1] = 10.0
    return x, logit, grad


@pytest.mark.parametrize("added", [False, True], ids=["alone", "added"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,width", SHAPES)
def test_both_ways(rows: int, width: int, dtype: torch.dtype, added: bool, device: torch.device) -> None:
    x, logit, grad = inputs(rows, width, dtype, device)
    beside = normal(rows, width, device=device, dtype=dtype, seed=3).requires_grad_() if added else None
    a, w, g = exact(x, logit, grad)
    b = 0 if beside is None else beside.detach().cpu().double()
    expected = w.requires_grad_().sigmoid()[:, None] * a.requires_grad_() + b
    expected.backward(g)
    rest = () if beside is None else exact(beside.detach())
    plain = reference.forward(*exact(x, logit), *rest), *reference.backward(*exact(x, logit, grad))
    x.requires_grad_()
    logit.requires_grad_()
    y = autograd._Gated.apply(x, logit, beside)
    y.backward(grad.t().contiguous().t())
    assert beside is None or (beside.grad is not None and torch.equal(beside.grad, grad))
    for got, want, other in zip((y, x.grad, logit.grad), (expected, a.grad, w.grad), plain, strict=True):
        assert got is not None
        assert want is not None
        assert (got.shape, got.dtype) == (want.shape, dtype)
        torch.testing.assert_close(other, want.detach())
        check_close(got.detach(), want.detach())


def test_differentiable_wherever_it_runs(device: torch.device) -> None:
    """Rows of a batch that lie apart in memory, and logits as a layer gives them."""
    x, logit = normal(3, 2, 40, device=device).transpose(0, 1).requires_grad_(), normal(2, 3, 1, device=device, seed=1)
    a, w = exact(x.detach(), logit)
    y, expected = autograd.gated(x, logit.requires_grad_()), w.requires_grad_().sigmoid() * a.requires_grad_()
    check_close(autograd.gated(x, logit, 2 * x).detach(), (expected + 2 * a).detach())
    y.square().sum().backward()
    expected.square().sum().backward()
    for got, want in ((y, expected), (x.grad, a.grad), (logit.grad, w.grad)):
        assert got is not None
        assert want is not None
        check_close(got.detach(), want.detach())


def test_without_rows_nothing_happens(device: torch.device) -> None:
    none = normal(0, 7, device=device)
    assert kernel.forward(none, none[:, 0].contiguous()).shape == (0, 7)
    assert [v.shape for v in kernel.backward(none, none[:, 0].contiguous(), none)] == [(0, 7), (0,)]


def test_what_does_not_belong_together_is_refused(device: torch.device) -> None:
    x, logit = normal(3, 8, device=device), normal(3, device=device)
    with pytest.raises(ValueError, match=r"\(3, 8\), \(4,\)"):
        kernel.forward(x, normal(4, device=device))
    with pytest.raises(ValueError, match=r"\(3, 8\), \(3,\), \(3, 9\)"):
        kernel.backward(x, logit, normal(3, 9, device=device))
    with pytest.raises(ValueError, match="contiguous rows and logits are needed, got strides"):
        kernel.forward(normal(8, 3, device=device).t(), logit)
