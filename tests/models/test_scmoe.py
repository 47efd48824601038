"""Shortcut-connected blocks: every formula against plain torch in outputs and gradients, counts, settings."""

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import plain_scmoe
import pytest
import torch
from plain_moe import Params
from plain_scmoe import PlainScMoE
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from occult_train.config import load
from occult_train.errors import ConfigError
from occult_train.kernels.routing.reference import route, route_dual
from occult_train.models.cache import KVCache
from occult_train.models.config import ModelConfig
from occult_train.models.families import family_of
from occult_train.models.gpt import GPT, Runtime
from occult_train.models.init import init_weights
from occult_train.models.scmoe_config import ScMoEConfig
from occult_train.moe.collecting import RoutingCollector
from occult_train.moe.overlap import MEASURED, WARMUP
from occult_train.moe.placement import Placement
from occult_train.moe.pruning import PruneConfig
from occult_train.moe.similarity import SimilarityTables
from occult_train.parallel.grid import Grid
from occult_train.testing import run_distributed

CONFIGS = Path(__file__).parents[2] / "configs" / "scmoe"
SMALL = ModelConfig(
    vocab_size=96,
    hidden_size=16,
    intermediate_size=12,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_experts=6,
    num_experts_per_tok=1,
    shared_expert_intermediate_size=10,
    dense_intermediate_size=20,
    max_position_embeddings=32,
)
DGMOE = replace(SMALL, shared_expert_intermediate_size=0, scmoe=ScMoEConfig("dgmoe"))
SHAPES = {
    f"{position}-{combine}": replace(SMALL, scmoe=ScMoEConfig("scmoe", position, 2, combine))
    for position in ("pos1", "pos2", "pos3")
    for combine in ("add", "cg1", "cg2")
}
SHAPES |= {
    f"every-{combine}": replace(SMALL, scmoe=ScMoEConfig("scmoe", "pos1", 1, combine), dense_intermediate_size=0)
    for combine in ("add", "cg1", "cg2")
}
SHAPES |= {
    "two-experts": replace(SHAPES["pos2-cg1"], num_experts_per_tok=2),
    "two-experts-normalised": replace(SHAPES["pos2-cg2"], num_experts_per_tok=2, norm_topk_prob=True),
    "dgmoe": DGMOE,
    "dgmoe-two-experts-in-all": replace(DGMOE, num_experts=2),
}
each_shape = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())


def build(config: ModelConfig, runtime: Runtime | None = None, dtype: torch.dtype = torch.float64) -> GPT:
    """A model whose weights are spread wide enough for routing, norms and gates to matter."""
    model = GPT(config, runtime)
    init_weights(model, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.mul_(10)
    return model.to(dtype)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, SMALL.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def plain_config(config: ModelConfig) -> PlainScMoE:
    return PlainScMoE(**{field.name: getattr(config, field.name, None) for field in fields(PlainScMoE)})


def exact(model: GPT) -> Params:
    """Its parameters for the plain model, in fp64."""
    return {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}


def relative(got: Tensor, expected: Tensor) -> float:
    """‖got - expected‖ / ‖expected‖."""
    assert got.shape == expected.shape
    return float((got.double() - expected).norm() / expected.norm())


@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_logits_and_every_gradient_are_the_plain_model_s(config: ModelConfig, dtype: torch.dtype) -> None:
    """With packed documents in one row of two; the balancing losses' inputs take part in the gradient."""
    model, ids = build(config, dtype=dtype), tokens(2, 21)
    document_ids = torch.stack([torch.zeros(21), torch.arange(21) // 8]).long()
    params, plain = exact(model), plain_config(config)
    assert {name: tuple(p.shape) for name, p in params.items()} == plain_scmoe.param_shapes(plain)
    output = plain_scmoe.forward(params, plain, ids, document_ids)
    assert min(routing["topk_gap"] for routing in output.router) > 1e-5
    got = model(ids, document_ids=document_ids)
    # of logits and gradients measured at most 1.8e-6 in fp32, and 4.1e-7 in fp64, as angles are fp32
    assert relative(got.detach(), output.logits.detach()) < 1e-5
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (got * weight.to(dtype)).sum().backward()
    gradients = torch.autograd.grad((output.logits * weight).sum(), list(params.values()))
    for (name, parameter), expected in zip(model.named_parameters(), gradients, strict=True):
        assert expected.norm() > 0, name
        assert parameter.grad is not None, name
        assert relative(parameter.grad, expected) < 1e-5, name


@each_shape
def test_losses_and_loads_are_the_plain_model_s(config: ModelConfig) -> None:
    model, ids = build(config, Runtime(balance="aux_loss", aux_loss_coef=0.1, z_loss_coef=0.1)), tokens(2, 9)
    params, plain = exact(model), plain_config(config)
    output = plain_scmoe.forward(params, plain, ids)
    model(ids, labels=ids).backward()
    losses, loads = model.last_losses, model.finish_step()
    assert losses is not None
    assert len(loads) == len(output.router) == len(model.moe_layers()) == len(config.moe_layers)
    for at, routing in enumerate(output.router):
        counts = routing["experts"].flatten().bincount(minlength=config.num_experts)
        assert torch.equal(loads[at], counts)
        share = counts / counts.sum()
        balance = config.num_experts * (share * routing["probs"].mean(dim=0)).sum()
        torch.testing.assert_close(losses.balance_Lm[at], balance.detach(), rtol=1e-6, atol=0)
        z = routing["logits"].logsumexp(dim=-1).square().mean()
        torch.testing.assert_close(losses.z_Lm[at], z.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("config", [SHAPES[n] for n in ("pos3-cg2", "every-cg1", "two-experts", "dgmoe")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_and_placing_change_no_bit(config: ModelConfig, dtype: torch.dtype) -> None:
    order = tuple(reversed(range(config.num_experts)))
    ids, found = tokens(2, 9), []
    for runtime in (
        Runtime(balance="aux_loss", aux_loss_coef=0.1),
        Runtime(balance="aux_loss", aux_loss_coef=0.1, selective_checkpointing=True),
        Runtime(balance="aux_loss", aux_loss_coef=0.1, placements={i: Placement(order) for i in config.moe_layers}),
    ):
        model = build(config, runtime, dtype)
        loss = model(ids, labels=ids)
        loss.backward()
        grads = {
            n: p.grad.flip(0) if ".experts." in n and runtime.placements else p.grad
            for n, p in model.named_parameters()
        }
        found.append((loss.detach(), grads))
    for loss, grads in found[1:]:
        assert torch.equal(loss, found[0][0])
        for name, grad in grads.items():
            assert torch.equal(grad, found[0][1][name]), name


def results(config: ModelConfig, runtime: Runtime, dtype: torch.dtype, ids: Tensor) -> list[Tensor]:
    """Loss and every gradient, after as many steps as a schedule needs to be chosen."""
    model = build(config, runtime, dtype)
    for _ in range(WARMUP + MEASURED + 1 if runtime.schedule == "auto" else 1):
        model.zero_grad()
        loss = model(ids, labels=ids)
        loss.backward()
        model.finish_step()
    chosen = [line for line in model.news if "in gap" in line]
    assert len(chosen) == (runtime.schedule == "auto" and config.scmoe.block == "scmoe")
    assert all(p.grad is not None for p in model.parameters())
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def schedules(config: ModelConfig) -> list[str]:
    return ["auto", *(str(gap) for gap in range(len(config.scmoe.window) + 1) if config.scmoe.window)]


@each_shape
def test_no_gap_changes_a_bit_of_what_is_recomputed(config: ModelConfig) -> None:
    runtime = Runtime(balance="aux_loss", aux_loss_coef=0.1, z_loss_coef=0.1, selective_checkpointing=True)
    ids = tokens(2, 9)
    expected = results(config, runtime, torch.bfloat16, ids)
    for schedule in schedules(config)[1:]:
        got = results(config, replace(runtime, schedule=schedule), torch.bfloat16, ids)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), schedule


def differing_schedules(rank: int) -> list[str]:
    """What is not as without a schedule on ranks with different numbers of tokens, of prime size."""
    runtime = Runtime(grid=Grid.create(2), dispatcher="dedup", balance="aux_loss", aux_loss_coef=0.1)
    ids, found = tokens(1, 5 + 2 * rank, seed=rank), []
    for name, config in SHAPES.items():
        expected = results(config, runtime, torch.float32, ids)
        for schedule in schedules(config):
            got = results(config, replace(runtime, schedule=schedule), torch.float32, ids)
            if not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)):
                found.append(f"{name}, {schedule}")
    return found


def test_no_schedule_changes_a_bit_on_two_ranks() -> None:
    assert run_distributed(differing_schedules, 2) == [[], []]


def test_a_schedule_leaves_generation_s_logits_alone() -> None:
    config, ids = SHAPES["pos3-cg2"], tokens(2, 9)
    found = []
    for schedule in ("none", "2"):
        model = build(config, Runtime(schedule=schedule), torch.float32).eval()
        cache = KVCache(config, [0, 0], 9, torch.zeros(1))
        found.append([model.predict(ids[:, :6], cache), *(model.predict(ids[:, i : i + 1], cache) for i in (6, 7, 8))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("policy", ["router", "similarity"])
@pytest.mark.parametrize("name", ["two-experts", "every-cg1"])
def test_recomputing_prunes_once_and_changes_no_bit(name: str, policy: str) -> None:
    """Choices are kept, so that the way back is that of the devices that were picked."""
    config = replace(SHAPES[name], num_experts_per_tok=2)
    prune, ids, found = PruneConfig(policy, 1, 3), tokens(2, 9), []
    tables = SimilarityTables({i: torch.rand(6, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)})
    for selective, schedule in ((False, "none"), (True, "none"), (True, schedules(config)[-1])):
        runtime = Runtime(prune=prune, selective_checkpointing=selective, schedule=schedule)
        model = build(config, runtime, torch.float32)
        model.set_similarity(tables)
        chosen: list[Tensor] = []
        for layer in model.moe_layers().values():
            layer.counters.append(SimpleNamespace(add=chosen.append))  # type: ignore[arg-type]
        loss = model(ids, labels=ids)
        loss.backward()
        assert len(chosen) == len(model.moe_layers())
        assert all((experts_TK // 2 == experts_TK[:, :1] // 2).all() for experts_TK in chosen)
        found.append({"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}})
    for other in found[1:]:
        assert all(torch.equal(value, other[key]) for key, value in found[0].items())
    unpruned = build(config, dtype=torch.float32)
    assert not torch.equal(unpruned(ids, labels=ids), found[0]["loss"])


# --- what the shortcut means, without the plain model


@pytest.mark.parametrize(
    ("position", "silent"),
    [
        ("pos1", []),
        ("pos2", ["0.mlp.w2"]),
        ("pos3", ["0.mlp.w2", "0.attention.o_proj"]),
    ],
)
def test_the_first_experts_see_nothing_behind_the_shortcut(position: str, silent: list[str]) -> None:
    """So its window really is free: their routing does not depend on what is computed in it."""
    config = replace(SMALL, scmoe=ScMoEConfig("scmoe", position), num_hidden_layers=2)
    model = build(config)
    router = model.moe_layers()[1].router
    seen: list[Tensor] = []
    router.register_forward_hook(lambda module, inputs, logits: seen.append(logits))
    model(tokens(2, 9))
    names = ["0.attention.o_proj", "0.mlp.w2", "1.attention.o_proj", "1.shared_expert.w2"]
    weights = [model.get_parameter(f"layers.{name}.weight") for name in names]
    grads = torch.autograd.grad(seen[0].square().sum(), weights, allow_unused=True)
    free = [name for name, grad in zip(names, grads, strict=True) if grad is None]
    assert free == [name for name in names if name in silent or name.startswith("1.")]


def test_two_choices_never_meet_and_the_current_one_gives_way() -> None:
    logits = torch.log(
        torch.tensor(
            [
                *([0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.3, 0.6, 0.1]),  # the shortcut's: 0, 2, 1
                *([0.5, 0.2, 0.3], [0.1, 0.6, 0.3], [0.2, 0.5, 0.3]),  # 0 is taken: 2; 1; 1 is taken: 2
            ],
            dtype=torch.float64,
        )
    )
    routing = route_dual(logits, torch.zeros(3), 1, False)
    assert routing.experts_TK.flatten().tolist() == [0, 2, 1, 2, 1, 2]
    torch.testing.assert_close(routing.weights_TK.flatten().tolist(), [0.6, 0.7, 0.6, 0.3, 0.6, 0.3])
    assert routing.counts_E.tolist() == [1, 2, 3]
    alone = route(logits, torch.zeros(3), 1, False)
    assert torch.equal(routing.mean_prob_E, alone.mean_prob_E)
    assert torch.equal(routing.z, alone.z)


def test_the_balancing_bias_moves_both_choices_and_no_weight() -> None:
    logits = torch.tensor([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1]]).log()
    routing = route_dual(logits, torch.tensor([0.0, 0.0, 1.0]), 1, False)
    assert routing.experts_TK.flatten().tolist() == [2, 0]
    torch.testing.assert_close(routing.weights_TK.flatten(), torch.tensor([0.1, 0.6]))


def test_no_tokens_are_two_choices_of_nothing() -> None:
    routing = route_dual(torch.zeros(0, 3), torch.zeros(3), 1, False)
    assert routing.experts_TK.shape == (0, 1)
    assert not routing.mean_prob_E.any()
    assert float(routing.z) == 0


@pytest.mark.parametrize(
    ("rows", "experts", "top_k", "normalise"), [(3, 4, 1, False), (2, 1, 1, False), (2, 4, 2, False), (2, 4, 1, True)]
)
def test_what_two_choices_cannot_be_is_refused(rows: int, experts: int, top_k: int, normalise: bool) -> None:
    with pytest.raises(ValueError, match="two choices of one expert need"):
        route_dual(torch.zeros(rows, experts), torch.zeros(experts), top_k, normalise)


@pytest.mark.parametrize("config", [SHAPES["two-experts"], DGMOE], ids=["scmoe", "dgmoe"])
def test_routing_statistics_count_shortcut_layers(config: ModelConfig) -> None:
    model, ids = build(config), tokens(2, 9)
    collector = RoutingCollector(model.moe_layers(), 50, 0, torch.device("cpu"))
    with collector.counting():
        model(ids, labels=ids)
    statistics, loads = collector.gather({}), model.finish_step()
    assert list(statistics.layers) == [1, 3] == config.moe_layers
    for layer, counts in zip(statistics.layers.values(), loads, strict=True):
        assert torch.equal(layer.loads_E, counts)
    statistics.check()


# --- counts


@each_shape
def test_counts_are_those_of_the_built_model(config: ModelConfig) -> None:
    model = GPT(config)
    assert config.num_params() == sum(p.numel() for p in model.parameters())
    used = config.num_experts_per_tok * (2 if config.scmoe.block == "dgmoe" else 1)
    active = sum((p[:used] if ".experts." in name else p).numel() for name, p in model.named_parameters())
    assert config.active_params() == active


@each_shape
def test_flops_per_token_is_what_torch_counts(config: ModelConfig) -> None:
    length = 17
    model, ids = build(config, dtype=torch.float32), tokens(3, length)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).backward()
    assert counter.get_total_flops() == 3 * config.flops_per_token(length) * ids.numel()


@pytest.mark.parametrize(
    ("name", "paper", "off"),
    [
        ("gpt2_moe_small", 323e6, 0.005),
        ("gpt2_moe_medium", 1.7e9, 0.105),
        ("gpt3_moe_xl", 4.1e9, 0.006),
        ("llama2_moe", 6.7e9, 0.004),
    ],
)
def test_presets_have_the_paper_s_size_and_an_equal_twin(name: str, paper: float, off: float) -> None:
    """`off`: how far the parameters are from the paper's two digits."""
    model, twin = (load([str(CONFIGS / f"{name}{end}.yaml")]).model for end in ("", "_top2"))
    assert (model.scmoe.block, model.num_experts_per_tok) == ("scmoe", 1)
    assert (twin.scmoe.block, twin.num_experts_per_tok, twin.shared_expert_intermediate_size) == ("none", 2, 0)
    assert model.moe_layers == twin.moe_layers
    assert twin.num_params() == pytest.approx(paper, rel=off)
    assert model.num_params() == pytest.approx(twin.num_params(), rel=0.003)
    length = model.max_position_embeddings
    assert model.flops_per_token(length) == pytest.approx(twin.flops_per_token(length), rel=3e-5)
    shared = replace(model, scmoe=ScMoEConfig(), dense_layers=model.mlp_layers)
    shared.validate()
    assert shared.num_params() == pytest.approx(model.num_params(), rel=1e-4)
    assert shared.flops_per_token(length) == pytest.approx(model.flops_per_token(length), rel=3e-5)


# --- mistakes


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (replace(SMALL, scmoe=ScMoEConfig("shortcut")), ["model.scmoe.block=shortcut", "none, scmoe, dgmoe"]),
        (replace(SMALL, scmoe=ScMoEConfig("scmoe", "pos4")), ["model.scmoe.position=pos4", "pos1, pos2, pos3"]),
        (replace(SMALL, scmoe=ScMoEConfig("scmoe", every=3)), ["model.scmoe.every=3", "1, 2"]),
        (replace(SMALL, scmoe=ScMoEConfig(combine="sum")), ["model.scmoe.combine=sum", "add, cg1, cg2"]),
        (replace(SMALL, scmoe=ScMoEConfig("scmoe", every=1)), ["model.scmoe.position=pos2", "model.scmoe.every=1"]),
        (replace(SHAPES["pos1-add"], num_hidden_layers=3), ["model.num_hidden_layers=3", "model.scmoe.every=2"]),
        (replace(SHAPES["pos1-add"], dense_layers=[1]), ["model.dense_layers=[1]", "model.scmoe.every=2", "[0, 2]"]),
        (
            replace(SHAPES["every-add"], dense_layers=[0], dense_intermediate_size=8),
            ["model.dense_layers=[0]", "model.scmoe.every=1", "[]"],
        ),
        (
            replace(SHAPES["pos1-add"], dense_intermediate_size=0),
            ["model.scmoe.every=2", "model.dense_intermediate_size", "which is 0"],
        ),
        (
            replace(SHAPES["pos1-add"], shared_expert_intermediate_size=0),
            ["model.scmoe.block=scmoe", "model.shared_expert_intermediate_size", "which is 0"],
        ),
        (
            replace(SHAPES["pos1-add"], shared_expert_gate=True),
            ["model.shared_expert_gate=true", "model.scmoe.block=scmoe", "cg1"],
        ),
        (
            replace(SHAPES["pos1-add"], norm_topk_prob=True),
            ["model.norm_topk_prob=true", "model.num_experts_per_tok=1", "model.scmoe.block=scmoe"],
        ),
        (replace(DGMOE, scmoe=ScMoEConfig("dgmoe", "pos1")), ["model.scmoe.position=pos1", "dgmoe", "pos2"]),
        (replace(DGMOE, scmoe=ScMoEConfig("dgmoe", every=1)), ["model.scmoe.every=1", "dgmoe", "2"]),
        (replace(DGMOE, scmoe=ScMoEConfig("dgmoe", combine="cg1")), ["model.scmoe.combine=cg1", "dgmoe", "add"]),
        (replace(DGMOE, num_experts_per_tok=2), ["model.num_experts_per_tok=2", "dgmoe", "1"]),
        (
            replace(DGMOE, shared_expert_intermediate_size=8),
            ["model.shared_expert_intermediate_size=8", "dgmoe", "0"],
        ),
        (replace(DGMOE, num_experts=1), ["model.num_experts=1", "at least 2", "dgmoe"]),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(config: ModelConfig, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config.validate()
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("qk_norm", ["none", "full", "head"])
@pytest.mark.parametrize(
    "config", [DGMOE, replace(SHAPES["pos2-add"], shared_expert_intermediate_size=24)], ids=["dgmoe", "scmoe"]
)
def test_no_hub_family_takes_shortcut_blocks(config: ModelConfig, qk_norm: str) -> None:
    """Not even one whose tensors would all be found: dgmoe but for its norms is an OLMoE."""
    with pytest.raises(ConfigError, match=f"model.scmoe.block={config.scmoe.block}"):
        family_of(replace(config, qk_norm=qk_norm))


@each_shape
def test_what_can_be_built_is_not(config: ModelConfig) -> None:
    config.validate()
    named = replace(config, dense_layers=config.mlp_layers)
    named.validate()
    assert named.mlp_layers == config.mlp_layers
