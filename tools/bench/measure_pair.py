"""`occult bench pair`: two blocks on hidden states, timed and traced.

A system is checked first, against the same blocks in plain torch in the same type. For that others' routers, which
round logits to bf16, do not; they are timed as they are. A token whose experts still differ, since what is rounded in
the block before lets two logits change places, is left out of the comparison; such tokens are few, or it fails.
"""

import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from occult_train.errors import UserError
from occult_train.parallel.grid import Grid
from occult_train.tools.bench.breakdown import Kernel
from occult_train.tools.bench.pair_systems import Pair, Preset, build_pair, make_model, pair_flops, plain_runtime
from occult_train.tools.bench.problem import relative
from occult_train.tools.bench.shapes import PairTask
from occult_train.tools.bench.timeline import is_communication, mean, record, split
from occult_train.tools.bench.timing import Clock

LIMITS = {torch.bfloat16: 0.02, torch.float32: 1e-5}
"""Largest ‖got - right‖ / ‖right‖ of the output, the input's gradient and the last experts' gate projections'."""
MOST_APART = 0.02
"""Share of tokens whose experts may differ."""
WARMUP = 4
MOST_STEPS = 40
"""A schedule is chosen in fewer."""


def measure(task: PairTask) -> dict[str, Any]:
    """A row of results, the same on every rank but for its trace; with `error` and no numbers where the pair is not
    right. Collective."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    grid, preset = Grid.create(task.ranks), Preset.read(task.preset)
    model = preset.of(task.system)
    batch, length = task.sequences or preset.sequences, task.length or preset.sequence
    row = _description(task) | {"sequences": batch, "sequence": length, "tokens": batch * length}
    row |= {"hidden": model.hidden_size, "intermediate": model.intermediate_size, "experts": model.num_experts}
    row |= {"top_k": model.num_experts_per_tok, "gflops": pair_flops(model, length) * batch * length / 1e9}
    try:
        pair = build_pair(task.system, model, grid, batch * length, device)
    except UserError as error:
        return row | {"error": str(error)}
    dtype = pair.parameters[0].dtype
    generator = torch.Generator(device).manual_seed(grid.rank)
    size = (batch, length, model.hidden_size)
    h, dy = (torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(2))
    run = _Runs(pair, h.requires_grad_(), dy)
    note = [pair.note, *run.settle()]
    errors = run.errors(Pair(make_model(model, plain_runtime(grid), device, dtype)))
    row |= {f"error_{name}": error for name, error in errors.items()} | {"note": "; ".join(filter(None, note))}
    limits = dict.fromkeys(errors, LIMITS[dtype]) | {"routing": MOST_APART}
    if wrong := [name for name, error in errors.items() if not error <= limits[name]]:
        told = ", ".join(f"{name} is off by {errors[name]:.2g} (limit {limits[name]:g})" for name in wrong)
        return row | {"error": f"not right: {told}"}
    clock = Clock(device)
    for name, step in (("train", run.train), ("inference", run.infer)):
        times = clock.measure(lambda _, step=step: step(), task.seconds)  # type: ignore[misc]
        row |= {f"{name}_ms": times.median, f"{name}_p10": times.p10, f"{name}_p90": times.p90}
    return row | (_trace(run) if clock.gpu else {})


class _Runs:
    """A pair on one batch."""

    def __init__(self, pair: Pair, h: Tensor, dy: Tensor) -> None:
        self.pair, self.h, self.dy = pair, h, dy
        self._y: list[Tensor] = []

    def drop_gradients(self) -> None:
        """As before a step."""
        for tensor in (self.h, *self.pair.parameters):
            tensor.grad = None

    def forward(self) -> None:
        """Of training."""
        self.drop_gradients()
        self._y.append(self.pair(self.h))

    def backward(self) -> None:
        """Behind `forward`."""
        self._y.pop().backward(self.dy)

    def train(self) -> None:
        """Both."""
        self.forward()
        self.backward()

    @torch.no_grad()
    def infer(self) -> None:
        """Forward alone."""
        self.pair(self.h)

    def settle(self) -> list[str]:
        """Train until nothing more is chosen; what was, in words. Collective."""
        schedule, lines = self.pair.model.schedule, []
        for step in range(MOST_STEPS):
            if step >= WARMUP and not schedule.timing:
                break
            self.train()
            lines.append(schedule.settle())
        self.infer()
        return [line for line in lines if line]

    def errors(self, right: Pair) -> dict[str, float]:
        """On the worst rank; `routing` is the share of tokens whose experts differ. Collective."""
        with torch.no_grad():
            alike = torch.ones(self.h.shape[:2], dtype=torch.bool, device=self.h.device)
            for got, expected in zip(self._choices(self.pair), self._choices(right), strict=True):
                alike &= (got == expected).all(dim=-1).view_as(alike)
        pairs = zip(self._results(self.pair, alike), self._results(right, alike), strict=True)
        apart = 1 - alike.double().mean().item()
        worst = torch.tensor([*(relative(a, b) for a, b in pairs), apart], dtype=torch.float64, device=self.h.device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        return dict(zip(("y", "dx", "dw", "routing"), worst.tolist(), strict=True))

    def _choices(self, pair: Pair) -> list[Tensor]:
        """Of each layer with experts, [T, K], in order of number."""
        with pair.unrounded_logits(), pair.choices() as found:
            pair(self.h)
        return [experts_TK.sort(dim=-1).values for experts_TK in found]

    def _results(self, pair: Pair, counted: Tensor) -> list[Tensor]:
        """Output of the tokens that are counted, and gradients of their sum."""
        self.drop_gradients()
        with pair.unrounded_logits():
            y = pair(self.h)
            y.backward(self.dy * counted[..., None])
        assert self.h.grad is not None
        found = [y.detach()[counted], self.h.grad, pair.expert_gradient()]
        for parameter in pair.parameters:
            parameter.grad = None
        self.h.grad = None
        return found


def _trace(run: _Runs) -> dict[str, Any]:
    """Of each phase what `split` says, mean over ranks, and a repetition's kernels on this rank."""
    found = record({"forward": run.forward, "backward": run.backward})
    found |= record({"inference": run.infer})
    parts = partial(split, one_sided=run.pair.one_sided)
    row: dict[str, Any] = {}
    for phase, repetitions in found.items():
        values = asdict(mean([parts(kernels) for kernels in repetitions]))
        agreed = torch.tensor(list(values.values()), dtype=torch.float64, device=run.h.device)
        dist.all_reduce(agreed)
        shares = (agreed / dist.get_world_size()).tolist()
        row |= {f"{phase}_{name}_ms": value for name, value in zip(values, shares, strict=True)}
    row["timeline"] = {phase: _middle(repetitions, run.pair.one_sided) for phase, repetitions in found.items()}
    return row


def _middle(repetitions: list[list[Kernel]], one_sided: bool) -> list[tuple[str, float, float, str]]:
    """Of the repetition of median length: communication or computing, start, end in microseconds, and name."""
    length: Callable[[list[Kernel]], float] = lambda ks: max(k.end for k in ks) - min(k.start for k in ks)  # noqa: E731
    kernels = sorted(filter(None, repetitions), key=length)[len(repetitions) // 2]
    first = min(kernel.start for kernel in kernels)
    kinds = {True: "communication", False: "computing"}
    return [
        (kinds[is_communication(k, one_sided)], round(k.start - first, 1), round(k.end - first, 1), k.name[:60])
        for k in sorted(kernels, key=lambda kernel: kernel.start)
    ]


def _description(task: PairTask) -> dict[str, Any]:
    return {
        **{"system": task.system, "preset": task.preset, "ranks": task.ranks},
        "p2p": "off" if os.environ.get("NCCL_P2P_DISABLE") == "1" else "on",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "deepspeed": importlib.metadata.version("deepspeed"),
    }
