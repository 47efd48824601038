"""Rotary embedding in one pass against float64, the model's formula, and autograd."""

import pytest
import torch
from groups import check_close, exact, normal
from torch import Tensor

from occult_train.kernels.rotary import autograd, kernel, reference
from occult_train.models.attention import positions
from occult_train.models.config import ModelConfig

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1, 2), (2, 3, 5, 6), (1, 4, 3, 64), (3, 5, 2, 20), (2, 1, 4, 128)]
"""Batch, heads, sequence and width of a head."""


def angles(shape: tuple[int, ...], documents: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines as attention has them; they differ between sequences where documents are kept apart."""
    b, _, s, d = shape
    config = ModelConfig(hidden_size=d, num_attention_heads=1, head_dim=d, max_position_embeddings=64)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 2, (b, s), generator=generator).cumsum(1).to(device) if documents else None
    found = positions(config, torch.zeros(b, s, dtype=torch.int64, device=device), ids)
    return found.cos.contiguous() + 0.1, found.sin.contiguous() - 0.2  # no zeros or ones, also at position 0


def laid_out(shape: tuple[int, ...], heads_inside: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[B, N, S, D] in that order of memory, or as attention has it: [B, S, N, D], a part of wider rows."""
    b, n, s, d = shape
    if not heads_inside:
        return normal(*shape, device=device, dtype=dtype)
    return normal(b, s, n + 2, d, device=device, dtype=dtype)[:, :, :n].transpose(1, 2)


def former(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pair by pair: (x1, x2) turned by the angle of each."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    c, s = cos[..., :half], sin[..., :half]
    return torch.cat((a * c - b * s, b * c + a * s), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("heads_inside", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotate(
    shape: tuple[int, ...], heads_inside: bool, documents: bool, dtype: torch.dtype, device: torch.device
) -> None:
    x, (cos, sin) = laid_out(shape, heads_inside, dtype, device), angles(shape, documents, device)
    got = kernel.rotate(x, cos, sin)
    assert (got.shape, got.dtype) == (x.shape, dtype)
    assert got.transpose(1, 2).is_contiguous()
    wide = exact(x, cos, sin)
    check_close(got, reference.rotate(*wide))
    torch.testing.assert_close(reference.rotate(*wide), former(*wide), rtol=1e-12, atol=1e-12)
    # the reference also rounds the angles' cosines and sines
    check_close(reference.rotate(x, cos, sin), former(*wide), bound={torch.float32: 1e-6}.get(dtype, 1e-2))


def test_a_quarter_turn_by_hand(device: torch.device) -> None:
    """Cosine 0 and sine 1 take (1, 2 | 3, 4) to (-3, -4 | 1, 2)."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device).view(1, 1, 1, 4)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    assert kernel.rotate(x, zero, one).flatten().tolist() == [-3, -4, 1, 2]
    assert kernel.rotate(x, zero, one, sign=-1).flatten().tolist() == [3, 4, -1, -2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_gradient(shape: tuple[int, ...], documents: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Also where the incoming gradient's heads have their values apart."""
    x, (cos, sin) = laid_out(shape, True, dtype, device).requires_grad_(), angles(shape, documents, device)
    grad = normal(*shape[:2], shape[3], shape[2], device=device, dtype=dtype, seed=1).transpose(2, 3)
    leaf, c, s, g = exact(x.detach(), cos, sin, grad)
    reference.rotate(leaf.requires_grad_(), c, s).backward(g)
    y = autograd._Rotate.apply(x, cos, sin)
    y.backward(grad)
    assert x.grad is not None
    assert leaf.grad is not None
    check_close(y.detach(), reference.rotate(leaf.detach(), c, s))
    check_close(x.grad, leaf.grad)


def test_rotate_is_differentiable_wherever_it_runs(device: torch.device) -> None:
    shape = SHAPES[1]
    x, (cos, sin) = laid_out(shape, True, torch.float32, device).requires_grad_(), angles(shape, True, device)
    leaf, c, s = exact(x.detach(), cos, sin)
    y = autograd.rotate(x, cos, sin)
    (y * y).sum().backward()
    expected = reference.rotate(leaf.requires_grad_(), c, s)
    (expected * expected).sum().backward()
    assert x.grad is not None
    assert leaf.grad is not None
    check_close(y.detach(), expected.detach())
    check_close(x.grad, leaf.grad)


def test_without_positions_nothing_happens(device: torch.device) -> None:
    x = normal(2, 3, 0, 4, device=device)
    cos = torch.zeros(1, 1, 0, 4, device=device)
    assert kernel.rotate(x, cos, cos).shape == (2, 3, 0, 4)


def test_what_does_not_belong_together_is_refused(device: torch.device) -> None:
    x, cos = normal(2, 3, 5, 4, device=device), normal(1, 1, 5, 4, device=device)
    with pytest.raises(ValueError, match=r"x is \(2, 3, 5, 4\), cos \(1, 1, 5, 4\) and sin \(1, 1, 6, 4\)"):
        kernel.rotate(x, cos, normal(1, 1, 6, 4, device=device))
    with pytest.raises(ValueError, match=r"cos \(3, 1, 5, 4\)"):
        kernel.rotate(x, cos.repeat(3, 1, 1, 1), cos.repeat(3, 1, 1, 1))
    with pytest.raises(ValueError, match="must be contiguous"):
        kernel.rotate(normal(2, 3, 4, 5, device=device).transpose(2, 3), cos, cos)
    apart = normal(1, 1, 4, 5, device=device).transpose(2, 3)
    with pytest.raises(ValueError, match="must be contiguous"):
        kernel.rotate(x, apart, cos)
