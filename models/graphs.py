"""Parts of a block replayed as CUDA graphs, for hosts that cannot launch kernels as fast as the GPU runs them.

A part (attention, an MLP, a router's logits) is a function of tensors. The first time it runs it is captured, forward
and backward; from then on each is one launch. What it keeps for backward and what it returns lie where they lay then,
so a forward is followed by its backward before the part's next forward, as it is in training without pipelines.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

WARMUP = 2
"""Calls before the one that is captured: kernels are compiled and tuned in them."""
Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]
"""Calls a function; returns what does again what it did, in the same memory, and its result."""


class Graphs:
    """The graphs of one model. They share a pool of memory, so they are replayed in the order of their capture."""

    def __init__(self, capture: Capture | None = None) -> None:
        """capture: in place of CUDA's."""
        self.capture = capture or _Pool()
        self._parts: dict[Any, _Part] = {}
        self._addresses: set[int] = set()
        """Of what parts return."""

    def run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """function(*inputs), replayed if the inputs are like those of its first call: tensors of the same shapes and
        types, and otherwise the same objects. Passes with gradients and without have graphs of their own.

        Args:
            function: a method of a module; of its inputs and of the module's parameters, and of nothing else. Returns
                a tensor, or a tuple of tensors and None. Where parameters lie elsewhere, it is captured again.
        """
        key = function, torch.is_grad_enabled()
        part = self._parts.get(key)
        if part is None or part.moved():
            part = self._parts[key] = _Part(function, inputs, self.capture, self._addresses)
            self._addresses.update(tensor.data_ptr() for tensor in part.outputs)
        return part(inputs) if part.takes(inputs) else function(*inputs)


class _Part:
    """A function captured for one kind of inputs."""

    def __init__(
        self, function: Callable[..., Any], inputs: Sequence[Any], capture: Capture, addresses: set[int]
    ) -> None:
        """addresses: of other parts' results; an input that lies there is read there, others are copied."""
        module: nn.Module = function.__self__  # type: ignore[attr-defined]
        self._module = list(module.parameters())
        self._lay = [parameter.data_ptr() for parameter in self._module]
        self.inputs = [_fixed(x, addresses) if isinstance(x, Tensor) else x for x in inputs]
        self._tensors = [x for x in self.inputs if isinstance(x, Tensor)]
        self._chained = [isinstance(x, Tensor) and x.data_ptr() in addresses for x in inputs]
        self._turn = 0
        with _aliases(module) as own:
            with _beside():
                for _ in range(WARMUP):
                    self._describe(function(*self.inputs), own)
                    if self.differentiable:
                        self._differentiate()
            self._forward, result = capture(lambda: function(*self.inputs))
            self._describe(result, own)
            if self.differentiable:
                self._backward, self.gradients = capture(self._differentiate)

    def _describe(self, result: Any, aliases: dict[int, Tensor]) -> None:
        """What the function returned, and what has gradients by it.

        Args:
            aliases: parameters by the ids of what was computed with in place of them.
        """
        self.single = isinstance(result, Tensor)
        found = (result,) if self.single else result
        self.places = [i for i, tensor in enumerate(found) if tensor is not None]
        self.width = len(found)
        self.outputs = [found[i] for i in self.places]
        self.differentiable = [tensor for tensor in self.outputs if tensor.requires_grad]
        self.output_gradients = [torch.empty_like(tensor) for tensor in self.differentiable]
        leaves = [leaf for leaf in _leaves(self.differentiable) if id(leaf) in aliases]
        self.parameters = [aliases[id(leaf)] for leaf in leaves]
        self._wanted = [*(x for x in self._tensors if x.requires_grad), *leaves]

    def _differentiate(self) -> tuple[Tensor | None, ...]:
        """Gradients of what has them, from `output_gradients`. The graph stays, so nothing else gets its memory."""
        return torch.autograd.grad(
            self.differentiable, self._wanted, self.output_gradients, retain_graph=True, allow_unused=True
        )

    def moved(self) -> bool:
        """Whether parameters lie elsewhere now."""
        return any(p.data_ptr() != at for p, at in zip(self._module, self._lay, strict=True))

    def takes(self, inputs: Sequence[Any]) -> bool:
        """Whether it was captured for inputs like these."""
        if len(inputs) != len(self.inputs):
            return False
        pairs = zip(inputs, self.inputs, self._chained, strict=True)
        return all(_alike(x, own, chained) if isinstance(own, Tensor) else x is own for x, own, chained in pairs)

    def __call__(self, inputs: Sequence[Any]) -> Any:
        """Replay it."""
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if self.differentiable:
            found: Sequence[Tensor] = _Replayed.apply(self, len(tensors), *tensors, *self.parameters)
        else:
            self.forward(tensors)
            found = [tensor.detach() for tensor in self.outputs]
        if self.single:
            return found[0]
        result: list[Tensor | None] = [None] * self.width
        for place, tensor in zip(self.places, found, strict=True):
            result[place] = tensor
        return tuple(result)

    @torch.no_grad()
    def forward(self, tensors: Sequence[Tensor]) -> int:
        """Returns what `backward` is told."""
        _fill(self._tensors, tensors)
        self._forward()
        self._turn += 1
        return self._turn

    def backward(self, turn: int, gradients: Sequence[Tensor]) -> Iterator[Tensor | None]:
        """Gradients of all tensors among the inputs, then of the parameters.

        Raises:
            RuntimeError: another forward has come since.
        """
        if turn != self._turn:
            raise RuntimeError(
                "a part replayed as a CUDA graph ran forward again before its backward, and what backward needs is gone"
            )
        have = [g for g, tensor in zip(gradients, self.outputs, strict=True) if tensor.requires_grad]
        _fill(self.output_gradients, have)
        self._backward()
        found = iter(self.gradients)
        for x in self._tensors:
            yield next(found) if x.requires_grad else None
        yield from _copies(list(found))


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: _Part, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """tensors: inputs, `count` of them, and parameters."""
        ctx.part, ctx.turn = part, part.forward(tensors[:count])
        outputs = tuple(tensor.detach() for tensor in part.outputs)
        ctx.mark_non_differentiable(*(o for o, t in zip(outputs, part.outputs, strict=True) if not t.requires_grad))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.part.backward(ctx.turn, gradients)


class _Pool:
    """Captures CUDA graphs whose memory is from one pool."""

    def __init__(self) -> None:
        self.handle: Any = None

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """As `Capture`."""
        self.handle = self.handle or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # other threads (NCCL's, a checkpoint's) may go on meanwhile
        with torch.cuda.graph(graph, pool=self.handle, capture_error_mode="thread_local"):
            result = function()
        return graph.replay, result


@contextmanager
def _aliases(module: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Other parameters in the same memory, in place of the module's; gives those by the ids of these.

    Whoever holds a parameter's node of the graph, as DeepSpeed does for its hooks, keeps it on the stream on which it
    was made, and a capture on another stream that comes to it is broken.
    """
    parts = module.modules()
    given = [(part, name, own) for part in parts for name, own in part._parameters.items() if own is not None]
    aliases = {own: nn.Parameter(own.detach(), own.requires_grad) for _, _, own in given}
    try:
        for part, name, own in given:
            part._parameters[name] = aliases[own]
        yield {id(alias): own for own, alias in aliases.items()}
    finally:
        for part, name, own in given:
            part._parameters[name] = own


@contextmanager
def _beside() -> Iterator[None]:
    """On a stream of its own, so that what is warmed up leaves nothing in the current one's caches."""
    if not torch.cuda.is_available():
        yield
        return
    stream, now = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(now)
    with torch.cuda.stream(stream):
        yield
    now.wait_stream(stream)


def _fixed(x: Tensor, addresses: set[int]) -> Tensor:
    """The tensor that a part reads in place of x."""
    own = x.detach() if x.data_ptr() in addresses else x.detach().clone()
    return own.requires_grad_(x.requires_grad and torch.is_grad_enabled())


def _alike(x: Any, own: Tensor, chained: bool) -> bool:
    same = isinstance(x, Tensor) and x.shape == own.shape and x.dtype == own.dtype and x.stride() == own.stride()
    same = same and (x.requires_grad and torch.is_grad_enabled()) == own.requires_grad
    return same and (not chained or x.data_ptr() == own.data_ptr())


def _fill(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy what does not lie there."""
    for target, source in zip(targets, sources, strict=True):
        if target.data_ptr() != source.data_ptr():
            target.copy_(source)


def _copies(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Of what the next replay overwrites, by one kernel a type; autograd, which would copy one by one, keeps these."""
    found: dict[int, Tensor] = {}
    types: dict[torch.dtype, dict[int, Tensor]] = {}
    for place, gradient in enumerate(gradients):
        if gradient is not None:
            types.setdefault(gradient.dtype, {})[place] = gradient
    for alike in types.values():
        together = torch.cat([gradient.reshape(-1) for gradient in alike.values()])
        parts = together.split([gradient.numel() for gradient in alike.values()])
        found |= {i: part.view_as(g) for part, (i, g) in zip(parts, alike.items(), strict=True)}
    return [found.get(place) for place in range(len(gradients))]


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Leaves that they were made of and that have gradients, in the order in which they are found."""
    nodes, seen, found = [tensor.grad_fn for tensor in tensors], set(), []
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        nodes += [following for following, _ in node.next_functions]
    return found
