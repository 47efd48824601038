"""The weights of a Hugging Face folder as our logical tensors, each read alone, every one accounted for."""

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from occult_train.checkpoint.logical import logical_tensors
from occult_train.checkpoint.state import larger_than_files
from occult_train.errors import DataError
from occult_train.hub.folder import HubConfig, read_config
from occult_train.hub.tensorfile import Piece, read_bytes, read_header, to_tensor
from occult_train.inside import inside
from occult_train.models.config import ModelConfig
from occult_train.models.families.family import Stack
from occult_train.models.gpt import GPT
from occult_train.parallel.grid import Grid

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NOTE = "occult_export.json"
"""What `occult export` writes beside a model: where it comes from, and a checksum of each tensor."""
COMPUTED = re.compile(r".*rotary_emb\.inv_freq")
"""Tensors of old files that follow from config.json."""
_NAMED = 4
"""How many tensors of a kind an error names."""


@dataclass(frozen=True)
class Source:
    """Where a logical tensor lies: elements from `first` on of a file's tensor, in row-major order."""

    shape: tuple[int, ...]
    name: str
    """The hub's, of the whole tensor in the file."""
    piece: Piece
    first: int


class HubModel:
    """A Hugging Face model opened for reading. It is read like a checkpoint without optimizer."""

    has_optimizer = False
    step = 0

    def __init__(self, config: HubConfig, entries: dict[str, Source], digests: dict[str, str]) -> None:
        self.config, self.entries, self._digests = config, entries, digests
        self.folder = config.folder
        self.state: dict[str, Any] = {"consumed_samples": 0}
        self.bytes_read = 0

    @property
    def dtype(self) -> torch.dtype:
        """Type in which most of it is stored."""
        kinds = [source.piece.dtype for source in self.entries.values()]
        return max(set(kinds), key=kinds.count)

    def read(self, name: str) -> Tensor:
        """One logical tensor in fp32.

        Raises:
            DataError: its file is short, its checksum (where the folder has one) differs, or it holds no numbers.
        """
        source = self.entries[name]
        data = read_bytes(source.piece, source.first, math.prod(source.shape))
        self.bytes_read += len(data)
        known = self._digests.get(source.name)
        if known is not None and len(data) == source.piece.nbytes and hashlib.sha256(data).hexdigest() != known:
            raise DataError(
                f"{source.piece.path} is damaged: {source.name} is not what {NOTE} says was written; "
                "remove that file if the weights were changed on purpose"
            )
        tensor = to_tensor(data, source.piece.dtype, source.shape).to(torch.float32)
        if tensor.numel() and not all(math.isfinite(end) for end in tensor.aminmax()):  # isfinite would need a copy
            raise DataError(f"{source.piece.path}: {source.name} holds values that are no numbers")
        return tensor


def open_model(folder: Path) -> HubModel:
    """Open a folder, and account for every tensor in it and in the model.

    Raises:
        ConfigError: config.json is missing, damaged or not supported.
        DataError: files are missing or damaged, or tensors are missing, unknown, or of another shape.
    """
    config = read_config(folder)
    pieces = _pieces(folder)
    if large := larger_than_files(config.model, pieces):
        raise DataError(f"{folder}/config.json {large}")
    entries = _find(config, expected_tensors(config.model), pieces)
    _check_tied(config, pieces)
    return HubModel(config, entries, _digests(folder))


def expected_tensors(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's logical tensors, in the model's order."""
    with torch.device("meta"):
        logical = logical_tensors(GPT(model), Grid())
    return {piece: tensor.shape for tensor in logical for piece in tensor.pieces}


def _pieces(folder: Path) -> dict[str, Piece]:
    """Every tensor of the folder's weight files."""
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise DataError(f"{folder} holds both {SINGLE} and {INDEX}; one of them is stale, remove it")
    if single.exists():
        return read_header(inside(folder, SINGLE, "a model", DataError))
    if not index.exists():
        other = next((p.name for p in sorted(folder.glob("*.bin"))), None)
        hint = f"; {other} is not read, save it as safetensors" if other else ""
        raise DataError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}{hint}")
    return _indexed(folder, index)


def _indexed(folder: Path, index: Path) -> dict[str, Piece]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            files.setdefault(file, []).append(name)
    except OSError as error:
        raise DataError(f"{index} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{index} is damaged: {error!r}") from None
    found: dict[str, Piece] = {}
    for file, names in files.items():
        if not inside(folder, file, str(index), DataError).is_file():
            raise DataError(f"{folder} is incomplete: {file}, which {INDEX} names, is missing")
        there = read_header(folder / file)
        if set(there) != set(names):
            odd = sorted(set(there) ^ set(names))
            raise DataError(f"{folder}/{file} and {INDEX} disagree about {_some(odd)}")
        found |= there
    return found


def _find(config: HubConfig, expected: dict[str, tuple[int, ...]], pieces: dict[str, Piece]) -> dict[str, Source]:
    """Where each logical tensor lies.

    Raises:
        DataError: lists what is missing, extra, or of another shape.
    """
    entries, used, missing, wrong = {}, set(), [], []
    for name, shape in expected.items():
        stack = next((s for s in config.family.candidates(name) if s.name in pieces), None)
        if stack is None:
            missing.append(config.family.to_hub(name))
            continue
        used.add(stack.name)
        source, should = _place(name, shape, stack, pieces[stack.name], config.model.num_experts)
        if source.piece.shape != should:
            wrong.append(f"{stack.name} is {list(source.piece.shape)} and should be {list(should)}")
        entries[name] = source
    tied = {"lm_head.weight"} if config.model.tie_word_embeddings else set()
    extra = sorted(n for n in pieces if n not in used and n not in tied and not COMPUTED.fullmatch(n))
    faults = [
        f"{len(names)} {what}: {_some(names)}"
        for what, names in (("missing", missing), ("extra", extra), ("of another shape", list(dict.fromkeys(wrong))))
        if names
    ]
    if faults:
        raise DataError(f"{config.folder} does not hold the model of its config.json; tensors " + "; ".join(faults))
    return entries


def _place(
    name: str, shape: tuple[int, ...], stack: Stack, piece: Piece, experts: int
) -> tuple[Source, tuple[int, ...]]:
    """A logical tensor's place, and the shape that the file's tensor must have."""
    if stack.parts == 0:
        return Source(shape, stack.name, piece, 0), shape
    expert, size = int(name.rsplit(".", 1)[1]), shape[0] * shape[1]
    should = (experts, stack.parts * shape[0], shape[1])
    return Source(shape, stack.name, piece, (expert * stack.parts + stack.part) * size), should


def _some(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + rest


def _check_tied(config: HubConfig, pieces: dict[str, Piece], step: int = 1 << 24) -> None:
    """A tied model's file may repeat the embedding as its head, but not hold another."""
    name = "lm_head.weight"
    if not config.model.tie_word_embeddings or name not in pieces:
        return
    head, embedding = pieces[name], pieces[config.family.to_hub("embed_tokens.weight")]
    same = head.shape == embedding.shape and head.dtype == embedding.dtype
    size = head.nbytes // head.dtype.itemsize
    for first in range(0, size if same else 0, step):
        count = min(step, size - first)
        same = same and read_bytes(head, first, count) == read_bytes(embedding, first, count)
    if not same:
        raise DataError(
            f"{config.folder}: config.json ties the embedding to the head (tie_word_embeddings), but the two differ"
        )


def _digests(folder: Path) -> dict[str, str]:
    """Checksums by hub name, if `occult export` wrote the folder."""
    try:
        note = json.loads((folder / NOTE).read_text())
        return dict(note.get("sha256", {}))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(f"{folder}/{NOTE} is damaged: {error}") from None
