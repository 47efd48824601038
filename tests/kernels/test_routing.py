"""The routing kernel against plain torch in float64, in the choice, the sums and every gradient."""

import pytest
import torch
from torch import Tensor

from occult_train.kernels.routing import autograd, kernel, reference

SIZES = [(0, 5, 2), (1, 1, 1), (1, 8, 8), (63, 60, 4), (64, 64, 8), (100, 3, 2), (130, 128, 8), (17, 257, 6)]
"""Tokens, experts, experts a token."""
LIMIT = 2e-6
"""‖got − ref‖/‖ref‖ in fp32 against fp64; measured at most 4e-7."""


def logits_of(tokens: int, experts: int, device: torch.device, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(tokens * experts)
    return (spread * torch.randn(tokens, experts, generator=generator)).to(device)


def bias_of(experts: int, device: torch.device) -> Tensor:
    return torch.linspace(-0.3, 0.3, experts)[torch.randperm(experts, generator=torch.Generator().manual_seed(1))].to(
        device
    )


def check(label: str, got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape, label
    error = float((got.double() - expected).norm()) / max(float(expected.norm()), 1e-30)
    assert error <= LIMIT, f"{label} is {error:.1e} off"


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("tokens,experts,top_k", SIZES)
def test_sums_and_gradients(tokens: int, experts: int, top_k: int, normalise: bool, device: torch.device) -> None:
    logits, bias = logits_of(tokens, experts, device).requires_grad_(), bias_of(experts, device)
    exact = logits.detach().double().requires_grad_()
    got = autograd.route(logits, bias, top_k, normalise)
    expected = reference.route(exact, bias.double(), top_k, normalise)
    assert got.experts_TK.dtype == got.counts_E.dtype == torch.int64
    assert torch.equal(got.experts_TK, expected.experts_TK)
    assert torch.equal(got.counts_E, expected.counts_E)
    generator = torch.Generator().manual_seed(2)
    gradients = []
    for label in ("weights_TK", "mean_prob_E", "z"):
        value, right = getattr(got, label), getattr(expected, label)
        check(label, value.detach(), right.detach())
        gradients.append(torch.randn(right.shape, generator=generator).to(device))
    for subset in ([0], [1], [2], [0, 1, 2]):
        outputs = [(got[1 + i], expected[1 + i], gradients[i]) for i in subset]
        (one,) = torch.autograd.grad([o[0] for o in outputs], logits, [o[2] for o in outputs], retain_graph=True)
        (two,) = torch.autograd.grad(
            [o[1] for o in outputs], exact, [o[2].double() for o in outputs], retain_graph=True
        )
        check(f"gradient through {subset}", one, two)


def test_one_normalised_expert_weighs_one_and_has_no_gradient(device: torch.device) -> None:
    logits = logits_of(100, 3, device).requires_grad_()
    weights = autograd.route(logits, torch.zeros(3, device=device), 1, True).weights_TK
    torch.testing.assert_close(weights, torch.ones_like(weights), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(weights.sum(), logits)
    # rounding of (1 - p / p) / p, measured 6e-8
    assert float(gradient.abs().max()) < 5e-7


def test_by_hand(device: torch.device) -> None:
    """The kernel's example; expert 2 has the best score by its bias alone."""
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]], device=device).log()
    got = kernel.route(logits, torch.zeros(4, device=device), 2, True)
    assert got.experts_TK.tolist() == [[1, 3]]
    torch.testing.assert_close(got.weights_TK.cpu(), torch.tensor([[4 / 7, 3 / 7]]), rtol=1e-6, atol=0)
    got = kernel.route(logits, torch.tensor([0.0, 0.0, 0.5, 0.0], device=device), 2, False)
    assert got.experts_TK.tolist() == [[2, 1]]
    torch.testing.assert_close(got.weights_TK.cpu(), torch.tensor([[0.2, 0.4]]), rtol=1e-6, atol=0)
    assert got.counts_E.tolist() == [0, 1, 1, 0]


def test_equal_scores_go_to_the_lower_expert(device: torch.device) -> None:
    got = kernel.route(torch.zeros(3, 6, device=device), torch.zeros(6, device=device), 4, False)
    assert got.experts_TK.tolist() == [[0, 1, 2, 3]] * 3


def test_experts_stay_distinct_whatever_the_logits(device: torch.device) -> None:
    """Also where they are no numbers: what follows counts on it."""
    logits = logits_of(4, 6, device)
    logits[0] = float("nan")
    logits[1, 2] = float("nan")
    logits[2, :4] = float("-inf")
    logits[3, 1] = float("inf")
    chosen = kernel.route(logits, torch.zeros(6, device=device), 4, False).experts_TK
    assert ((chosen >= 0) & (chosen < 6)).all()
    assert all(len(set(row)) == 4 for row in chosen.tolist())


def test_extreme_logits_do_not_overflow(device: torch.device) -> None:
    logits = logits_of(20, 8, device, spread=1e4).requires_grad_()
    got = autograd.route(logits, torch.zeros(8, device=device), 2, True)
    (got.weights_TK.sum() + got.z).backward()
    assert got.z.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    "logits,top_k,message",
    [
        (torch.zeros(2, 3, dtype=torch.float64), 1, "fp32"),
        (torch.zeros(3, 2).T, 1, "contiguous"),
        (torch.zeros(2, 4), 1, "bias"),
        (torch.zeros(2, 3), 4, "3 experts, 4 a token"),
    ],
)
def test_what_does_not_fit_is_refused(logits: Tensor, top_k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel.route(logits, torch.zeros(3), top_k, False)
