"""Each logical piece at the rank that writes it, from wherever ZeRO keeps its parts."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from occult_train.checkpoint.logical import Logical
from occult_train.parallel import zero
from occult_train.parallel.grid import Grid

BATCH_BYTES = 4 << 20
"""Exchanged at a time, or one parameter."""


@dataclass(frozen=True)
class Part:
    """What a rank keeps of a parameter, and writes of it."""

    start: int
    """Index of its first value in the flattened parameter."""
    end: int
    writes: tuple[bool, ...]

    def meets(self, other: "Part", piece: int) -> Iterator[tuple[int, int, int]]:
        """Runs that this rank keeps and `other` writes: which piece of so many values, and its first and last index in
        the flattened parameter."""
        for number, wanted in enumerate(other.writes):
            start, end = max(self.start, number * piece), min(self.end, (number + 1) * piece)
            if wanted and start < end:
                yield number, start, end


def gather_pieces(engine: Any, grid: Grid, logical: list[Logical]) -> Iterator[tuple[Logical, str, int, Tensor]]:
    """Every piece that this rank writes, in order: of which tensor, its kind, its number, and its fp32 values,
    flattened, which may be the live ones. Collective, so to be run to its end; after `zero.make_states`.

    What is sharded goes straight to its writer, `BATCH_BYTES` at a time.
    """
    parts = _parts(engine, grid, logical)
    batch: list[tuple[int, str]] = []
    size = 0
    for index, tensor in enumerate(logical):
        for kind in tensor.kinds:
            batch.append((index, kind))
            size += 4 * math.prod(tensor.shape) * len(tensor.pieces) if parts[index] else 0
            if size >= BATCH_BYTES:
                yield from _gather(engine, grid, logical, parts, batch)
                batch, size = [], 0
    yield from _gather(engine, grid, logical, parts, batch)


def _parts(engine: Any, grid: Grid, logical: list[Logical]) -> list[dict[int, Part]]:
    """Of each tensor, the parts by the ranks that hold it; none of what is not exchanged. Collective."""
    own: list[Part | None] = []
    for tensor in logical:
        sharded = tensor.parameter.requires_grad and not _is_whole(engine, grid, tensor)
        held = zero.held(engine, tensor.parameter)["param"] if sharded else None
        own.append(Part(held.start, held.start + held.values.numel(), tensor.writes) if held is not None else None)
    everyone: list[list[Part | None]] = [own] * grid.world_size
    if any(own):
        dist.all_gather_object(everyone, own)
    holders = range(grid.rank % grid.expert_size, grid.world_size, grid.expert_size)
    found = []
    for index, tensor in enumerate(logical):
        ranks = holders if tensor.expert else range(grid.world_size)
        found.append({rank: part for rank in ranks if (part := everyone[rank][index]) is not None})
    return found


def _is_whole(engine: Any, grid: Grid, tensor: Logical) -> bool:
    """Whether each rank that holds it keeps all of it."""
    holders = grid.world_size // (grid.expert_size if tensor.expert else 1)
    return holders == 1 or engine.zero_optimization_stage() == 0


def _gather(
    engine: Any, grid: Grid, logical: list[Logical], parts: list[dict[int, Part]], batch: list[tuple[int, str]]
) -> Iterator[tuple[Logical, str, int, Tensor]]:
    exchanged = _exchange(engine, grid, logical, parts, [(i, kind) for i, kind in batch if parts[i]])
    for index, kind in batch:
        tensor = logical[index]
        if not parts[index]:
            value = _whole(engine, tensor, kind).view(len(tensor.pieces), -1)
        for number, mine in enumerate(tensor.writes):
            if mine:
                yield tensor, kind, number, exchanged[index, kind, number] if parts[index] else value[number]


def _whole(engine: Any, tensor: Logical, kind: str) -> Tensor:
    if not tensor.parameter.requires_grad:
        return zero.get_full(engine, tensor.parameter, kind)
    return zero.held(engine, tensor.parameter)[kind].values


def _exchange(
    engine: Any, grid: Grid, logical: list[Logical], parts: list[dict[int, Part]], batch: list[tuple[int, str]]
) -> dict[tuple[int, str, int], Tensor]:
    """This rank's pieces of a batch of sharded tensors, by tensor, kind and number. Collective if there are any."""
    if not batch:
        return {}
    sends: list[list[Tensor]] = [[] for _ in range(grid.world_size)]
    comes: list[list[tuple[tuple[int, str, int], int, int]]] = [[] for _ in range(grid.world_size)]
    pieces = {}
    for index, kind in batch:
        size, own = math.prod(logical[index].shape), parts[index][grid.rank]
        values = zero.held(engine, logical[index].parameter)[kind].values
        for rank, other in parts[index].items():
            sends[rank] += [values[start - own.start : end - own.start] for _, start, end in own.meets(other, size)]
            for number, start, end in other.meets(own, size):
                comes[rank].append(((index, kind, number), start - number * size, end - number * size))
        for number, mine in enumerate(own.writes):
            if mine:
                pieces[index, kind, number] = torch.empty(size, dtype=torch.float32, device=engine.device)
    sent = torch.cat([torch.empty(0, device=engine.device), *(v.to(engine.device) for to in sends for v in to)])
    counts = [sum(end - start for _, start, end in of) for of in comes]
    received = sent.new_empty(sum(counts))
    dist.all_to_all_single(received, sent, counts, [sum(v.numel() for v in to) for to in sends])
    at = 0
    for piece, start, end in (run for of in comes for run in of):
        pieces[piece][start:end] = received[at : at + end - start]
        at += end - start
    return pieces
