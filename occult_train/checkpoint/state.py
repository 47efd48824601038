"""Saving a live engine to logical tensors, and setting an engine from them. Everything here is collective."""

import base64
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from occult_train.checkpoint.blocks import BLOCK_BYTES, Blocks
from occult_train.checkpoint.logical import KINDS, Logical, key, logical_tensors
from occult_train.checkpoint.saving import Contents, Saving, begin
from occult_train.errors import CheckpointError
from occult_train.models.config import ModelConfig
from occult_train.moe.placement import to_table
from occult_train.parallel import zero
from occult_train.parallel.grid import Grid


class Shaped(Protocol):
    """A tensor's place in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""


class Weights(Protocol):
    """What can be loaded: a checkpoint, or a Hugging Face model, which has no optimizer."""

    folder: Path
    state: dict[str, Any]

    @property
    def entries(self) -> Mapping[str, Shaped]:
        """Logical tensors by name."""

    @property
    def has_optimizer(self) -> bool:
        """Whether Adam's moments are there."""

    def read(self, name: str) -> Tensor:
        """One logical tensor in fp32."""


def save(
    engine: Any,
    grid: Grid,
    root: Path,
    step: int,
    state: dict[str, Any],
    config_yaml: str,
    keep: int,
    files: Mapping[str, bytes] = MappingProxyType({}),
) -> Path:
    """Write a checkpoint of the engine under `root`, and wait until it is complete; arguments as of `begin_save`.

    Returns:
        the folder of the complete checkpoint.

    Raises:
        CheckpointError: on every rank if any rank could not write. Earlier checkpoints are untouched.
    """
    return begin_save(engine, grid, root, step, state, config_yaml, keep, files).wait()


def begin_save(
    engine: Any,
    grid: Grid,
    root: Path,
    step: int,
    state: dict[str, Any],
    config_yaml: str,
    keep: int,
    files: Mapping[str, bytes] = MappingProxyType({}),
    blocks: Blocks | None = None,
    yields: bool = False,
) -> Saving:
    """Copy a checkpoint of the engine and begin to write it under `root`, in a thread. Collective; one at a time.

    Args:
        step: optimizer steps taken.
        state: JSON values of the run: whatever a resumed run needs beside tensors.
        keep: complete checkpoints to keep, 0 for all.
        files: content of further files by name. Every rank writes its own; no two have one of the same name.
        blocks: host memory to copy into; None takes two of them.
        yields: whether writing gives way to whatever else runs on the host.

    Returns:
        what tells how it went: `done` and `wait`.

    Raises:
        CheckpointError: on every rank if the folder cannot be made. Earlier checkpoints are untouched.
    """
    rank_state = {"cpu": _encode(torch.get_rng_state())}
    if torch.cuda.is_available():
        rank_state["cuda"] = _encode(torch.cuda.get_rng_state())
    ranks: list[Any] = [None] * grid.world_size
    dist.all_gather_object(ranks, rank_state)
    common = {
        "step": step,
        "adam_step": zero.adam_step(engine),
        "loss_scale": zero.loss_scale_state(engine),
        "expert_bias": _biases(engine),
        "rng": ranks,
        "placement": to_table({i: layer.placement for i, layer in engine.module.moe_layers().items()}),
    }
    contents = Contents(state | common, config_yaml, files, keep)
    return begin(engine, grid, root, step, contents, blocks or Blocks(2 * BLOCK_BYTES), yields)


def _biases(engine: Any) -> dict[str, list[float]]:
    return {str(i): layer.router.expert_bias.tolist() for i, layer in engine.module.moe_layers().items()}


def load(engine: Any, grid: Grid, checkpoint: Weights) -> None:
    """Set master weights, moments, step count, loss scale, balancing bias and RNG from a checkpoint.

    Each rank reads the dense tensors and its own experts. The random generators are restored where the number of ranks
    is the one that saved; nothing in training draws from them otherwise.

    Raises:
        CheckpointError: another model's, or damaged. Nothing is set if names or shapes do not fit.
    """
    logical = logical_tensors(engine.module, grid)
    check_fits(checkpoint, logical, KINDS)
    zero.make_states(engine)
    for tensor in logical:
        for kind in tensor.kinds:
            if not all(key(kind, piece) in checkpoint.entries for piece in tensor.pieces):
                continue  # an imported model's, or frozen until now
            parts = [checkpoint.read(key(kind, piece)) for piece in tensor.pieces]
            value = torch.stack(parts) if tensor.expert else parts[0]
            zero.set_full(engine, tensor.parameter, kind, value)
            if kind == "param":
                zero.push_weights(engine, tensor.parameter, value)
    state = checkpoint.state
    if checkpoint.has_optimizer:
        zero.set_adam_step(engine, state["adam_step"])
    zero.set_loss_scale_state(engine, state.get("loss_scale"))
    for i, layer in engine.module.moe_layers().items():
        bias = state.get("expert_bias", {}).get(str(i))
        if bias is not None:
            layer.router.expert_bias.copy_(torch.tensor(bias))
    _load_rng(grid, state.get("rng") or [])


SLACK = 10**8
"""Parameters that a model may have beyond twice what its files hold, before they are compared one by one."""


def larger_than_files(model: ModelConfig, entries: Mapping[str, Shaped]) -> str:
    """In words, that a configuration describes a far larger model than its files hold, for which no memory shall be
    taken; empty where it does not. Near misses are `check_fits`'s to name.

    Args:
        entries: tensors of the files by name, moments among them.
    """
    held = sum(math.prod(entry.shape) for name, entry in entries.items() if "/" not in name)
    if entries and model.num_hidden_layers > len(entries):
        return f"describes {model.num_hidden_layers} layers, the files hold {len(entries)} tensors"
    if model.num_params() > 2 * held + SLACK:
        return f"describes {model.num_params():,} parameters, the files hold {held:,}"
    return ""


def check_fits(checkpoint: Weights, logical: list[Logical], kinds: tuple[str, ...]) -> None:
    """Raise CheckpointError unless the model's weights on this rank are there with their shapes, and so are moments
    where there are any."""
    for tensor in logical:
        for piece in tensor.pieces:
            for kind in kinds:
                name = key(kind, piece)
                entry = checkpoint.entries.get(name)
                if entry is None and kind != "param":
                    continue  # frozen, or imported
                if entry is None:
                    raise CheckpointError(f"checkpoint {checkpoint.folder} is of another model: it has no {name}")
                if entry.shape != tensor.shape:
                    raise CheckpointError(
                        f"checkpoint {checkpoint.folder} is of another model: {name} has shape {list(entry.shape)} "
                        f"there and {list(tensor.shape)} here"
                    )
    dense = {piece for tensor in logical if not tensor.expert for piece in tensor.pieces}
    stacks = {piece.rsplit(".", 1)[0] for tensor in logical if tensor.expert for piece in tensor.pieces}
    for name in checkpoint.entries:
        piece = name.split("/", 1)[-1]
        if piece not in dense and piece.rsplit(".", 1)[0] not in stacks:
            raise CheckpointError(f"checkpoint {checkpoint.folder} is of another model: this one has no {name}")


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _load_rng(grid: Grid, ranks: list[dict[str, str]]) -> None:
    if len(ranks) != grid.world_size:
        return
    own = ranks[grid.rank]
    torch.set_rng_state(_decode(own["cpu"]))
    if "cuda" in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(own["cuda"]))
