"""Checks the reference itself: against transformers, against torch.optim, and on cases worked by hand."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from plain_moe import (
    Batches,
    MicroBatch,
    Params,
    PlainConfig,
    adamw,
    attention_mask,
    bias_update,
    clip_scale,
    cross_entropy,
    expert_counts,
    forward,
    init_params,
    load_balancing_loss,
    mean,
    param_shapes,
    positions_in_document,
    route,
    train,
    z_loss,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

SMALL = PlainConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_experts=6,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    initializer_range=0.2,
)
TINY = replace(SMALL, vocab_size=29, hidden_size=16, intermediate_size=8, num_attention_heads=2)


class DoubleThroughout(TorchFunctionMode):
    """transformers rounds norms, softmaxes and rotary angles to float32 by name; read that name as float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def double(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(double, args), **{name: double(value) for name, value in (kwargs or {}).items()})


def random_ids(config: PlainConfig, batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def to_transformers(params: Params, config: PlainConfig) -> Params:
    """The same weights under transformers' names."""
    state = {"model.embed_tokens.weight": params["embed_tokens.weight"], "model.norm.weight": params["norm.weight"]}
    state["lm_head.weight"] = params["embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    for i in range(config.num_hidden_layers):
        old, new = f"layers.{i}", f"model.layers.{i}"
        state[f"{new}.input_layernorm.weight"] = params[f"{old}.attention_norm.weight"]
        state[f"{new}.post_attention_layernorm.weight"] = params[f"{old}.mlp_norm.weight"]
        for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            if f"{old}.attention.{part}.weight" in params:
                state[f"{new}.self_attn.{part}.weight"] = params[f"{old}.attention.{part}.weight"]
        swiglus = {f"{old}.mlp": f"{new}.mlp", f"{old}.moe.shared_expert": f"{new}.mlp.shared_expert"}
        for source, target in swiglus.items():
            for ours, theirs in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
                if f"{source}.{ours}.weight" in params:
                    state[f"{target}.{theirs}.weight"] = params[f"{source}.{ours}.weight"]
        if i in config.moe_layers:
            w1, w2, w3 = (params[f"{old}.moe.experts.{w}"] for w in ("w1", "w2", "w3"))
            state[f"{new}.mlp.gate.weight"] = params[f"{old}.moe.router.weight"]
            state[f"{new}.mlp.experts.gate_up_proj"] = torch.cat([w1, w3], dim=1)
            state[f"{new}.mlp.experts.down_proj"] = w2
        if f"{old}.moe.shared_expert_gate.weight" in params:
            state[f"{new}.mlp.shared_expert_gate.weight"] = params[f"{old}.moe.shared_expert_gate.weight"]
    return state


def transformers_model(
    model_class: Any, config_class: Any, params: Params, config: PlainConfig, **settings: Any
) -> torch.nn.Module:
    """Build transformers' model with these weights in float64; any bias of theirs is set to 0."""
    common = {
        name: getattr(config, name)
        for name in (
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
    }
    theirs = config_class(
        **common,
        **settings,
        num_key_value_heads=config.kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        attn_implementation="eager",
        experts_implementation="eager",
        pad_token_id=None,
    )
    with DoubleThroughout():
        model = model_class(theirs).double().eval()
    missing, unexpected = model.load_state_dict(to_transformers(params, config), strict=False)
    assert not unexpected
    assert all(name.endswith("_proj.bias") for name in missing)
    for name in missing:
        torch.nn.init.zeros_(model.get_parameter(name))
    assert all(b.dtype == torch.float64 for _, b in model.named_buffers())
    return model


def check_against(model: torch.nn.Module, params: Params, config: PlainConfig) -> None:
    """Logits, and through cross-entropy every gradient, agree to rounding."""
    ids = random_ids(config, 2, 24)
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    output = forward(leaves, config, ids)
    with DoubleThroughout():
        expected = model(ids, use_cache=False).logits
    assert expected.dtype == torch.float64
    assert expected.std() > 0.1
    assert min(r["topk_gap"] for r in output.router) > 1e-6
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-9)

    labels = random_ids(config, 2, 24, seed=1)
    ours = torch.autograd.grad(cross_entropy(output.logits, labels), list(leaves.values()))
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    grads = to_transformers(dict(zip(leaves, ours, strict=True)), config)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, model.get_parameter(name).grad, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [0, 2])
def test_olmoe(norm_topk_prob: bool, tied: bool, kv_heads: int) -> None:
    config = replace(SMALL, norm_topk_prob=norm_topk_prob, tie_word_embeddings=tied, num_key_value_heads=kv_heads)
    params = init_params(config, seed=1)
    model = transformers_model(
        OlmoeForCausalLM, OlmoeConfig, params, config, intermediate_size=config.intermediate_size
    )
    check_against(model, params, config)


def test_qwen3_moe() -> None:
    """Norm of each head, a head_dim of its own, grouped queries, a dense layer and another base of the rotation."""
    config = replace(
        SMALL,
        num_hidden_layers=3,
        num_key_value_heads=2,
        head_dim=12,
        qk_norm="head",
        norm_topk_prob=True,
        dense_layers=[1],
        dense_intermediate_size=40,
        rope_theta=500.0,
        rms_norm_eps=1e-3,
    )
    params = init_params(config, seed=2)
    model = transformers_model(
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        params,
        config,
        head_dim=12,
        moe_intermediate_size=config.intermediate_size,
        intermediate_size=config.dense_intermediate_size,
        mlp_only_layers=config.dense_layers,
    )
    check_against(model, params, config)


def test_qwen2_moe() -> None:
    """No norm of queries and keys, a gated shared expert and a dense layer."""
    config = replace(
        SMALL,
        num_hidden_layers=3,
        qk_norm="none",
        shared_expert_intermediate_size=20,
        shared_expert_gate=True,
        dense_layers=[0],
        dense_intermediate_size=40,
    )
    params = init_params(config, seed=3)
    model = transformers_model(
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        params,
        config,
        moe_intermediate_size=config.intermediate_size,
        shared_expert_intermediate_size=20,
        intermediate_size=config.dense_intermediate_size,
        mlp_only_layers=config.dense_layers,
    )
    check_against(model, params, config)


def test_ungated_shared_expert() -> None:
    """Without the gate, the shared expert's output is twice that of a gate of zeros, whose sigmoid is 1/2."""
    gated = replace(SMALL, shared_expert_intermediate_size=20, shared_expert_gate=True)
    plain = replace(gated, shared_expert_gate=False)
    params = init_params(gated, seed=4)
    for i in gated.moe_layers:
        params[f"layers.{i}.moe.shared_expert_gate.weight"].zero_()
    halved = {name: value / 2 if "shared_expert.w2" in name else value for name, value in params.items()}
    ids = random_ids(SMALL, 1, 9)
    torch.testing.assert_close(
        forward(halved, plain, ids).logits, forward(params, gated, ids).logits, rtol=0, atol=1e-12
    )


def test_param_shapes() -> None:
    config = replace(SMALL, num_key_value_heads=2, dense_layers=[0], dense_intermediate_size=40)
    shapes = param_shapes(config)
    assert shapes["layers.0.mlp.w2.weight"] == (32, 40)
    assert shapes["layers.1.moe.experts.w1"] == (6, 24, 32)
    assert shapes["layers.1.moe.experts.w2"] == (6, 32, 24)
    assert shapes["layers.1.attention.k_norm.weight"] == (16,)
    assert not any(name.startswith(("layers.0.moe", "layers.1.mlp.")) for name in shapes)
    assert "lm_head.weight" not in param_shapes(replace(config, tie_word_embeddings=True))


def test_float32_is_the_same_model() -> None:
    ids = random_ids(SMALL, 2, 16)
    exact = forward(init_params(SMALL, seed=1), SMALL, ids).logits
    single = forward(init_params(SMALL, seed=1, dtype=torch.float32), SMALL, ids).logits
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-4)


def test_route_by_hand() -> None:
    config = replace(SMALL, num_experts=4, num_experts_per_tok=2)
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.6, 0.1 - 1e-3]], dtype=torch.float64).log()
    plain = route(logits[:1], config)
    assert plain["experts"].tolist() == [[0, 1]]
    assert plain["topk_gap"] == pytest.approx(0.1)
    torch.testing.assert_close(plain["weights"], torch.tensor([[0.4, 0.3]], dtype=torch.float64))
    normalised = route(logits[:1], replace(config, norm_topk_prob=True))
    torch.testing.assert_close(normalised["weights"], torch.tensor([[4 / 7, 3 / 7]], dtype=torch.float64))

    # Scores become 0.1, 0.3, 0.2, 0.35: the bias moves the choice, the weights stay probabilities.
    biased = route(logits[:1], config, torch.tensor([-0.3, 0.0, 0.0, 0.25], dtype=torch.float64))
    assert biased["experts"].tolist() == [[3, 1]]
    assert biased["topk_gap"] == pytest.approx(0.1)
    torch.testing.assert_close(biased["weights"], torch.tensor([[0.1, 0.3]], dtype=torch.float64))

    everything = route(logits, replace(config, num_experts_per_tok=4))
    assert everything["topk_gap"] == math.inf


def test_documents() -> None:
    """A packed row gives each document the logits that it gets alone."""
    config = replace(SMALL, num_key_value_heads=2)
    params = init_params(config, seed=5)
    first, second = random_ids(config, 1, 11, seed=1), random_ids(config, 1, 7, seed=2)
    packed = torch.cat([first, second], dim=1)
    document_ids = torch.tensor([[3] * 11 + [8] * 7])
    logits = forward(params, config, packed, document_ids).logits
    alone = torch.cat([forward(params, config, ids).logits for ids in (first, second)], dim=1)
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-12)
    unmasked = forward(params, config, packed).logits
    torch.testing.assert_close(logits[:, :11], unmasked[:, :11], rtol=0, atol=1e-12)
    assert (logits[:, 11:] - unmasked[:, 11:]).abs().max() > 1e-2

    positions = positions_in_document(attention_mask(document_ids.shape, document_ids))
    assert positions.tolist() == [[*range(11), *range(7)]]


def test_causal() -> None:
    """A token changes only the logits from its own position on."""
    params = init_params(SMALL, seed=6)
    ids = random_ids(SMALL, 1, 12)
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % SMALL.vocab_size
    difference = (forward(params, SMALL, ids).logits - forward(params, SMALL, changed).logits).abs().amax(dim=-1)[0]
    assert difference[:5].max() == 0
    assert difference[5:].min() > 0


def test_cross_entropy_and_z_loss() -> None:
    logits = torch.randn(3, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12).reshape(3, 4) % 7
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(cross_entropy(logits, labels), expected)
    # exp sums to 4 and to e: squares of log 4 and of 1.
    rows = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, -math.inf, -math.inf, -math.inf]], dtype=torch.float64)
    assert z_loss(rows).item() == pytest.approx((math.log(4) ** 2 + 1) / 2)


def test_load_balancing_loss_by_hand() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.7, 0.1, 0.2]], dtype=torch.float64)
    # P = 0.6, 0.2, 0.2. Each token to one expert, both to the first: f = 1, 0, 0.
    assert load_balancing_loss(torch.tensor([2, 0, 0]), probs, 2, 1).item() == pytest.approx(3 * 0.6)
    # Two experts each, {0, 1} and {0, 2}: f = 1/2, 1/4, 1/4.
    assert load_balancing_loss(torch.tensor([2, 1, 1]), probs, 2, 2).item() == pytest.approx(3 * (0.3 + 0.05 + 0.05))
    # Counts of eight tokens, of which two are at hand: f = 1/4, 1/2, 1/4.
    assert load_balancing_loss(torch.tensor([2, 4, 2]), probs, 8, 1).item() == pytest.approx(3 * (0.15 + 0.1 + 0.05))
    # Balanced loads, or balanced probabilities, give 1.
    assert load_balancing_loss(torch.tensor([4, 4, 4]), probs, 6, 2).item() == pytest.approx(1)
    even = torch.full((2, 3), 1 / 3, dtype=torch.float64)
    assert load_balancing_loss(torch.tensor([2, 1, 1]), even, 2, 2).item() == pytest.approx(1)


def test_load_balancing_loss_of_transformers() -> None:
    """For one layer transformers' loss is K times ours: its f sums to K, ours to 1."""
    logits = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    routing = route(logits, SMALL)
    ours = load_balancing_loss(expert_counts(routing["experts"], 6), routing["probs"], 40, 2)
    with DoubleThroughout():
        theirs = load_balancing_loss_func((logits,), 6, 2)
    torch.testing.assert_close(2 * ours, theirs, rtol=1e-12, atol=0)


def test_bias_update_by_hand() -> None:
    bias = torch.tensor([0.0, 0.1, -0.1, 0.2], dtype=torch.float64)
    updated = bias_update(bias, torch.tensor([5, 1, 3, 3]), 0.01)
    torch.testing.assert_close(updated, torch.tensor([-0.01, 0.11, -0.1, 0.2], dtype=torch.float64))


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e3])
def test_adamw_and_clipping_of_torch(clip: float) -> None:
    generator = torch.Generator().manual_seed(0)
    params = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in (("a", (3, 4)), ("b", 5))
    }
    theirs = {name: value.clone().requires_grad_() for name, value in params.items()}
    groups = [{"params": [theirs["a"]], "weight_decay": 0.3}, {"params": [theirs["b"]], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.02, betas=(0.8, 0.95), eps=1e-3)
    exp_avg = {name: torch.zeros_like(value) for name, value in params.items()}
    exp_avg_sq = {name: torch.zeros_like(value) for name, value in params.items()}
    for t in range(1, 6):
        lr = 0.02 / t
        grads = {name: torch.randn(v.shape, generator=generator, dtype=v.dtype) for name, v in params.items()}
        for name, value in theirs.items():
            value.grad = grads[name].clone()
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = lr
        their_norm = torch.nn.utils.clip_grad_norm_(theirs.values(), clip or math.inf)
        optimizer.step()
        norm, scale = clip_scale(grads, clip)
        assert norm == pytest.approx(their_norm.item(), rel=1e-14)
        for name in params:
            params[name], exp_avg[name], exp_avg_sq[name] = adamw(
                params[name],
                grads[name] * scale,
                exp_avg[name],
                exp_avg_sq[name],
                t,
                lr=lr,
                betas=(0.8, 0.95),
                eps=1e-3,
                weight_decay=0.3 if name == "a" else 0.0,
            )
            torch.testing.assert_close(params[name], theirs[name].detach(), rtol=1e-13, atol=1e-15)
            state = optimizer.state[theirs[name]]
            torch.testing.assert_close(exp_avg[name], state["exp_avg"], rtol=1e-13, atol=1e-15)
            torch.testing.assert_close(exp_avg_sq[name], state["exp_avg_sq"], rtol=1e-13, atol=1e-15)


def samples(config: PlainConfig, count: int, seed: int = 0) -> list[MicroBatch]:
    """Micro-batches of one sequence each."""
    tokens = random_ids(config, count, 13, seed)
    return [(row[None, :-1], row[None, 1:]) for row in tokens]


def joined(parts: list[MicroBatch]) -> MicroBatch:
    return torch.cat([ids for ids, _ in parts]), torch.cat([labels for _, labels in parts])


@pytest.mark.parametrize("z_coef", [0.0, 0.1])
def test_arrangement_of_samples(z_coef: float) -> None:
    """Without the balancing loss, which rank or accumulation step a sample falls to changes nothing."""
    parts = samples(TINY, 4)
    arrangements: list[Batches] = [
        [[[joined(parts)]]],
        [[[parts[0]], [parts[1]], [parts[2]], [parts[3]]]],
        [[[parts[3], parts[1], parts[2], parts[0]]]],
        [[[parts[0], parts[2]], [parts[1], parts[3]]]],
        [[[joined(parts[:2]), joined(parts[2:])]]],
    ]
    params = init_params(TINY, seed=7)
    records = [train(TINY, params, batches, lr=0.01, balance="none", z_coef=z_coef) for batches in arrangements]
    for record in records[1:]:
        assert record.losses == pytest.approx(records[0].losses, rel=1e-13)
        assert record.z_losses == pytest.approx(records[0].z_losses, rel=1e-13)
        assert record.grad_norms == pytest.approx(records[0].grad_norms, rel=1e-12)
        for layer, counts in records[0].counts[0].items():
            assert record.counts[0][layer].tolist() == counts.tolist()
        for name, grad in records[0].grads[0].items():
            torch.testing.assert_close(record.grads[0][name], grad, rtol=0, atol=1e-14)


def test_scopes_differ_only_in_the_counts() -> None:
    """One micro-batch a step: the scopes agree. More: they differ, and the balancing loss enters the gradient."""
    parts = samples(TINY, 4)
    params = init_params(TINY, seed=7)
    single, grid = [[[joined(parts)]]], [[[parts[0], parts[1]], [parts[2], parts[3]]]]

    def gradients(batches: Batches, scope: str, coef: float = 0.1) -> Tensor:
        record = train(TINY, params, batches, lr=0.01, aux_scope=scope, aux_coef=coef)
        return record.grads[0]["layers.0.moe.router.weight"]

    assert torch.equal(gradients(single, "micro_batch"), gradients(single, "global_batch"))
    assert (gradients(grid, "micro_batch") - gradients(grid, "global_batch")).abs().max() > 1e-5
    assert (gradients(grid, "micro_batch") - gradients(grid, "micro_batch", coef=0.0)).abs().max() > 1e-5


def test_global_batch_counts() -> None:
    """Two ranks, two accumulation steps: the loss of the second step counts all four micro-batches."""
    config = TINY
    params = init_params(config, seed=8)
    parts = samples(config, 4, seed=1)
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    outputs = [forward(leaves, config, ids) for ids, _ in parts]

    def aux(own: int, counted: list[int]) -> Tensor:
        layers = []
        for layer in range(2):
            counts = torch.zeros(6)
            for sample in counted:
                for expert in outputs[sample].router[layer]["experts"].flatten().tolist():
                    counts[expert] += 1
            share = counts.double() / (12 * len(counted) * 2)
            layers.append(6 * (share * outputs[own].router[layer]["probs"].mean(dim=0)).sum())
        return (layers[0] + layers[1]) / 2

    auxes = [aux(0, [0, 1]), aux(1, [0, 1]), aux(2, [0, 1, 2, 3]), aux(3, [0, 1, 2, 3])]
    ces = [cross_entropy(o.logits, labels) for o, (_, labels) in zip(outputs, parts, strict=True)]
    loss = (sum(ces) + 0.1 * sum(auxes)) / 4
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    batches: Batches = [[parts[:2], parts[2:]]]
    record = train(config, params, batches, lr=0.01, aux_coef=0.1, z_coef=0.0, aux_scope="global_batch")
    assert record.aux_losses == pytest.approx([sum(x.item() for x in auxes) / 4], rel=1e-13)
    for name, grad in expected.items():
        torch.testing.assert_close(record.grads[0][name], grad, rtol=0, atol=1e-14)


def test_train_is_torch_on_the_whole_batch() -> None:
    """Several steps in a grid of micro-batches follow torch.optim.AdamW on the joined batches."""
    config = replace(TINY, tie_word_embeddings=True, dense_layers=[0], dense_intermediate_size=20)
    params = init_params(config, seed=9)
    steps = [samples(config, 4, seed=s) for s in range(4)]

    def lr(step: int) -> float:
        return 0.01 / (1 + step)

    record = train(
        config,
        params,
        [[[p[0], p[1]], [p[2], p[3]]] for p in steps],
        lr=lr,
        weight_decay=0.2,
        clip=0.7,
        balance="none",
        z_coef=0.01,
        decay=lambda name: "norm" not in name,
    )

    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    groups = [
        {"params": [v for n, v in leaves.items() if "norm" not in n], "weight_decay": 0.2},
        {"params": [v for n, v in leaves.items() if "norm" in n], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    for step, parts in enumerate(steps):
        ids, labels = joined(parts)
        output = forward(leaves, config, ids)
        ce = cross_entropy(output.logits, labels)
        optimizer.zero_grad()
        (ce + 0.01 * mean([z_loss(r["logits"]) for r in output.router])).backward()
        norm = torch.nn.utils.clip_grad_norm_(leaves.values(), 0.7)
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
        optimizer.step()
        assert norm > 0.7
        assert record.losses[step] == pytest.approx(ce.item(), rel=1e-10)
        assert record.grad_norms[step] == pytest.approx(norm.item(), rel=1e-10)
        for name, value in leaves.items():
            torch.testing.assert_close(record.params[step][name], value.detach(), rtol=0, atol=1e-9)
    for name, value in leaves.items():
        torch.testing.assert_close(record.exp_avg[name], optimizer.state[value]["exp_avg"], rtol=0, atol=1e-9)
        torch.testing.assert_close(record.exp_avg_sq[name], optimizer.state[value]["exp_avg_sq"], rtol=0, atol=1e-9)


def test_bias_balancing() -> None:
    """The bias follows the counts over all ranks and accumulation steps, starts from 0 and evens out the loads."""
    params = init_params(TINY, seed=10)
    parts = samples(TINY, 4)
    batches: Batches = [[[parts[0], parts[1]], [parts[2], parts[3]]]] * 40
    # lr 0 keeps the router in place, so that only the bias can move the loads.
    record = train(TINY, params, batches, lr=0.0, balance="bias", bias_rate=0.01, aux_coef=1e6)
    before = {i: torch.zeros(6, dtype=torch.float64) for i in TINY.moe_layers}
    for counts, after in zip(record.counts, record.expert_bias, strict=True):
        for i in TINY.moe_layers:
            assert counts[i].sum() == 4 * 12 * 2
            torch.testing.assert_close(after[i] - before[i], 0.01 * torch.sign(16.0 - counts[i].double()))
        before = after
    for i in TINY.moe_layers:
        assert record.counts[-1][i].max() < record.counts[0][i].max()
    unbalanced = train(TINY, params, batches[:1], lr=0.0, balance="none")
    assert torch.equal(unbalanced.expert_bias[0][0], torch.zeros(6, dtype=torch.float64))
    # The coefficient of the balancing loss is idle here.
    torch.testing.assert_close(unbalanced.grad_norms[0], record.grad_norms[0])
    assert 0 < record.min_topk_gap < 0.1


def test_training_learns() -> None:
    parts = samples(TINY, 4)
    record = train(TINY, init_params(TINY, seed=11), [[[parts[0], parts[1]], [parts[2], parts[3]]]] * 15, lr=0.02)
    assert record.losses[-1] < 0.5 * record.losses[0]
