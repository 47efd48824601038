"""safetensors files written as a stream, one tensor in memory at a time, and read with their checksums verified."""

import contextlib
import hashlib
import json
import os
import struct
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from occult_train.errors import CheckpointError

MOST_BUFFERS = 1024
"""What a call of `writev` takes (IOV_MAX)."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: all are fp32."""

    file: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    sha256: str

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data."""
        size = 4
        for dim in self.shape:
            size *= dim
        return size

    def to_json(self) -> dict[str, object]:
        """Plain values for checkpoint.json."""
        return asdict(self)


def data_bytes(tensor: Tensor) -> memoryview:
    """The tensor's fp32 data as little-endian bytes."""
    return memoryview(tensor.detach().to("cpu", torch.float32).contiguous().view(-1).numpy()).cast("B")


class ShardWriter:
    """Writes one safetensors file whose tensors' names and shapes are known beforehand, in their order."""

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        self.path, self.shapes = path, shapes
        self.entries: dict[str, Entry] = {}
        header, offset = {}, 0
        for name, shape in shapes.items():
            end = offset + Entry("", shape, 0, "").nbytes
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.nbytes = 8 + len(text) + offset
        """Of the file, once it is whole."""
        self._header = struct.pack("<Q", len(text)) + text
        self._order = iter(shapes)
        self._digest: hashlib._Hash | None = None
        """Of the tensor that is being written."""
        self._begin = self._end = 0
        """Where it begins, and where what was appended ends."""
        self._pending: list[memoryview] = []
        self._file: FileIO | None = None

    def _open(self) -> FileIO:
        if self._file is None:
            self._file = self.path.open("wb", buffering=0)
            self._pending, self._end = [memoryview(self._header)], len(self._header)
        return self._file

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor. Raises OSError if the disk does not take it."""
        assert tuple(tensor.shape) == self.shapes[name], (name, tensor.shape, self.shapes[name])
        self.append(name, data_bytes(tensor))
        self.flush()

    def append(self, name: str, data: memoryview) -> None:
        """Append the data of the next tensor, or a part of it, which stays as it is until `flush`."""
        self._open()
        if self._digest is None:
            assert name == next(self._order), name
            self._digest, self._begin = hashlib.sha256(), self._end
        self._digest.update(data)
        self._pending.append(data)
        self._end += len(data)
        shape = self.shapes[name]
        if self._end == self._begin + Entry("", shape, 0, "").nbytes:
            self.entries[name] = Entry(self.path.name, shape, self._begin, self._digest.hexdigest())
            self._digest = None

    def flush(self) -> None:
        """Write what was appended, in as few calls as can be: each takes the interpreter's lock from whoever computes
        beside it. Raises OSError if the disk does not take it."""
        file, pending = self._open(), [data for data in self._pending if len(data)]
        self._pending = []
        while pending:
            written = os.writev(file.fileno(), pending[:MOST_BUFFERS])
            while pending and written >= len(pending[0]):
                written -= len(pending.pop(0))
            if written:
                pending[0] = pending[0][written:]

    def close(self) -> None:
        """Make the file durable; every tensor must have been written."""
        assert len(self.entries) == len(self.shapes), "tensors are missing"
        self.flush()
        with self._open() as file:
            os.fsync(file.fileno())

    def abandon(self) -> None:
        """Close an unfinished file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()


def read_entry(folder: Path, name: str, entry: Entry) -> Tensor:
    """Read one tensor and verify its checksum.

    Raises:
        CheckpointError: the file is missing, short, or its bytes are not those that were written.
    """
    path = folder / entry.file
    try:
        with path.open("rb") as file:
            file.seek(entry.offset)
            data = bytearray(entry.nbytes)
            got = file.readinto(data)
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder}: {entry.file} cannot be read: {error.strerror}") from None
    if got != entry.nbytes:
        raise CheckpointError(f"checkpoint {folder}: {entry.file} is cut short inside {name}")
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise CheckpointError(f"checkpoint {folder}: {name} in {entry.file} is damaged (its checksum does not match)")
    if not data:
        return torch.zeros(entry.shape)
    return torch.frombuffer(data, dtype=torch.float32).view(entry.shape)
