"""A checkpoint's weights as sharded safetensors under a family's names; one tensor in memory at a time."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from occult_train.checkpoint.store import Checkpoint, write_durably
from occult_train.errors import CheckpointError
from occult_train.hub import routing
from occult_train.hub.source import INDEX, expected_tensors
from occult_train.hub.tensorfile import write_file
from occult_train.models.config import ModelConfig
from occult_train.models.families.family import Family

_NAMED = 4


def check_whole(checkpoint: Checkpoint, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's logical tensors, every one of which the checkpoint holds, and no other.

    Raises:
        CheckpointError: lists what is missing, extra, or of another shape.
    """
    expected = expected_tensors(model)
    found = {name: entry.shape for name, entry in checkpoint.entries.items() if "/" not in name}
    faults = []
    for what, names in (
        ("missing", [n for n in expected if n not in found]),
        ("extra", [n for n in found if n not in expected]),
        ("of another shape", [n for n in expected if n in found and found[n] != expected[n]]),
    ):
        if names:
            rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            faults.append(f"{len(names)} {what}: {', '.join(names[:_NAMED])}{rest}")
    if faults:
        text = f"checkpoint {checkpoint.folder} does not hold the model of its config.yaml"
        raise CheckpointError(f"{text}; tensors {'; '.join(faults)}")
    return expected


def write_weights(
    checkpoint: Checkpoint,
    model: ModelConfig,
    family: Family,
    output: Path,
    dtype: torch.dtype,
    limit: int,
    beside: dict[str, Tensor],
) -> dict[str, str]:
    """Write the weight files and their index. Returns the SHA-256 of each tensor's bytes by hub name.

    Args:
        limit: bytes of a file; a larger tensor has one to itself.
        beside: further tensors by hub name, in their own types, that go into a file of their own; see routing.py.

    Raises:
        CheckpointError: a tensor is missing or damaged.
        OSError: the disk does not take it.
    """
    shapes = check_whole(checkpoint, model)
    for stale in output.glob("model*.safetensors*"):
        stale.unlink()
    shards = list(_shards(shapes, dtype.itemsize, limit))
    digests: dict[str, str] = {}
    where: dict[str, str] = {}
    with Progress(disable=len(shards) < 2) as progress:
        task = progress.add_task("exporting", total=len(shapes))

        def tensors(names: list[str]) -> Iterator[Tensor]:
            for name in names:
                yield checkpoint.read(name)
                progress.advance(task)

        for number, names in enumerate(shards):
            file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            theirs = {family.to_hub(name): shapes[name] for name in names}
            digests |= write_file(output / file, theirs, dtype, tensors(names))
            where |= dict.fromkeys(theirs, file)
    where |= routing.write(beside, output)
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    total += sum(tensor.nbytes for tensor in beside.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    write_durably(output / INDEX, json.dumps(index, indent=1))
    return digests


def _shards(shapes: dict[str, tuple[int, ...]], itemsize: int, limit: int) -> Iterator[list[str]]:
    """Names, cut where the next tensor would make a file larger than the limit."""
    shard: list[str] = []
    size = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * itemsize
        if shard and size + nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += nbytes
    yield shard
