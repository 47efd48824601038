"""Pruning: kernel, plain torch and a token at a time agree; what must hold whatever the scores; examples by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_pruning import best_on_open_devices, prune_token, top_k
from test_routing import LIMIT, check, logits_of
from torch import Tensor

from occult_train.kernels.pruning.reference import Pruning, prune
from occult_train.kernels.routing import autograd, kernel, reference
from occult_train.kernels.tuning import INTERPRETED

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SIZES = [(0, 8, 2, 4, 1), (1, 2, 1, 2, 1), (63, 60, 4, 4, 1), (33, 64, 8, 8, 2), (9, 256, 8, 32, 3), (20, 12, 6, 3, 2)]
"""Tokens, experts, experts a token, devices, devices a token may use."""


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, int, Pruning]:
    """Scores with many ties, experts a token, and any placement and limit that they can go with."""
    groups, size = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    experts = groups * size
    top_k = draw(st.integers(1, experts))
    devices = draw(st.integers(-(-top_k // size), groups))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    scores = torch.randint(
        0, draw(st.sampled_from([2, 5, 1000])), (draw(st.integers(1, 12)), experts), generator=generator
    )
    similarity = None
    if draw(st.booleans()):
        similarity = torch.randint(-3, 4, (experts, experts), generator=generator).float()
    slots = torch.randperm(experts, generator=generator)
    return scores.float(), top_k, Pruning(slots, size, devices, similarity, draw(st.booleans()))


def device_of(pruning: Pruning) -> list[int]:
    return [slot // pruning.group_size for slot in pruning.slots_E.tolist()]


def on_device(pruning: Pruning) -> Pruning:
    similarity = pruning.similarity_EE
    return pruning._replace(
        slots_E=pruning.slots_E.to(DEVICE), similarity_EE=None if similarity is None else similarity.to(DEVICE)
    )


def slowly(scores: Tensor, k: int, pruning: Pruning) -> tuple[Tensor, Tensor]:
    """Experts and weighed experts [T, K], a token at a time."""
    table = None if pruning.similarity_EE is None else pruning.similarity_EE.tolist()
    tokens = [
        prune_token(row, k, device_of(pruning), pruning.devices, table, pruning.inherit) for row in scores.tolist()
    ]
    return torch.tensor([t.experts for t in tokens]), torch.tensor([t.weighed for t in tokens])


@given(problems())
@settings(deadline=None, max_examples=200)
def test_what_holds_whatever_the_scores(problem: tuple[Tensor, int, Pruning]) -> None:
    scores, k, pruning = problem
    device = torch.tensor(device_of(pruning))
    chosen = torch.tensor([top_k(row, k) for row in scores.tolist()])
    got = prune(scores, chosen, pruning)
    for before, after, row in zip(chosen.tolist(), got.tolist(), scores.tolist(), strict=True):
        used = {int(device[e]) for e in after}
        assert len(used) <= pruning.devices
        assert len(set(after)) == k
        first = {int(device[e]) for e in before}
        if len(first) <= pruning.devices:
            assert after == before
        else:
            assert used <= first
        assert all(b == a for b, a in zip(before, after, strict=True) if int(device[b]) in used), "insiders stay"
        if pruning.similarity_EE is None:
            assert set(after) == best_on_open_devices(row, k, device.tolist(), pruning.devices)
    everywhere = pruning._replace(devices=len(device) // pruning.group_size)
    assert torch.equal(prune(scores, chosen, everywhere), chosen), "m = D is the identity"


@given(problems())
@settings(deadline=None, max_examples=200)
def test_plain_torch_is_a_token_at_a_time(problem: tuple[Tensor, int, Pruning]) -> None:
    scores, k, pruning = problem
    chosen = torch.tensor([top_k(row, k) for row in scores.tolist()])
    assert torch.equal(prune(scores, chosen, pruning), slowly(scores, k, pruning)[0])


@given(problems())
@settings(deadline=None, max_examples=15)
def test_the_kernel_is_a_token_at_a_time(problem: tuple[Tensor, int, Pruning]) -> None:
    """Ties too: equal logits have equal probabilities."""
    scores, k, pruning = problem
    logits = scores.to(DEVICE) / 300
    bias = torch.zeros(logits.shape[1], device=DEVICE)
    got = kernel.route(logits, bias, k, False, on_device(pruning))
    experts, weighed = slowly(scores, k, pruning)
    assert torch.equal(got.experts_TK.cpu(), experts)
    check("weights", got.weights_TK.cpu(), scores.double().div(300).softmax(1).gather(1, weighed))
    assert torch.equal(got.counts_E.cpu(), experts.flatten().bincount(minlength=logits.shape[1]))


@pytest.mark.parametrize("similar,inherit,normalise", [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)])
@pytest.mark.parametrize("tokens,experts,top,groups,devices", SIZES)
@pytest.mark.usefixtures("poisoned")
def test_choice_weights_sums_and_gradients(
    tokens: int, experts: int, top: int, groups: int, devices: int, similar: int, inherit: int, normalise: int
) -> None:
    """Kernel in fp32 and plain torch in fp64 against weights that are written out here, and each other's gradients."""
    generator = torch.Generator().manual_seed(experts + tokens)
    similarity = torch.rand(experts, experts, generator=generator) if similar else None
    slots = torch.randperm(experts, generator=generator)
    pruning = Pruning(slots, experts // groups, devices, similarity, bool(inherit))
    logits = logits_of(tokens, experts, DEVICE).requires_grad_()
    bias = torch.rand(experts, generator=generator) * 0.1
    exact, torchs = (logits.detach().cpu().double().requires_grad_() for _ in range(2))
    got = autograd.route(logits, bias.to(DEVICE), top, bool(normalise), on_device(pruning))
    plain = reference.route(torchs, bias.double(), top, bool(normalise), pruning)
    probs = exact.softmax(1)
    chosen, weighed = (t.view(tokens, top) for t in slowly(probs.detach() + bias.double(), top, pruning))
    weights = probs.gather(1, weighed.long())
    if normalise:
        weights = weights / weights.sum(1, keepdim=True)
    mean, z = probs.sum(0) / max(tokens, 1), exact.logsumexp(1).square().sum() / max(tokens, 1)
    gradients = [torch.randn(value.shape, generator=generator) for value in (weights, mean, z)]
    for found, leaf in ((got, logits), (plain, torchs)):
        assert torch.equal(found.experts_TK.cpu(), chosen)
        assert torch.equal(found.counts_E.cpu(), chosen.flatten().long().bincount(minlength=experts))
        outputs = (found.weights_TK, found.mean_prob_E, found.z)
        for label, value, right in zip(("weights", "mean", "z"), outputs, (weights, mean, z), strict=True):
            check(label, value.detach().cpu(), right.detach())
        for part in ((0,), (0, 1, 2)):
            given_here = [gradients[i].to(leaf.device, outputs[i].dtype) for i in part]
            (one,) = torch.autograd.grad([outputs[i] for i in part], leaf, given_here, retain_graph=True)
            sums = [(weights, mean, z)[i] for i in part]
            (two,) = torch.autograd.grad(sums, exact, [gradients[i].double() for i in part], retain_graph=True)
            if normalise and top == 1 and part == (0,):
                assert float(one.abs().max()) < 5e-7, "a single normalised weight is 1"
            else:
                check(f"gradient through {part}", one.cpu(), two)


HAND = torch.tensor([[0.30, 0.01, 0.02, 0.25, 0.20, 0.03, 0.15, 0.04]])
"""Devices {0, 1}, {2, 3}, {4, 5}, {6, 7}; top-4 0, 3, 4, 6 on four devices; with m=2 the first two are open, where 2
and 1 are free. By score 4 gives its place to 2 and 6 to 1."""


def hand(devices: int, inherit: bool = False, similarity: Tensor | None = None) -> Pruning:
    return Pruning(torch.arange(8, device=DEVICE), 2, devices, similarity, inherit)


@pytest.mark.parametrize("route", [kernel.route, reference.route], ids=["kernel", "plain torch"])
def test_by_hand(route) -> None:  # type: ignore[no-untyped-def]
    logits, zero = HAND.log().to(DEVICE), torch.zeros(8, device=DEVICE)
    table = torch.zeros(8, 8, device=DEVICE)
    table[4, 1], table[4, 2], table[6, 1] = 0.9, 0.1, 0.8  # both would have 1; 4 comes first, and 2 is left for 6
    table[4, 5] = 1.0  # most alike of all, and outside
    for pruning, experts, weights in (
        (hand(2), [0, 3, 2, 1], [0.30, 0.25, 0.02, 0.01]),
        (hand(2, similarity=table), [0, 3, 1, 2], [0.30, 0.25, 0.01, 0.02]),
        (hand(2, inherit=True, similarity=table), [0, 3, 1, 2], [0.30, 0.25, 0.20, 0.15]),
        (hand(3), [0, 3, 4, 5], [0.30, 0.25, 0.20, 0.03]),
        (hand(4), [0, 3, 4, 6], [0.30, 0.25, 0.20, 0.15]),
    ):
        got = route(logits, zero, 4, False, pruning)
        assert got.experts_TK.tolist() == [experts]
        torch.testing.assert_close(got.weights_TK.cpu(), torch.tensor([weights]), rtol=1e-6, atol=0)
        assert got.counts_E.nonzero().flatten().tolist() == sorted(experts)
        shared = route(logits, zero, 4, True, pruning).weights_TK.cpu()
        torch.testing.assert_close(shared, torch.tensor([weights]) / sum(weights), rtol=1e-6, atol=0)
    # the bias decides what opens and what stands in, and weighs nothing: .59, .32, .30 are best; 6 with .27 beats 3
    bias = torch.tensor([0, 0, 0.3, 0, 0, 0, 0.12, 0.55], device=DEVICE)
    got = route(logits, bias, 3, False, hand(2))
    assert got.experts_TK.tolist() == [[7, 2, 6]]
    torch.testing.assert_close(got.weights_TK.cpu(), torch.tensor([[0.04, 0.02, 0.15]]), rtol=1e-6, atol=0)


def test_gradients_of_substitutes_by_hand() -> None:
    """d w / d logit_j = w (delta_j - p_j) of the expert whose probability the weight is."""
    for inherit, weighed in ((False, 2), (True, 4)):
        logits = HAND.log().to(DEVICE).requires_grad_()
        got = autograd.route(logits, torch.zeros(8, device=DEVICE), 4, False, hand(2, inherit))
        (gradient,) = torch.autograd.grad(got.weights_TK[0, 2], logits)
        expected = -HAND * HAND[0, weighed]
        expected[0, weighed] += HAND[0, weighed]
        torch.testing.assert_close(gradient.cpu(), expected, rtol=0, atol=LIMIT)


def test_experts_stay_distinct_whatever_the_logits() -> None:
    logits = logits_of(4, 6, DEVICE)
    logits[0] = float("nan")
    logits[1, 2] = float("nan")
    logits[2, :4] = float("-inf")
    logits[3, 1] = float("inf")
    pruning = Pruning(torch.arange(6, device=DEVICE), 3, 1)
    for route in (kernel.route, reference.route):
        chosen = route(logits, torch.zeros(6, device=DEVICE), 3, False, pruning).experts_TK
        assert ((chosen >= 0) & (chosen < 6)).all()
        assert all(len(set(row)) == 3 and len({e // 3 for e in row}) == 1 for row in chosen.tolist())


@pytest.mark.parametrize(
    "pruning,message",
    [
        (Pruning(torch.arange(8), 3, 2), "8 experts in groups of 3"),
        (Pruning(torch.arange(7), 2, 2), "slots torch.int64"),
        (Pruning(torch.arange(8), 2, 1), "1 devices of 2 experts do not hold 4"),
        (Pruning(torch.arange(8), 2, 2, torch.zeros(8, 8).double()), "similarity must be contiguous fp32"),
    ],
)
def test_what_does_not_fit_is_refused(pruning: Pruning, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel.route(torch.zeros(2, 8), torch.zeros(8), 4, False, pruning)
