"""Routing, balancing, collaboration counts and placements against numbers worked out by hand."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from occult_train.errors import PlacementError
from occult_train.models.config import ModelConfig
from occult_train.models.gpt import GPT, Runtime
from occult_train.models.init import init_weights
from occult_train.moe.collaboration import CollaborationCounts, CollaborationMeter
from occult_train.moe.layer import MoELayer, MoEOptions
from occult_train.moe.losses import Balancer, LayerRouting
from occult_train.moe.placement import Placement, read, resolve, to_json
from occult_train.moe.router import Router
from occult_train.parallel.grid import Grid
from occult_train.testing import run_distributed

# --- router


def make_router(normalise: bool = False, experts: int = 8, top_k: int = 3, hidden: int = 6) -> Router:
    router = Router(hidden, experts, top_k, normalise)
    with torch.no_grad():
        router.weight.normal_(generator=torch.Generator().manual_seed(0))
    return router


def identity_router(top_k: int, normalise: bool = False) -> Router:
    """A router whose logits are its inputs, for 4 experts."""
    router = Router(4, 4, top_k, normalise)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    return router


def log_probs(*probs: float) -> Tensor:
    """Logits [1, E] whose softmax is `probs`."""
    return torch.tensor([probs]).log()


@pytest.mark.parametrize("normalise", [False, True])
def test_router_is_olmoe_s(normalise: bool) -> None:
    # imported here, because the ranks of the distributed tests import this file too
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

    router = make_router(normalise)
    config = OlmoeConfig(hidden_size=6, num_experts=8, num_experts_per_tok=3, norm_topk_prob=normalise)
    theirs = OlmoeTopKRouter(config)
    theirs.load_state_dict({"weight": router.weight.detach()})
    x_TH = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    logits, weights, chosen = theirs(x_TH)
    got = router.choose(router(x_TH))
    assert torch.equal(router(x_TH), logits)
    assert torch.equal(got.experts_TK, chosen)
    # the same operations in the same order
    assert torch.equal(got.weights_TK, weights)
    assert torch.equal(got.mean_prob_E, logits.softmax(-1).sum(0) / 50)


@pytest.mark.parametrize("normalise", [False, True])
def test_weights_by_hand(normalise: bool) -> None:
    got = identity_router(2, normalise).choose(log_probs(0.1, 0.5, 0.1, 0.3))
    assert got.experts_TK.tolist() == [[1, 3]]
    expected = [0.625, 0.375] if normalise else [0.5, 0.3]
    torch.testing.assert_close(got.weights_TK, torch.tensor([expected]), rtol=1e-6, atol=0)


def test_router_computes_in_fp32_for_a_bf16_model() -> None:
    router = make_router().to(torch.bfloat16)
    x_TH = torch.randn(20, 6, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    got = router.choose(router(x_TH))
    assert got.weights_TK.dtype == got.mean_prob_E.dtype == torch.float32
    assert torch.equal(router(x_TH), x_TH.float() @ router.weight.float().T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_bias_is_never_rounded(dtype: torch.dtype) -> None:
    router = make_router()
    router.expert_bias.fill_(0.1001)
    moved = router.to(dtype)
    assert moved.weight.dtype == dtype
    assert moved.expert_bias.dtype == torch.float32
    assert torch.equal(moved.expert_bias, torch.full((8,), 0.1001))


def test_bias_selects_but_does_not_weigh() -> None:
    router = identity_router(2)
    router.expert_bias.copy_(torch.tensor([0.0, -1.0, 0.25, 0.0]))
    logits = log_probs(0.1, 0.5, 0.1, 0.3).requires_grad_()
    got = router.choose(logits)
    # scores 0.1, -0.5, 0.35, 0.3
    assert got.experts_TK.tolist() == [[2, 3]]
    torch.testing.assert_close(got.weights_TK, torch.tensor([[0.1, 0.3]]), rtol=1e-6, atol=0)
    torch.testing.assert_close(got.mean_prob_E, torch.tensor([0.1, 0.5, 0.1, 0.3]), rtol=1e-6, atol=0)


def test_gradients_of_weights_reach_all_logits() -> None:
    """d w_2 / d logit_j = w_2 (delta_2j - p_j), whatever the bias."""
    router = identity_router(1)
    router.expert_bias.copy_(torch.tensor([0.0, -1.0, 1.0, 0.0]))
    logits = log_probs(0.1, 0.5, 0.1, 0.3).requires_grad_()
    router.choose(logits).weights_TK.sum().backward()
    assert logits.grad is not None
    expected = torch.tensor([[-0.01, -0.05, 0.09, -0.03]])
    # fp32 rounding, measured 4e-9
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=2e-8)


def test_a_bias_that_grows_moves_tokens_to_its_expert() -> None:
    router = make_router(top_k=1)
    logits = router(torch.randn(200, 6, generator=torch.Generator().manual_seed(3)))
    loads = []
    for bias in (-1.0, 0.0, 0.2, 1.0):
        router.expert_bias[5] = bias
        loads.append(int((router.choose(logits).experts_TK == 5).sum()))
    assert loads[0] == 0
    assert loads[-1] == 200
    assert loads == sorted(set(loads))


# --- losses


def routing(counts: list[int], probs: list[float], z: float = 0.0) -> LayerRouting:
    return LayerRouting(torch.tensor(probs, dtype=torch.float64), torch.tensor(z), torch.tensor(counts))


def test_balanced_loss_is_one() -> None:
    aux, _ = Balancer("aux_loss", "micro_batch", 0.0).losses([routing([5, 5, 5, 5], [0.25] * 4)])
    assert float(aux) == 1.0


def test_everything_to_one_expert_costs_e() -> None:
    aux, _ = Balancer("aux_loss", "micro_batch", 0.0).losses([routing([9, 0, 0], [1.0, 0.0, 0.0])])
    assert float(aux) == 3.0


def test_each_layer_has_its_losses() -> None:
    """Layer 0: 2 (0.75 * 0.6 + 0.25 * 0.4) = 1.1; layer 1: 2 (0.5 * 0.9 + 0.5 * 0.1) = 1."""
    layers = [routing([6, 2], [0.6, 0.4], z=3.0), routing([4, 4], [0.9, 0.1], z=5.0)]
    aux, z = Balancer("aux_loss", "micro_batch", 0.0).losses(layers)
    assert aux.tolist() == pytest.approx([1.1, 1.0], rel=1e-12)
    assert z.tolist() == [3.0, 5.0]


def test_gradient_of_the_loss_goes_through_probabilities_alone() -> None:
    """d mean(aux) / d P_e = E f_e / layers."""
    layers = [routing([6, 2], [0.6, 0.4]), routing([4, 4], [0.9, 0.1])]
    for layer in layers:
        layer.mean_prob_E.requires_grad_()
    Balancer("aux_loss", "micro_batch", 0.0).losses(layers)[0].mean().backward()
    assert [layer.mean_prob_E.grad.tolist() for layer in layers] == [[0.75, 0.25], [0.5, 0.5]]


def test_a_micro_batch_without_assignments_has_a_finite_loss() -> None:
    aux, _ = Balancer("aux_loss", "micro_batch", 0.0).losses([routing([0, 0], [0.5, 0.5])])
    assert float(aux) == 0.0


def test_micro_batch_scope_forgets_earlier_micro_batches() -> None:
    balancer = Balancer("aux_loss", "micro_batch", 0.0)
    balancer.losses([routing([8, 0], [0.9, 0.1])])
    aux, _ = balancer.losses([routing([2, 6], [0.6, 0.4])])
    assert float(aux) == pytest.approx(2 * (0.25 * 0.6 + 0.75 * 0.4), rel=1e-12)


def test_global_batch_scope_accumulates_until_the_step_ends() -> None:
    balancer = Balancer("aux_loss", "global_batch", 0.0)
    balancer.losses([routing([8, 0], [0.9, 0.1])])
    aux, _ = balancer.losses([routing([2, 6], [0.6, 0.4])])
    assert float(aux) == pytest.approx(2 * (10 / 16 * 0.6 + 6 / 16 * 0.4), rel=1e-12)
    assert balancer.finish_step().tolist() == [[10, 6]]
    aux, _ = balancer.losses([routing([2, 6], [0.6, 0.4])])
    assert float(aux) == pytest.approx(2 * (0.25 * 0.6 + 0.75 * 0.4), rel=1e-12)


@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
@pytest.mark.parametrize("balance", ["aux_loss", "bias", "none"])
def test_finish_step_counts_the_step_and_starts_anew(balance: str, scope: str) -> None:
    balancer = Balancer(balance, scope, 0.0)
    for _ in range(3):
        balancer.losses([routing([1, 2], [0.5, 0.5]), routing([3, 0], [0.5, 0.5])])
    assert balancer.finish_step().tolist() == [[3, 6], [9, 0]]
    with pytest.raises(RuntimeError, match="no micro-batch was seen since the last step"):
        balancer.finish_step()
    balancer.losses([routing([0, 3], [0.5, 0.5]), routing([1, 2], [0.5, 0.5])])
    assert balancer.finish_step().tolist() == [[0, 3], [1, 2]]


def test_bias_moves_by_the_rate_towards_the_mean() -> None:
    """Mean load 4: below it +rate, above it -rate, at it nothing; exact, since sign and rate are powers of two."""
    balancer = Balancer("bias", "micro_batch", 0.125)
    bias, counts = torch.tensor([0.0, 0.5, -0.25, 1.0]), torch.tensor([1, 9, 4, 2])
    assert balancer.updated_bias(bias, counts).tolist() == [0.125, 0.375, -0.25, 1.125]


def test_equal_loads_leave_the_bias() -> None:
    bias = torch.tensor([0.1, -0.2, 0.3])
    assert torch.equal(Balancer("bias", "micro_batch", 0.5).updated_bias(bias, torch.tensor([7, 7, 7])), bias)


@pytest.mark.parametrize("balance", ["aux_loss", "none"])
def test_bias_stays_unless_it_balances(balance: str) -> None:
    bias = torch.tensor([0.1, -0.2])
    assert torch.equal(Balancer(balance, "micro_batch", 0.5).updated_bias(bias, torch.tensor([1, 9])), bias)


def test_what_a_layer_tells_the_balancer() -> None:
    """Zero logits: uniform probabilities, z = (ln E)^2; ties go to two experts whose count is all tokens'."""
    layer = MoELayer(MoEOptions(hidden=6, intermediate=4, experts=5, top_k=2), Grid(), Placement.contiguous(5))
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
    _, got = layer(torch.randn(3, 7, 6))
    torch.testing.assert_close(got.mean_prob_E, torch.full((5,), 0.2))
    assert float(got.z.detach()) == pytest.approx(math.log(5) ** 2, rel=1e-6)
    assert sorted(got.counts_E.tolist()) == [0, 0, 0, 21, 21]


def test_z_loss_is_the_mean_square_of_logsumexp() -> None:
    layer = MoELayer(MoEOptions(hidden=4, intermediate=4, experts=4, top_k=1), Grid(), Placement.contiguous(4))
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
    # softmax sums of 1 and of e^2: logsumexp 0 and 2
    logits = torch.cat([log_probs(0.1, 0.2, 0.3, 0.4), log_probs(0.1, 0.2, 0.3, 0.4) + 2])
    _, got = layer(torch.zeros(2, 4), logits)
    assert float(got.z.detach()) == pytest.approx(2.0, rel=1e-6)


# --- over ranks

RANK_COUNTS = ([[6, 2], [1, 7]], [[2, 6], [8, 0]])
"""By accumulation step, then rank."""
RANK_PROBS = [0.8, 0.2]


def _aux_losses(rank: int, scope: str) -> tuple[list[float], list[list[int]]]:
    balancer = Balancer("aux_loss", scope, 0.0)
    losses = [balancer.losses([routing(step[rank], RANK_PROBS)])[0].item() for step in RANK_COUNTS]
    return losses, balancer.finish_step().tolist()


def _both_scopes(rank: int) -> dict[str, tuple[list[float], list[list[int]]]]:
    return {scope: _aux_losses(rank, scope) for scope in ("micro_batch", "global_batch")}


def _loss_by_share(first: float) -> float:
    return 2 * (first * RANK_PROBS[0] + (1 - first) * RANK_PROBS[1])


def _biases_after_steps(rank: int) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Two optimizer steps of two micro-batches each: expert counts told, own counts, summed counts, final biases."""
    config = ModelConfig(64, 16, 8, 2, 2, num_experts=6, num_experts_per_tok=2, max_position_embeddings=16)
    model = GPT(config, Runtime(balance="bias", bias_update_rate=0.5, aux_loss_scope="micro_batch"))
    init_weights(model, seed=1)
    generator = torch.Generator().manual_seed(10 + rank)
    told, own = [], []
    for _ in range(2):
        counts = torch.zeros(2, 6, dtype=torch.int64)
        for _ in range(2):
            ids = torch.randint(0, 64, (2, 16), generator=generator)
            model(ids, labels=ids).backward()
            assert model.balancer._counts is not None
            counts = model.balancer._counts.clone()
        own.append(counts)
        told.append(model.finish_step())
    summed = [counts.clone() for counts in own]
    for counts in summed:
        dist.all_reduce(counts)
    return torch.stack(told), own, summed, [layer.router.expert_bias for layer in model.moe_layers().values()]


def _on_two_ranks(rank: int) -> tuple[dict[str, tuple[list[float], list[list[int]]]], tuple]:
    return _both_scopes(rank), _biases_after_steps(rank)


@pytest.fixture(scope="module")
def two_ranks() -> list[tuple]:
    return run_distributed(_on_two_ranks, 2)


def test_aux_loss_scopes_over_ranks_and_accumulation(two_ranks: list[tuple]) -> None:
    """global_batch: first step's counts [7, 9] of 16, then [17, 15] of 32, on both ranks."""
    whole = [_loss_by_share(7 / 16), _loss_by_share(17 / 32)]
    for rank, (by_scope, _) in enumerate(two_ranks):
        own = [_loss_by_share(step[rank][0] / 8) for step in RANK_COUNTS]
        assert by_scope["micro_batch"][0] == pytest.approx(own, rel=1e-12)
        assert by_scope["global_batch"][0] == pytest.approx(whole, rel=1e-12)
        assert by_scope["micro_batch"][1] == by_scope["global_batch"][1] == [[17, 15]]


def test_bias_follows_the_global_batch_and_is_the_same_on_all_ranks(two_ranks: list[tuple]) -> None:
    (told, own, summed, biases), (told_1, own_1, _, biases_1) = (result[1] for result in two_ranks)
    assert not torch.equal(torch.stack(own), torch.stack(own_1))
    assert torch.equal(told, told_1)
    assert torch.equal(told, torch.stack(summed))
    assert torch.equal(told, torch.stack(own) + torch.stack(own_1))
    load = told.float()
    expected = (0.5 * torch.sign(load.mean(dim=2, keepdim=True) - load)).sum(dim=0)
    for layer in range(2):
        assert torch.equal(biases[layer], expected[layer])
        assert torch.equal(biases[layer], biases_1[layer])


# --- collaboration


def counted(meter: CollaborationMeter) -> CollaborationCounts:
    return CollaborationCounts(*meter.drain(torch.device("cpu")).tolist())


def test_meter_by_hand() -> None:
    """Home 1 of 3; tokens on {0, 0, 1}, {1, 1, 1} and {0, 2, 1}: 2, 1 and 3 devices; 2, 6 and 0 of 6 pairs intra."""
    meter = CollaborationMeter(home=1, devices=3)
    meter.enabled = True
    meter.add(torch.tensor([[0, 0, 1], [1, 1, 1], [0, 2, 1]]))
    got = counted(meter)
    assert got == CollaborationCounts(tokens=3, devices=6, pairs=18, intra_pairs=8, remote_devices=3, remote_experts=4)
    assert got.c_t == 2.0
    assert got.intra_share == 8 / 18


def test_meter_sums_until_drained() -> None:
    meter = CollaborationMeter(home=0, devices=2)
    meter.enabled = True
    meter.add(torch.tensor([[0, 1]]))
    meter.add(torch.tensor([[1, 1], [0, 0]]))
    assert counted(meter) == CollaborationCounts(3, 4, 6, 4, 2, 3)
    assert counted(meter) == CollaborationCounts(0, 0, 0, 0, 0, 0)


def test_meter_is_off_until_enabled() -> None:
    meter = CollaborationMeter(home=0, devices=2)
    meter.add(torch.tensor([[0, 1]]))
    assert counted(meter) == CollaborationCounts(0, 0, 0, 0, 0, 0)


def test_meter_of_nothing_and_of_single_experts() -> None:
    """No tokens, and K = 1 which has no pairs, give finite ratios."""
    meter = CollaborationMeter(home=0, devices=2)
    meter.enabled = True
    meter.add(torch.empty(0, 2, dtype=torch.int64))
    nothing = counted(meter)
    assert (nothing.tokens, nothing.c_t, nothing.intra_share) == (0, 0.0, 0.0)
    meter.add(torch.tensor([[0], [1]]))
    single = counted(meter)
    assert (single.c_t, single.pairs, single.intra_share) == (1.0, 0, 0.0)


@pytest.mark.parametrize(
    ("experts", "k", "devices", "told"),
    [(64, 8, 2, 1.995), (64, 8, 4, 3.659), (64, 8, 8, 5.433), (64, 8, 16, 6.751), (60, 4, 4, 2.778)],
)
def test_c_t_of_uniform_routing(experts: int, k: int, devices: int, told: float) -> None:
    local, tokens = experts // devices, 20_000
    exact = devices * (1 - math.comb(experts - local, k) / math.comb(experts, k))
    assert exact == pytest.approx(told, abs=5e-4)
    slots_TK = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0)).argsort(dim=1)[:, :k]
    meter = CollaborationMeter(home=0, devices=devices)
    meter.enabled = True
    meter.add(slots_TK // local)
    got = counted(meter)
    spread = torch.tensor([len(set(row)) for row in (slots_TK // local).tolist()], dtype=torch.float64).std()
    # four standard errors of the mean; the seed is fixed, so this passes always or never
    assert abs(got.c_t - exact) < 4 * float(spread) / math.sqrt(tokens)


def test_a_layer_meters_devices_by_its_placement() -> None:
    """Experts 0 and 1 share a device only where the placement puts them together."""
    for placement, together in ((Placement((0, 1, 2, 3)), True), (Placement((0, 2, 1, 3)), False)):
        options = MoEOptions(hidden=4, intermediate=4, experts=4, top_k=2, dispatcher="dedup")
        layer = MoELayer(options, Grid(world_size=2, expert_size=2), placement)
        layer.meter.enabled = True
        layer._place(layer.router.choose(log_probs(0.4, 0.3, 0.2, 0.1)))
        assert counted(layer.meter).c_t == (1.0 if together else 2.0)


# --- placement

PLACEMENTS = {0: Placement((2, 0, 3, 1)), 2: Placement((3, 2, 1, 0))}


def test_placement_by_hand() -> None:
    placement = Placement((2, 0, 3, 1))
    assert placement.expert_to_slot == (1, 3, 0, 2)
    assert placement.by_device(2) == [[2, 0], [3, 1]]
    assert placement.by_device(1) == [[2, 0, 3, 1]]
    assert placement.by_device(4) == [[2], [0], [3], [1]]
    assert Placement.contiguous(3).slot_to_expert == (0, 1, 2)


def test_expert_to_slot_inverts_every_permutation() -> None:
    for order in itertools.permutations(range(4)):
        placement = Placement(order)
        assert [placement.slot_to_expert[placement.expert_to_slot[e]] for e in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("slots", [(0, 0, 1), (1, 2, 3), (0, 1, 3), (-1, 0, 1)])
def test_placement_must_be_a_permutation(slots: tuple[int, ...]) -> None:
    with pytest.raises(PlacementError, match="not a permutation"):
        Placement(slots)


def test_placement_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    path.write_text(to_json(PLACEMENTS))
    assert read(path, [0, 2], 4) == PLACEMENTS
    assert resolve(str(path), [0, 2], 4) == PLACEMENTS
    assert json.loads(path.read_text()) == {
        "num_experts": 4,
        "slot_to_expert": {"0": [2, 0, 3, 1], "2": [3, 2, 1, 0]},
    }


def test_contiguous_needs_no_file() -> None:
    assert resolve("contiguous", [1, 3], 4) == {1: Placement((0, 1, 2, 3)), 3: Placement((0, 1, 2, 3))}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"num_experts": 4, "slot_to_expert": {"0": [0, 1, 2, 2], "2": [0, 1, 2, 3]}}',
            "layer 0 is not a permutation",
        ),
        (
            '{"num_experts": 4, "slot_to_expert": {"0": [0, 1, 2, 3], "2": [0, 1, 2, 4]}}',
            "layer 2 is not a permutation",
        ),
        ('{"num_experts": 3, "slot_to_expert": {"0": [0, 1, 2], "2": [0, 1, 2]}}', "model.num_experts=4"),
        ('{"num_experts": 4, "slot_to_expert": {"0": [0, 1, 2, 3]}}', r"places layers \[0\], .* in \[0, 2\]"),
        (
            '{"num_experts": 4, "slot_to_expert": {"0": [0, 1, 2, 3], "1": [0, 1, 2, 3], "2": [0, 1, 2, 3]}}',
            r"places layers \[0, 1, 2\], .* in \[0, 2\]",
        ),
        ("{", "is not a placement file"),
        ("", "is not a placement file"),
        ("[1, 2]", "is not a placement file"),
        ("null", "is not a placement file"),
        ('{"num_experts": 4}', "is not a placement file.*slot_to_expert"),
        ('{"slot_to_expert": [[0, 1, 2, 3]]}', "is not a placement file"),
        ('{"slot_to_expert": {"0": null}}', "is not a placement file"),
        ('{"slot_to_expert": {"first": [0]}}', "is not a placement file"),
        ('{"num_experts": 4, "slot_to_expert": {"0": [0.5, 1, 2, 3], "2": [0, 1, 2, 3]}}', "0.5"),
        ('{"num_experts": 8, "slot_to_expert": {"0": [0, 1, 2, 3], "2": [0, 1, 2, 3]}}', "num_experts"),
    ],
)
def test_wrong_placement_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "placement.json"
    path.write_text(text)
    with pytest.raises(PlacementError, match=message) as raised:
        read(path, [0, 2], 4)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_placement_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlacementError, match="is not a placement file"):
        read(path, [0], 4)


def test_missing_placement_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match=r"moe\.placement=.*gone\.json cannot be read: No such file"):
        read(tmp_path / "gone.json", [0], 4)
    with pytest.raises(PlacementError, match="cannot be read: Is a directory"):
        read(tmp_path, [0], 4)
    with pytest.raises(PlacementError, match=r"moe\.placement=/dev/zero is no file"):
        read(Path("/dev/zero"), [0], 4)


def test_no_tokens_add_nothing_and_no_nan() -> None:
    layer = MoELayer(MoEOptions(hidden=4, intermediate=3, experts=4, top_k=2), Grid(), Placement.contiguous(4))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    y, routing = layer(torch.zeros(0, 4))
    assert y.shape == (0, 4)
    assert routing.z == 0
    assert torch.equal(routing.mean_prob_E, torch.zeros(4))
    assert torch.equal(routing.counts_E, torch.zeros(4, dtype=torch.int64))
