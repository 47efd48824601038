"""The GPT: counts against the built model, logits against transformers', packing, recomputation, first weights.

transformers is imported where it is used: the ranks of the distributed test import this file too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import plain_moe
import pytest
import torch
import torch.distributed as dist
from plain_moe import PlainConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from occult_train.config import load
from occult_train.models.config import ModelConfig
from occult_train.models.families import family_of
from occult_train.models.gpt import GPT, Runtime
from occult_train.models.init import init_weights
from occult_train.moe.placement import Placement
from occult_train.moe.router import Router
from occult_train.parallel.grid import Grid
from occult_train.testing import run_distributed

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = ModelConfig(
    vocab_size=96,
    hidden_size=16,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_experts=6,
    num_experts_per_tok=2,
    max_position_embeddings=32,
)
SHAPES = {
    "olmoe": SMALL,
    "grouped_query": replace(SMALL, num_key_value_heads=2, num_experts_per_tok=1),
    "head_norm_and_width": replace(SMALL, qk_norm="head", head_dim=6, num_key_value_heads=1),
    "full_norm_and_width": replace(SMALL, head_dim=6, num_key_value_heads=2),
    "no_norm_tied": replace(SMALL, qk_norm="none", tie_word_embeddings=True, num_experts_per_tok=6),
    "shared": replace(SMALL, shared_expert_intermediate_size=10),
    "shared_and_gate": replace(SMALL, shared_expert_intermediate_size=10, shared_expert_gate=True),
    "dense_layers": replace(
        SMALL, num_hidden_layers=3, dense_layers=[0, 2], dense_intermediate_size=20, shared_expert_intermediate_size=8
    ),
}
each_shape = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())


def tokens(config: ModelConfig, batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def build(config: ModelConfig, runtime: Runtime | None = None, scale: float = 10.0) -> GPT:
    """A model in fp64 whose weights are spread wide enough for routing, norms and attention to matter."""
    model = GPT(config, runtime)
    init_weights(model, seed=3)
    model = model.double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.mul_(scale)
    return model


def relative(got: Tensor, expected: Tensor) -> float:
    """‖got - expected‖ / ‖expected‖."""
    assert got.shape == expected.shape
    return float((got - expected).norm() / expected.norm())


# --- counts


@each_shape
def test_num_params_is_that_of_the_built_model(config: ModelConfig) -> None:
    built = sum(parameter.numel() for parameter in GPT(config).parameters())
    assert config.num_params() == built


@each_shape
def test_active_params_leave_out_experts_that_a_token_skips(config: ModelConfig) -> None:
    active = 0
    for name, parameter in GPT(config).named_parameters():
        part = parameter[: config.num_experts_per_tok] if ".moe.experts." in name else parameter
        active += part.numel()
    assert config.active_params() == active


@each_shape
@pytest.mark.parametrize("length", [1, 7, 32])
def test_flops_per_token_is_what_torch_counts(config: ModelConfig, length: int) -> None:
    model, ids = GPT(config), tokens(config, 3, length)
    init_weights(model, seed=0)
    # torch does not count the fused CPU attention
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids)
    assert config.flops_per_token(length) * ids.numel() == counter.get_total_flops()


def test_training_costs_three_forwards() -> None:
    model, ids = GPT(SMALL), tokens(SMALL, 2, 8)
    init_weights(model, seed=0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).backward()
    assert counter.get_total_flops() == 3 * SMALL.flops_per_token(8) * ids.numel()


# --- transformers


class WideTorch:
    """torch as a modelling module of transformers sees it, with fp64 wherever that module asks for fp32.

    Its norms and router softmaxes round to fp32 even in an fp64 model, which would hide errors below 1e-7.
    """

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def copy_attention(block: Any, layer: Any) -> dict[Tensor, Tensor]:
    """Their parameter to ours, for the attention and norms of a layer."""
    pairs = {
        layer.input_layernorm.weight: block.attention_norm.weight,
        layer.post_attention_layernorm.weight: block.mlp_norm.weight,
    }
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
        if hasattr(block.attention, name):
            pairs[getattr(layer.self_attn, name).weight] = getattr(block.attention, name).weight
    return pairs


def copy_swiglu(mlp: Any, theirs: Any) -> dict[Tensor, Tensor]:
    return {
        theirs.gate_proj.weight: mlp.w1.weight,
        theirs.down_proj.weight: mlp.w2.weight,
        theirs.up_proj.weight: mlp.w3.weight,
    }


def copy_experts(moe: Any, theirs: Any) -> dict[Tensor, Tensor]:
    pairs = {
        theirs.gate.weight: moe.router.weight,
        theirs.experts.gate_up_proj: torch.cat([moe.experts.w1, moe.experts.w3], dim=1),
        theirs.experts.down_proj: moe.experts.w2,
    }
    if moe.shared_expert is not None:
        pairs |= copy_swiglu(moe.shared_expert, theirs.shared_expert)
        pairs[theirs.shared_expert_gate.weight] = moe.shared_expert_gate.weight
    return pairs


@torch.no_grad()
def copy_weights(model: GPT, theirs: Any) -> None:
    """Give transformers' model our weights, and check that none of its own are left but zero biases."""
    pairs = {
        theirs.model.embed_tokens.weight: model.embed_tokens.weight,
        theirs.model.norm.weight: model.norm.weight,
        theirs.lm_head.weight: model.lm_head.weight,
    }
    for block, layer in zip(model.layers, theirs.model.layers, strict=True):
        pairs |= copy_attention(block, layer)
        pairs |= copy_swiglu(block.mlp, layer.mlp) if block.moe is None else copy_experts(block.moe, layer.mlp)
    for name, parameter in theirs.named_parameters():
        if name.endswith("_proj.bias"):
            parameter.zero_()
        else:
            parameter.copy_(pairs.pop(parameter))
    assert not pairs


def hub_fields(config: ModelConfig) -> dict[str, Any]:
    """Fields of config.json that all three families share."""
    names = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_experts",
        "num_experts_per_tok",
        "norm_topk_prob",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
    )
    fields = {name: getattr(config, name) for name in names}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return fields | {"num_key_value_heads": config.kv_heads, "rope_parameters": rope}


def check_logits(config: ModelConfig, family: str, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    """Compare with the model of a family whose config takes further fields."""
    import transformers

    given = getattr(transformers, f"{family}Config")(**hub_fields(config), **fields)
    theirs = getattr(transformers, f"{family}ForCausalLM")(given).double().eval()
    # its grouped matrix product knows no fp64
    theirs.set_experts_implementation("eager")
    module, model = import_module(type(theirs).__module__), build(config).eval()
    copy_weights(model, theirs)
    ids = tokens(config, 3, 32)
    with torch.no_grad():
        # angles are fp32 in both models, so they are made before the module is told otherwise
        angles = theirs.model.rotary_emb(torch.empty(0, dtype=torch.float64), torch.arange(32)[None])
        monkeypatch.setattr(theirs.model.rotary_emb, "forward", lambda *args, **kwargs: angles)
        monkeypatch.setattr(module, "torch", WideTorch())
        expected = theirs(ids).logits
        got = model(ids)
    assert expected.dtype == torch.float64
    # measured at most 7.2e-16
    assert relative(got, expected) < 1e-12


@pytest.mark.parametrize("normalise", [False, True])
def test_logits_are_olmoe_s(normalise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(SMALL, num_key_value_heads=2, norm_topk_prob=normalise, rope_theta=500.0)
    check_logits(config, "Olmoe", monkeypatch, intermediate_size=config.intermediate_size)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_qwen3_moe_s(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(
        SMALL,
        qk_norm="head",
        head_dim=6,
        num_key_value_heads=2,
        norm_topk_prob=True,
        tie_word_embeddings=tied,
        num_hidden_layers=3,
        dense_layers=[1],
        dense_intermediate_size=20,
    )
    check_logits(
        config,
        "Qwen3Moe",
        monkeypatch,
        moe_intermediate_size=config.intermediate_size,
        intermediate_size=config.dense_intermediate_size,
        mlp_only_layers=config.dense_layers,
        decoder_sparse_step=1,
        head_dim=config.head_dim,
    )


def test_logits_are_qwen2_moe_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a shared expert and its gate, a dense layer, and zero biases, which ours does not have."""
    config = replace(
        SMALL,
        qk_norm="none",
        num_hidden_layers=3,
        dense_layers=[1],
        dense_intermediate_size=20,
        shared_expert_intermediate_size=10,
        shared_expert_gate=True,
    )
    check_logits(
        config,
        "Qwen2Moe",
        monkeypatch,
        moe_intermediate_size=config.intermediate_size,
        intermediate_size=config.dense_intermediate_size,
        shared_expert_intermediate_size=config.shared_expert_intermediate_size,
        mlp_only_layers=config.dense_layers,
        decoder_sparse_step=1,
    )


@each_shape
@pytest.mark.parametrize("normalise", [False, True])
def test_logits_are_the_plain_model_s(config: ModelConfig, normalise: bool) -> None:
    """Every option, and packed documents in one row of two."""
    config = replace(config, norm_topk_prob=normalise)
    model, ids = build(config).eval(), tokens(config, 2, 21)
    document_ids = torch.stack([torch.zeros(21), torch.arange(21) // 8]).long()
    plain = PlainConfig(**{field.name: getattr(config, field.name, None) for field in fields(PlainConfig)})
    params = {name: parameter.detach() for name, parameter in model.named_parameters()}
    output = plain_moe.forward(params, plain, ids, document_ids)
    assert min(routing["topk_gap"] for routing in output.router) > 1e-5
    # measured at most 4e-8: our angles are fp32
    assert relative(model(ids, document_ids=document_ids).detach(), output.logits) < 1e-6


# --- configs of the repository


def test_the_demo_is_an_olmoe() -> None:
    """So that it can be exported as one."""
    assert family_of(load([str(CONFIGS / "demo.yaml")]).model).architecture == "OlmoeForCausalLM"


def test_olmoe_1b_7b_is_as_large_as_olmoe() -> None:
    """Parameters of allenai/OLMoE-1B-7B-0924, and 8 of its 64 experts with all the rest."""
    model = load([str(CONFIGS / "olmoe_1b_7b.yaml")]).model
    assert family_of(model).architecture == "OlmoeForCausalLM"
    assert model.num_params() == 6_919_161_856
    assert model.active_params() == 1_282_017_280


# --- loss


def test_labels_that_do_not_count_are_left_out() -> None:
    model, ids = build(SMALL).eval(), tokens(SMALL, 2, 9)
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    log_probs = model(ids).log_softmax(-1)[:, :-1]
    expected = -log_probs.gather(-1, ids[:, 1:, None]).mean()
    torch.testing.assert_close(model(ids, labels=labels), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("balance", ["aux_loss", "bias", "none"])
def test_training_loss_adds_its_weighted_parts(balance: str) -> None:
    runtime = Runtime(balance=balance, aux_loss_coef=0.5, z_loss_coef=0.25)
    model, ids = build(SMALL, runtime), tokens(SMALL, 2, 9)
    loss = model(ids, labels=ids)
    parts = model.last_losses
    assert parts is not None
    balance_loss, z_loss = parts.balance_Lm.mean(), parts.z_Lm.mean()
    assert len(parts.balance_Lm) == len(parts.z_Lm) == len(SMALL.moe_layers)
    assert float(balance_loss) > 1.0
    assert float(z_loss) > 0.0
    expected = parts.cross_entropy + 0.25 * z_loss + (0.5 * balance_loss if balance == "aux_loss" else 0)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(model.eval()(ids, labels=ids), parts.cross_entropy, rtol=1e-12, atol=0)


def test_evaluation_does_not_count_towards_balancing() -> None:
    model, ids = build(SMALL, Runtime(balance="bias", bias_update_rate=0.5)), tokens(SMALL, 2, 9)
    model(ids, labels=ids)
    model.eval()(tokens(SMALL, 2, 9, seed=1), labels=ids)
    counts = model.train().finish_step()
    assert counts.sum(dim=1).tolist() == [ids.numel() * SMALL.num_experts_per_tok] * SMALL.num_hidden_layers


def test_too_long_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence of 33 is longer than max_position_embeddings=32"):
        build(SMALL)(tokens(SMALL, 1, 33))


# --- documents


@pytest.mark.parametrize("config", [SMALL, SHAPES["grouped_query"]], ids=["plain", "grouped"])
@pytest.mark.parametrize("lengths", [[5, 1, 9], [15], [1] * 15, [7, 8]])
def test_packed_documents_are_as_if_run_alone(config: ModelConfig, lengths: list[int]) -> None:
    model = build(config).eval()
    first, second = tokens(config, 2, sum(lengths))
    # ids need not ascend; a second row with other borders shows that rows are told apart
    document_ids = torch.repeat_interleave(torch.arange(len(lengths)).flip(0) * 3, torch.tensor(lengths))
    other_ids = torch.arange(sum(lengths)) // 4
    with torch.no_grad():
        packed = model(torch.stack([first, second]), document_ids=torch.stack([document_ids, other_ids]))
        alone = [model(part[None])[0] for part in first.split(lengths)]
        other = [model(part[None])[0] for part in second.split(4)]
    # measured at most 4.8e-16
    assert relative(packed[0], torch.cat(alone)) < 1e-13
    assert relative(packed[1], torch.cat(other)) < 1e-13


def test_without_document_ids_tokens_see_what_came_before() -> None:
    model, ids = build(SMALL).eval(), tokens(SMALL, 1, 10)
    with torch.no_grad():
        whole, apart = model(ids), model(ids[:, 5:])
        one = model(ids, document_ids=torch.zeros_like(ids))
    assert relative(whole[:, 5:], apart) > 0.1
    assert relative(one, whole) < 1e-13


def test_no_token_sees_what_comes_after() -> None:
    model, ids = build(SMALL).eval(), tokens(SMALL, 1, 10)
    changed = ids.clone()
    changed[0, 6] = (changed[0, 6] + 1) % SMALL.vocab_size
    with torch.no_grad():
        before, after = model(ids), model(changed)
    # the experts' matrix products may be split differently
    assert relative(after[:, :6], before[:, :6]) < 1e-13
    assert relative(after[:, 6:], before[:, 6:]) > 0.1


# --- selective checkpointing


@contextmanager
def counted(owner: Any, name: str) -> Iterator[list[str]]:
    """Note each call of owner.name."""
    calls: list[str] = []
    original: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(*args, **kwargs)

    setattr(owner, name, call)
    try:
        yield calls
    finally:
        setattr(owner, name, original)


def step(model: GPT, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one micro-batch."""
    model.zero_grad()
    loss = model(ids, labels=ids.roll(-1, 1))
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def selective(runtime: Runtime) -> tuple[Runtime, Runtime]:
    """Without and with selective checkpointing."""
    return replace(runtime, selective_checkpointing=False), replace(runtime, selective_checkpointing=True)


LOSSES = Runtime(balance="aux_loss", aux_loss_coef=0.1, z_loss_coef=0.1)


@pytest.mark.parametrize("config", [SHAPES["shared_and_gate"], SHAPES["dense_layers"], SHAPES["head_norm_and_width"]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_selective_checkpointing_changes_no_bit(config: ModelConfig, dtype: torch.dtype) -> None:
    ids = tokens(config, 2, 16)
    (loss, grads), (recomputed_loss, recomputed) = (
        step(build(config, runtime).to(dtype), ids) for runtime in selective(LOSSES)
    )
    assert torch.equal(loss, recomputed_loss)
    assert grads.keys() == recomputed.keys() == {name for name, _ in GPT(config).named_parameters()}
    for name, grad in grads.items():
        assert torch.equal(grad, recomputed[name]), name


def test_selective_checkpointing_recomputes_but_does_not_choose_again() -> None:
    ids = tokens(SMALL, 2, 16)
    for runtime, times in zip(selective(LOSSES), (1, 2), strict=True):
        model = build(SMALL, runtime)
        with counted(Router, "choose") as chosen, counted(model.layers[0].attention, "forward") as attended:
            step(model, ids)
        assert len(chosen) == SMALL.num_hidden_layers
        assert len(attended) == times


def test_selective_checkpointing_keeps_less() -> None:
    """Bytes that autograd holds between forward and backward, parameters aside."""
    held = []
    ids = tokens(SMALL, 2, 32)
    for runtime in selective(Runtime()):
        model = build(SMALL, runtime)
        own = {parameter.data_ptr() for parameter in model.parameters()}
        kept: dict[int, int] = {}

        def pack(x: Tensor, own: set[int] = own, kept: dict[int, int] = kept) -> Tensor:
            if x.data_ptr() not in own:
                kept[x.data_ptr()] = x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(ids, labels=ids)
        held.append(sum(kept.values()))
        del loss
    # measured 550 kB and 143 kB
    assert held[1] < 0.5 * held[0]


def _dedup_steps(rank: int) -> list[tuple[int, int, Tensor, dict[str, Tensor]]]:
    """all_to_all calls in forward and backward, loss and gradients, without and with selective checkpointing."""
    config, ids = SHAPES["shared_and_gate"], tokens(SHAPES["shared_and_gate"], 2, 16, seed=rank)
    placements = {0: Placement((3, 1, 5, 0, 2, 4))}
    results = []
    for runtime in selective(replace(LOSSES, grid=Grid.create(2), dispatcher="dedup", placements=placements)):
        model = build(config, runtime)
        with counted(dist, "all_to_all_single") as forward:
            loss = model(ids, labels=ids.roll(-1, 1))
        with counted(dist, "all_to_all_single") as backward:
            loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((len(forward), len(backward), loss.detach(), grads))
    return results


def test_selective_checkpointing_sends_nothing_twice() -> None:
    for plain, recomputed in run_distributed(_dedup_steps, 2):
        assert plain[0] > 0
        assert plain[1] > 0
        assert plain[:2] == recomputed[:2]
        assert torch.equal(plain[2], recomputed[2])
        for name, grad in plain[3].items():
            assert torch.equal(grad, recomputed[3][name]), name


# --- first weights


def expert_weights(model: GPT) -> dict[str, Tensor]:
    """Every routed expert's weights under `<stack>.<expert id>`."""
    return {
        f"layers.{i}.moe.experts.{name}.{expert}": getattr(layer.experts, name)[place]
        for i, layer in model.moe_layers().items()
        for name in ("w1", "w2", "w3")
        for place, expert in enumerate(layer.placement.by_device(layer.ep_size)[layer.ep_rank])
    }


def initial(config: ModelConfig, size: int, rank: int, placements: dict[int, Placement], seed: int = 5) -> GPT:
    """One rank's model; nothing of it needs a process group until it runs."""
    grid = Grid(rank=rank, world_size=size, expert_size=size, expert_rank=rank)
    model = GPT(config, Runtime(grid=grid, dispatcher="dedup", placements=placements))
    init_weights(model, seed)
    return model


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("placed", [False, True])
def test_initial_weights_are_one_logical_model(size: int, placed: bool) -> None:
    """Whatever the expert-parallel size and the placement."""
    config = SHAPES["shared_and_gate"]
    placements = {0: Placement((3, 1, 5, 0, 2, 4)), 1: Placement((5, 4, 3, 2, 1, 0))} if placed else {}
    whole = GPT(config)
    init_weights(whole, seed=5)
    experts: dict[str, Tensor] = {}
    for rank in range(size):
        part = initial(config, size, rank, placements)
        for name, parameter in part.named_parameters():
            if ".moe.experts." in name:
                assert parameter.shape[0] == config.num_experts // size
            else:
                assert torch.equal(parameter, whole.get_parameter(name)), name
        experts |= expert_weights(part)
    expected = expert_weights(whole)
    assert experts.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(experts[name], weight), name


def test_initial_weights_are_all_different_and_normal() -> None:
    config = replace(SMALL, hidden_size=64, intermediate_size=48, initializer_range=0.03)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan if parameter.dim() > 1 else 1.0)
    init_weights(model, seed=5)
    matrices = {n: p for n, p in model.named_parameters() if p.dim() == 2} | expert_weights(model)
    assert len({float(m.detach().flatten()[0]) for m in matrices.values()}) == len(matrices)
    for name, matrix in matrices.items():
        count = matrix.numel()
        # five standard errors of mean and of standard deviation; the seed is fixed
        assert abs(float(matrix.detach().mean())) < 5 * 0.03 / count**0.5, name
        assert abs(float(matrix.detach().std()) / 0.03 - 1) < 5 / (2 * count) ** 0.5, name
    assert all((p == 1).all() for p in model.parameters() if p.dim() == 1)


def test_initial_weights_follow_the_seed() -> None:
    first, again, other = (initial(SMALL, 1, 0, {}, seed) for seed in (5, 5, 6))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
        assert parameter.dim() == 1 or not torch.equal(parameter, other.get_parameter(name)), name


def test_tied_embeddings_are_one_parameter() -> None:
    model = GPT(SHAPES["no_norm_tied"])
    assert model.lm_head.weight is model.embed_tokens.weight
    assert not any(name.startswith("lm_head") for name, _ in model.named_parameters())
