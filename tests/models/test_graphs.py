"""Parts of blocks replayed as graphs: the results and gradients of launching one by one, but for the order of sums."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from occult_train.config import load
from occult_train.engine import runtime
from occult_train.errors import ConfigError
from occult_train.models.config import ModelConfig
from occult_train.models.gpt import GPT, Runtime
from occult_train.models.graphs import Graphs
from occult_train.models.init import init_weights
from occult_train.models.scmoe_config import ScMoEConfig
from occult_train.moe.fused import Way
from occult_train.parallel.grid import Grid
from occult_train.testing import requires_gpu

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "a dense layer": {"dense_layers": [0], "dense_intermediate_size": 24},
    "scmoe": {
        **{"num_experts_per_tok": 1, "shared_expert_intermediate_size": 24, "dense_intermediate_size": 24},
        "scmoe": ScMoEConfig(block="scmoe", combine="cg1"),
    },
    "cg2, every block": {
        **{"num_experts_per_tok": 1, "shared_expert_intermediate_size": 24},
        "scmoe": ScMoEConfig(block="scmoe", position="pos1", combine="cg2", every=1),
    },
}


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: the operations that ran, done again on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.steps.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, result in self.steps:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.data.copy_(new)


def tape(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """As `Capture`."""
    with Tape() as recorded:
        result = function()
    return recorded.replay, result


def config(shape: str) -> ModelConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2}
    sizes |= {"vocab_size": 31, "num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 16}
    return ModelConfig(**(sizes | SHAPES[shape]))


def make(shape: str, graphs: Graphs | None) -> GPT:
    model = GPT(config(shape), Runtime(graphs=graphs))
    init_weights(model, 5)
    return model.double()


def batch(seed: int, size: int = 2, device: str = "cpu") -> Tensor:
    return torch.randint(31, (size, 9), generator=torch.Generator().manual_seed(seed)).to(device)


def train(model: GPT, micro_batches: list[Tensor]) -> Tensor:
    """A step of plain descent over micro-batches; their losses."""
    losses = []
    for ids in micro_batches:
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        losses.append(loss.detach())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    model.zero_grad(set_to_none=True)
    return torch.stack(losses)


def check_training(plain: GPT, replayed: GPT, device: str = "cpu", **tolerance: float) -> None:
    """Steps of two micro-batches, whose gradients are added, and an evaluation behind each."""
    tolerance = tolerance or {"rtol": 1e-12, "atol": 1e-14}
    for step in range(4):
        ids = [batch(10 * step + i, device=device) for i in range(2)]
        assert_close(train(replayed, ids), train(plain, ids), **tolerance)
        with torch.no_grad():
            assert_close(replayed(ids[0]), plain(ids[0]), **tolerance)
    for (name, got), right in zip(replayed.named_parameters(), plain.parameters(), strict=True):
        assert_close(got, right, **tolerance, msg=lambda told, name=name: f"{name}: {told}")


@pytest.mark.parametrize("shape", SHAPES)
def test_training_is_the_same(shape: str) -> None:
    check_training(make(shape, None), make(shape, Graphs(tape)))


def test_each_part_is_captured_once_and_then_only_replayed() -> None:
    calls: list[int] = []

    def counted(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        replay, result = tape(function)
        calls.append(0)
        number = len(calls) - 1

        def again() -> None:
            calls[number] += 1
            replay()

        return again, result

    model = make("plain", Graphs(counted))
    for step in range(3):
        train(model, [batch(step)])
    assert calls == [3] * 16  # attention and router of four blocks, forward and backward


def test_inputs_of_another_shape_are_computed_one_by_one() -> None:
    plain, replayed = make("plain", None), make("plain", Graphs(tape))
    for size in (2, 3, 2, 1):
        assert_close(train(replayed, [batch(size, size)]), train(plain, [batch(size, size)]), rtol=1e-12, atol=0)


def test_gradients_do_not_lie_where_the_next_ones_will() -> None:
    model = make("plain", Graphs(tape))
    model(batch(0)[:, :-1], batch(0)[:, 1:]).backward()
    kept = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    values = {name: grad.clone() for name, grad in kept.items()}
    model.zero_grad(set_to_none=True)
    model(batch(1)[:, :-1], batch(1)[:, 1:]).backward()
    assert all(torch.equal(grad, values[name]) for name, grad in kept.items())


def test_a_part_copies_its_gradients_once() -> None:
    """Into one storage, which autograd takes as it is."""
    model = make("a dense layer", Graphs(tape))
    for seed in range(2):
        model.zero_grad(set_to_none=True)
        model(batch(seed)[:, :-1], batch(seed)[:, 1:]).backward()
    block = model.layers[0]
    for part in (block.attention, block.mlp):
        grads = [parameter.grad for parameter in part.parameters()]
        assert len(grads) >= 3
        assert len({grad.untyped_storage().data_ptr() for grad in grads if grad is not None}) == 1


def test_frozen_parameters_get_no_gradient() -> None:
    plain, replayed = make("scmoe", None), make("scmoe", Graphs(tape))
    for model in (plain, replayed):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("attention" not in name)
    for step in range(3):
        assert_close(train(replayed, [batch(step)]), train(plain, [batch(step)]), rtol=1e-12, atol=0)


def test_parameters_that_moved_are_captured_again() -> None:
    plain, replayed = make("plain", None), make("plain", Graphs(tape))
    for step in range(4):
        assert_close(train(replayed, [batch(step)]), train(plain, [batch(step)]), rtol=1e-12, atol=0)
        with torch.no_grad():
            assert_close(replayed(batch(step)), plain(batch(step)), rtol=1e-12, atol=1e-14)
        if step == 1:
            old = [parameter.data for parameter in replayed.parameters()]
            for parameter in replayed.parameters():
                parameter.data = parameter.data.clone()
            for data in old:
                data.fill_(float("nan"))


def test_a_second_forward_before_backward_is_an_error() -> None:
    model = make("plain", Graphs(tape))
    first = model(batch(0)[:, :-1], batch(0)[:, 1:])
    model(batch(1)[:, :-1], batch(1)[:, 1:])
    with pytest.raises(RuntimeError, match="ran forward again before its backward"):
        first.backward()


def test_graphs_and_recomputation_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="would compute again"):
        GPT(config("plain"), Runtime(graphs=Graphs(tape), selective_checkpointing=True))


def test_without_a_gpu_the_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^train\.cuda_graphs=true needs a CUDA GPU, and this machine has none$"):
        runtime(load(["train.cuda_graphs=true"]), Grid())


def test_a_capture_does_not_come_to_the_nodes_of_parameters() -> None:
    """DeepSpeed holds them for its hooks, on the stream on which it made them."""
    model = make("scmoe", None)
    parameters = dict(model.named_parameters())

    def checked(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        inside = dict(model.named_parameters())
        part = {name for name in parameters if inside[name] is not parameters[name]}
        assert part, "a part computes with parameters of its own"
        assert all(inside[name].data_ptr() == parameters[name].data_ptr() for name in parameters)
        return tape(function)

    graphs = Graphs(checked)
    for block in model.layers:
        block.run = graphs.run
    plain = make("scmoe", None)
    for step in range(2):
        assert_close(train(model, [batch(step)]), train(plain, [batch(step)]), rtol=1e-12, atol=0)
    assert all(found is parameters[name] for name, found in model.named_parameters())


def hold_nodes(model: GPT) -> list[Any]:
    """Parameters' nodes of the graph, kept alive as DeepSpeed does."""
    functions: list[Any] = [parameter.expand_as(parameter).grad_fn for parameter in model.parameters()]
    return [function.next_functions[0][0] for function in functions]


@pytest.mark.gpu
@requires_gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", [None, Way("triton")], ids=str)
def test_on_a_gpu_training_is_the_same(shape: str, way: Way | None) -> None:
    models = []
    for graphs in (None, Graphs()):
        with torch.device("cuda"):
            models.append(GPT(config(shape), Runtime(graphs=graphs, way=way)))
        init_weights(models[-1], 5)
    held = [hold_nodes(model) for model in models]
    check_training(*models, "cuda", rtol=1e-4, atol=1e-6)
    del held  # until here
