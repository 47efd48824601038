"""Problems for the fused layer, what they come to in float64, and symmetric memory for machines without GPUs."""

import mmap
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from occult_train.moe import transport
from occult_train.moe.fused import FusedExperts
from occult_train.moe.transport import SymmetricBox

HIDDEN, WIDTH = 40, 24
NAMES = ("y", "dx", "dweights", "dw1", "dw2", "dw3")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""‖got − ref‖/‖ref‖; measured: fp32 3e-7, bf16 5e-3, fp16 7e-4."""


@dataclass(frozen=True)
class Problem:
    """Tokens of each rank, and where they go."""

    tokens: tuple[int, ...]
    experts: int
    top_k: int
    aim: str = "anywhere"
    """anywhere, or all at the experts of one device."""

    def slots(self) -> list[Tensor]:
        """[T, K] of each rank."""
        generator = torch.Generator().manual_seed(7)
        local = self.experts // len(self.tokens)
        found = []
        for tokens in self.tokens:
            scores = torch.rand(tokens, self.experts, generator=generator)
            if self.aim == "last device":
                scores[:, :-local] -= 2
            found.append(scores.topk(self.top_k, dim=1).indices)
        return found

    def rows(self) -> list[list[int]]:
        """Rows from each rank to each device by METHODS: a token crosses once a device, never to its own."""
        local = self.experts // len(self.tokens)
        table = []
        for rank, slots in enumerate(self.slots()):
            sets = [{int(s) // local for s in token} - {rank} for token in slots]
            table.append([sum(d in s for s in sets) for d in range(len(self.tokens))])
        return table


PROBLEMS = {
    "one rank": Problem((5,), 6, 3),
    "a rank without tokens": Problem((0, 3), 8, 3),
    "no tokens at all": Problem((0, 0), 8, 3),
    "primes": Problem((3, 5), 8, 3),
    "several chunks": Problem((2, 65), 8, 2),
    "one device": Problem((5, 2), 8, 4, "last device"),
    "all experts": Problem((3, 2), 6, 6),
    "four ranks": Problem((3, 0, 5, 2), 8, 3),
    "one expert a rank": Problem((3, 4, 1, 2), 4, 2),
    "eight ranks": Problem((3, 0, 5, 2, 1, 4, 2, 3), 16, 4),
}
"""The interpreter takes a millisecond for each row of each step, so only one has more tokens than a chunk's least."""
LARGE = {
    "three chunks": Problem((67, 131), 8, 3),
    "many tiles": Problem((600, 333), 12, 4),
    "many at one device": Problem((65, 190), 8, 4, "last device"),
}
"""For GPUs."""


@cache
@torch.enable_grad()
def exact(problem: Problem) -> dict[str, list[Tensor]]:
    """NAMES by rank, in float64: each token times the weights of each of its experts."""
    generator = torch.Generator().manual_seed(3)
    e, local = problem.experts, problem.experts // len(problem.tokens)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).bfloat16().double().requires_grad_()

    w1, w3 = (draw(e, WIDTH, HIDDEN) for _ in range(2))
    w2 = draw(e, HIDDEN, WIDTH)
    inputs: dict[str, list[Tensor]] = {name: [] for name in ("x", "weights", "dy", "y")}
    for tokens, slots in zip(problem.tokens, problem.slots(), strict=True):
        x, weights, dy = draw(tokens, HIDDEN), draw(tokens, problem.top_k), draw(tokens, HIDDEN)
        y = torch.zeros(tokens, HIDDEN, dtype=torch.float64) + 0 * w1.sum()
        for k in range(problem.top_k):
            s = slots[:, k]
            h = F.silu(torch.einsum("tfh,th->tf", w1[s], x)) * torch.einsum("tfh,th->tf", w3[s], x)
            y = y + weights[:, k, None] * torch.einsum("thf,tf->th", w2[s], h)
        for name, value in zip(inputs, (x, weights, dy, y), strict=True):
            inputs[name].append(value)
    sum((y * dy.detach()).sum() for y, dy in zip(inputs["y"], inputs["dy"], strict=True)).backward()  # type: ignore
    found = {name: [v.detach() for v in values] for name, values in inputs.items()}
    found["dx"] = [_grad(x) for x in inputs["x"]]
    found["dweights"] = [_grad(w) for w in inputs["weights"]]
    for name, w in (("w1", w1), ("w2", w2), ("w3", w3)):
        found[name], found[f"d{name}"] = list(w.detach().split(local)), list(_grad(w).split(local))
    return found


def _grad(value: Tensor) -> Tensor:
    return torch.zeros_like(value) if value.grad is None else value.grad


INPUTS = ("x", "weights", "w1", "w2", "w3")
"""What has a gradient, in the order of NAMES."""


class Run:
    """A rank's share of a problem on the layer, as far as its output; `backward` does the rest."""

    def __init__(
        self, layer: FusedExperts, problem: Problem, rank: int, dtype: torch.dtype = torch.float32,
        device: str = "cpu", without: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        data = {key: value[rank].to(device) for key, value in exact(problem).items()}
        self.leaves = {name: data[name].to(torch.float32 if name == "weights" else dtype) for name in INPUTS}
        for name, leaf in self.leaves.items():
            leaf.requires_grad_(name not in without)
        self.dy = data["dy"].to(dtype)
        x, *weights = self.leaves.values()
        self.y = layer(x, problem.slots()[rank].to(device), *weights)

    def backward(self) -> list[Tensor | None]:
        """NAMES, on the CPU; None for what needs no gradient."""
        self.y.backward(self.dy)
        found = [self.y.detach(), *(leaf.grad for leaf in self.leaves.values())]
        return [None if value is None else value.cpu() for value in found]


def check_values(
    problem: Problem, rank: int, got: list[Tensor | None], dtype: torch.dtype = torch.float32, without: str = ""
) -> None:
    """Each of NAMES within the type's error of what is exact; all gradients are there but that of `without`."""
    for label, value in zip(NAMES, got, strict=True):
        expected = exact(problem)[label][rank]
        if label == f"d{without}":
            assert value is None
            continue
        assert value is not None, label
        assert value.shape == expected.shape
        error = float((value.double() - expected).norm()) / max(float(expected.norm()), 1e-30)
        assert error <= TOLERANCE[dtype], f"{label} is {error:.1e} off on rank {rank}"


class MappedBox(SymmetricBox):
    """Symmetric memory of processes of one machine without GPUs: files that all of them map."""

    grain = 256
    folder = Path()

    @classmethod
    def install(cls, folder: Path) -> None:
        """Use it in this process; all of a group give the same folder."""
        cls.folder = folder
        transport.SymmetricBox = cls  # type: ignore[misc]

    def _grow(self, nbytes: int) -> None:
        rank, size = dist.get_rank(self.grid.expert_group), self.grid.expert_size
        name = next(n for (_, n), box in transport._BOXES.items() if box is self)
        with (self.folder / f"{name}-{nbytes}-{rank}").open("wb") as file:
            file.write(torch.full((nbytes // 4,), float("nan")).numpy().tobytes())
        dist.barrier(self.grid.expert_group)
        self._maps = []
        for peer in range(size):
            with (self.folder / f"{name}-{nbytes}-{peer}").open("r+b") as file:
                self._maps.append(torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=torch.uint8))
        self._memory = self._maps[rank]
        self.address_D = torch.tensor([m.data_ptr() for m in self._maps])
        self.nbytes = nbytes

    def barrier(self) -> None:
        """All ranks have come this far."""
        assert self.nbytes, "without memory there is no handle that could do it"
        dist.barrier(self.grid.expert_group)
