"""Host functions behind `opaque`: one operator in a compiled graph, a plain call outside it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from occult_train.kernels.compiling import opaque

eager_calls: list[str] = []


def _fake_split(x_NC: Tensor, at: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    return x_NC.new_empty(x_NC.shape[0], at), x_NC.new_empty(x_NC.shape[0], x_NC.shape[1] - at)


@opaque("occult_tests::split", fake=_fake_split)
def split(x_NC: Tensor, at: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Columns before and after `at`, scaled; looks at values, as no traced function may."""
    eager_calls.append("split")
    factor = float(x_NC.sum().item()) * 0 + scale
    return x_NC[:, :at] * factor, x_NC[:, at:] * factor


def _fake_add_into(out: Tensor, x: Tensor, other: Tensor | None = None) -> None:
    return None


@opaque("occult_tests::add_into", fake=_fake_add_into, mutates=("out",))
def add_into(out: Tensor, x: Tensor, other: Tensor | None = None) -> None:
    """Adds x, and `other` if given, into out."""
    out += x if other is None else x + other


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return split(x, 1, scale=3.0)[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(grad[:, :1]), split(grad, 0, 3.0)[1]], 1)


class _Seen(TorchDispatchMode):
    """Names of the operators that were dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs or {})


def test_an_eager_call_is_the_plain_function() -> None:
    with _Seen() as seen:
        left, right = split(torch.arange(6.0).view(2, 3), 1, 2.0)
    assert seen.names
    assert not [name for name in seen.names if name.startswith("occult_tests")]
    assert left.tolist() == [[0.0], [6.0]]
    assert right.tolist() == [[2.0, 4.0], [8.0, 10.0]]


@pytest.mark.parametrize("rows", [1, 5])
def test_compiled_whole_and_called_once(rows: int) -> None:
    def step(x: Tensor) -> Tensor:
        left, right = split(x.sin(), 1, scale=2.0)
        return left.cos() + right

    x = torch.randn(rows, 4)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager_calls.clear()
    got = compiled(x)
    assert eager_calls == ["split"]
    torch.testing.assert_close(got, step(x))


def test_written_arguments_are_declared() -> None:
    def step(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        add_into(out, x)
        add_into(out, x, other=x)
        return out * 2

    x = torch.randn(3)
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(x), x * 6)


def test_gradients_of_an_autograd_function_that_calls_one() -> None:
    def step(x: Tensor) -> Tensor:
        return _Scaled.apply(x * 1.0).sum()

    x = torch.randn(3, 3, requires_grad=True)
    torch.compile(step, fullgraph=True, backend="aot_eager")(x).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 3.0, 3.0]] * 3


def test_schema_and_fake_agree_with_the_function() -> None:
    torch.library.opcheck(torch.ops.occult_tests.split.default, (torch.randn(3, 4), 1, 2.0))
