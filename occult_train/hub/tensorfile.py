"""safetensors files read piece by piece and written as a stream: memory holds one tensor at a time, never a file.

The library maps files into memory, whose pages count as the process's own; this seeks and reads.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from occult_train.errors import DataError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 1 << 28


@dataclass(frozen=True)
class Piece:
    """A tensor's place in a file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""

    @property
    def nbytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, Piece]:
    """The tensors of a file by name, checked against the file's size.

    Raises:
        DataError: missing, cut short, or no safetensors file of floating-point tensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 0 < length <= min(size - 8, _LONGEST_HEADER):
                raise DataError(f"{path} is cut short, or no safetensors file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        pieces = {name: _piece(path, name, entry, 8 + length) for name, entry in header.items()}
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{path} is damaged: its header cannot be understood ({error!r})") from None
    _check_places(path, pieces, 8 + length, size)
    return pieces


def _piece(path: Path, name: str, entry: dict[str, Any], base: int) -> Piece:
    kind, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
    if kind not in DTYPES:
        raise DataError(f"{path}: {name} is of type {kind}; only {', '.join(DTYPES)} are read")
    start, end = (int(n) for n in entry["data_offsets"])
    piece = Piece(path, DTYPES[kind], shape, base + start)
    if end - start != piece.nbytes or start < 0 or min(shape, default=0) < 0:
        raise DataError(f"{path} is damaged: {name} of shape {list(shape)} lies in {end - start} bytes")
    return piece


def _check_places(path: Path, pieces: dict[str, Piece], start: int, size: int) -> None:
    """Tensors lie one after the other and fill the file."""
    at = start
    for name, piece in sorted(pieces.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if piece.offset != at:
            raise DataError(f"{path} is damaged: {name} does not begin where the tensor before it ends")
        at += piece.nbytes
    if at != size:
        raise DataError(f"{path} is cut short or damaged: it has {size} bytes, and its tensors end at {at}")


def read_bytes(piece: Piece, first: int = 0, count: int | None = None) -> bytearray:
    """The data of elements first to first + count, in row-major order. Raises DataError where the file is short."""
    width = piece.dtype.itemsize
    data = bytearray((math.prod(piece.shape) - first if count is None else count) * width)
    try:
        with piece.path.open("rb") as file:
            file.seek(piece.offset + first * width)
            got = file.readinto(data)
    except OSError as error:
        raise DataError(f"{piece.path} cannot be read: {error.strerror}") from None
    if got != len(data):
        raise DataError(f"{piece.path} is cut short")
    return data


def to_tensor(data: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Bytes as a tensor of their own type, without a copy."""
    return torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.zeros(shape, dtype=dtype)


def write_file(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, tensors: Iterable[Tensor]
) -> dict[str, str]:
    """Write a file, durably; tensors come one at a time in the order of shapes. Returns each one's SHA-256.

    Raises:
        OSError: the disk does not take it.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset, digests = 0, {}
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            assert tuple(tensor.shape) == shape, (name, tensor.shape, shape)
            data = memoryview(tensor.to(dtype).contiguous().view(-1).view(torch.uint8).numpy())
            digests[name] = hashlib.sha256(data).hexdigest()
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return digests
