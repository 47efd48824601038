"""Host functions of kernels as operators that torch.compile neither looks into nor breaks on."""

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def opaque(name: str, fake: Callable[P, R], mutates: Sequence[str] = ()) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a host function with `torch.library.custom_op`, and use the operator only while compiling.

    An eager call goes straight to the function: an operator's dispatch costs some 20 us, more than small kernels run.

    Args:
        name: "occult::grouped_nt"; one operator a name in a process.
        fake: the same arguments, returns empty tensors of the right shapes, types and devices, and reads no values.
        mutates: names of the arguments that the function writes into. What it returns must be new memory.

    The function's annotations are its schema: Tensor, Tensor | None, int, float, bool, str, torch.dtype, and as result
    a Tensor, None or a tuple of Tensors of fixed length. Gradients are not its business: an autograd function calls it.

    Example: `@opaque("occult::twice", fake=lambda x: torch.empty_like(x))` above `def twice(x: Tensor) -> Tensor`.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        operator = torch.library.custom_op(name, function, mutates_args=tuple(mutates))
        operator.register_fake(fake)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                return operator(*args, **kwargs)  # type: ignore[no-any-return]
            return function(*args, **kwargs)

        return call

    return decorate
