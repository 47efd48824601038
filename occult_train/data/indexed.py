"""Megatron's indexed format: token ids in `PREFIX.bin`, where sequences and documents begin in `PREFIX.idx`.

The index is, little-endian: magic, u64 version, u8 dtype code, u64 sequence count N, u64 length D + 1 of the document
table, int32 [N] sequence lengths in tokens, int64 [N] byte offsets into the .bin, int64 [D + 1] document table.
Document d holds the sequences `table[d]` to `table[d + 1] - 1`; the table starts with 0 and ends with N.
"""

import os
import struct
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from occult_train.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.number]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
CHUNK = 1 << 20
"""Sequences validated at a time, so that the check of a large index needs little memory."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that ids of a vocabulary are stored in: uint16 below 65500 ids, else int32 (Megatron's rule)."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def split_prefix(path: str | Path) -> Path:
    """The prefix of a .bin/.idx pair, typed with or without its ending."""
    text = os.fspath(path)
    return Path(text[:-4] if text.endswith((".bin", ".idx")) else text)


def pair(prefix: Path) -> tuple[Path, Path]:
    """`(PREFIX.bin, PREFIX.idx)`; the prefix may hold dots."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


class IndexedReader:
    """A memory-mapped corpus, checked when it is opened.

    `offsets` is int64 [documents + 1]: document d holds tokens `offsets[d]` to `offsets[d + 1] - 1` of the corpus.

    Args:
        prefix: of the pair.
        examples: each document is two sequences, a prompt and its response; `prompts`, int64 [documents], are the
            tokens of the first. Else `prompts` is None.

    Raises:
        DataError: a file is missing or damaged, is of another format, or the two do not fit together.
    """

    def __init__(self, prefix: str | Path, examples: bool = False) -> None:
        self.prefix = split_prefix(prefix)
        self.bin_path, self.idx_path = pair(self.prefix)
        for path in (self.bin_path, self.idx_path):
            if not path.is_file():
                raise DataError(f"{path} does not exist")
        index = _map(self.idx_path, np.dtype(np.uint8))
        self.dtype, sequences, table_length = self._header(index)
        lengths, pointers, table = self._tables(index, sequences, table_length)
        self.sequences = sequences
        self._check_sequences(lengths, pointers)
        self._check_table(table)
        self.tokens = self.bin_path.stat().st_size // self.dtype.itemsize
        begins = np.append(pointers, np.int64(self.tokens * self.dtype.itemsize))
        self.offsets: NDArray[np.int64] = begins[table] // self.dtype.itemsize
        self.prompts: NDArray[np.int64] | None = self._prompts(lengths, table) if examples else None
        self._data = _map(self.bin_path, self.dtype)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> NDArray:
        """Token ids of one document, in the stored type, unread until used."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return self._data[self.offsets[index] : self.offsets[index + 1]]

    def read(self, start: int, stop: int) -> NDArray:
        """Tokens `start` to `stop - 1` of the whole corpus, in the stored type, unread until used."""
        return self._data[start:stop]

    def _header(self, index: NDArray) -> tuple[np.dtype, int, int]:
        raw = index[: HEADER.size].tobytes()
        if raw[:6] == b"TNTIDX":
            raise DataError(f"{self.idx_path} is of Megatron's legacy format (TNTIDX); write it anew as MMIDIDX")
        if raw[: len(MAGIC)] != MAGIC:
            raise DataError(f"{self.idx_path} is not a Megatron index: it begins with {raw[: len(MAGIC)]!r}")
        if len(raw) < HEADER.size:
            raise DataError(f"{self.idx_path} is cut off: {len(raw)} bytes, the header alone has {HEADER.size}")
        _, version, code, sequences, table_length = HEADER.unpack(raw)
        if version != 1:
            raise DataError(f"{self.idx_path} is version {version} of the format; only version 1 is known")
        if code not in DTYPES:
            raise DataError(f"{self.idx_path} has the unknown dtype code {code}; known are 1 to 8")
        dtype = np.dtype(DTYPES[code]).newbyteorder("<")
        if dtype.kind == "f":
            raise DataError(f"{self.idx_path} holds {dtype.name}, which cannot be token ids")
        return dtype, sequences, table_length

    def _tables(self, index: NDArray, sequences: int, table_length: int) -> tuple[NDArray, NDArray, NDArray]:
        expected = HEADER.size + 12 * sequences + 8 * table_length
        if len(index) != expected:
            raise DataError(
                f"{self.idx_path} has {len(index)} bytes; {sequences} sequences and a document table of "
                f"{table_length} need {expected}"
            )
        at = HEADER.size
        lengths = index[at : at + 4 * sequences].view("<i4")
        at += 4 * sequences
        pointers = index[at : at + 8 * sequences].view("<i8")
        return lengths, pointers, index[at + 8 * sequences :].view("<i8")

    def _check_sequences(self, lengths: NDArray, pointers: NDArray) -> None:
        """Lengths are not negative, and each sequence begins where the one before it ends."""
        end = 0
        for first in range(0, len(lengths), CHUNK):
            sizes = lengths[first : first + CHUNK].astype(np.int64) * self.dtype.itemsize
            if (sizes < 0).any():
                bad = first + int(np.argmax(sizes < 0))
                raise DataError(f"{self.idx_path}: sequence {bad} has the negative length {lengths[bad]}")
            ends = end + np.cumsum(sizes)
            wrong = pointers[first : first + CHUNK] != ends - sizes
            if wrong.any():
                at = int(np.argmax(wrong))
                raise DataError(
                    f"{self.idx_path}: sequence {first + at} points at byte {pointers[first + at]}, "
                    f"the sequences before it end at {ends[at] - sizes[at]}"
                )
            end = int(ends[-1])
        size = self.bin_path.stat().st_size
        if size != end:
            raise DataError(f"{self.bin_path} has {size} bytes, its index {self.idx_path.name} describes {end}")

    def _check_table(self, table: NDArray) -> None:
        if not len(table) or table[0] != 0 or table[-1] != self.sequences or (table[1:] < table[:-1]).any():
            raise DataError(f"{self.idx_path}: the document table does not rise from 0 to {self.sequences} sequences")

    def _prompts(self, lengths: NDArray, table: NDArray) -> NDArray[np.int64]:
        if not np.array_equal(table, np.arange(0, len(lengths) + 1, 2)):
            raise DataError(f"{self.idx_path}: its documents are not of two sequences, a prompt and a response")
        return lengths[::2].astype(np.int64)


class IndexedWriter:
    """Writes a corpus document by document. Nothing but the lengths is held in memory.

    The files appear under their names on `finish`; until then, and after an error, there are only `*.partial` files,
    which leaving the `with` block removes.

    Args:
        prefix: `PREFIX.bin` and `PREFIX.idx` are written; their folder must exist.
        dtype: an integer type of the format, such as `token_dtype(vocab_size)`.
        examples: each document is two sequences, a prompt and its response; else one.
    """

    def __init__(self, prefix: Path, dtype: np.dtype, examples: bool = False) -> None:
        codes = {np.dtype(t): code for code, t in DTYPES.items()}
        if np.dtype(dtype).kind not in "iu" or np.dtype(dtype) not in codes:
            raise ValueError(f"token ids cannot be stored as {dtype}")
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self._per_document = 2 if examples else 1
        self._code = codes[self.dtype]
        self._largest = int(np.iinfo(self.dtype).max)
        self._lengths: list[NDArray[np.int32]] = []
        self._partial = [Path(f"{path}.partial") for path in pair(prefix)]
        self._file: BinaryIO | None = open(self._partial[0], "wb")  # noqa: SIM115 (held until finish)

    def add(self, tokens: NDArray | list[int]) -> None:
        """Append one document of token ids [length]."""
        tokens = np.asarray(tokens)
        self.add_many(tokens, np.array([len(tokens)]))

    def add_many(self, tokens: NDArray, lengths: NDArray) -> None:
        """Append documents whose sequences have `lengths`, laid one after another in `tokens` [sum of lengths].

        Raises:
            ValueError: the lengths do not add up, or an id does not fit the type.
        """
        assert self._file is not None, "the writer is closed"
        if int(lengths.sum()) != len(tokens):
            raise ValueError(f"lengths add up to {int(lengths.sum())}, there are {len(tokens)} tokens")
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() <= self._largest:
            raise ValueError(f"ids {tokens.min()} to {tokens.max()} do not lie between 0 and {self._largest}")
        self._file.write(np.ascontiguousarray(tokens, dtype=self.dtype.newbyteorder("<")).data)
        self._lengths.append(lengths.astype(np.int32))

    def finish(self) -> None:
        """Write the index and give both files their names."""
        assert self._file is not None, "the writer is closed"
        self._sync(self._file)
        self._file = None
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths])
        sizes = lengths.astype("<i8") * self.dtype.itemsize
        with open(self._partial[1], "wb") as file:
            table = np.arange(0, len(lengths) + 1, self._per_document, dtype="<i8")
            file.write(HEADER.pack(MAGIC, 1, self._code, len(lengths), len(table)))
            file.write(lengths.astype("<i4").data)
            file.write((np.cumsum(sizes, dtype="<i8") - sizes).data)
            file.write(table.data)
            self._sync(file)
        for partial, path in zip(self._partial, pair(self.prefix), strict=True):
            partial.replace(path)

    def close(self) -> None:
        """Drop what was not finished."""
        if self._file is not None:
            self._file.close()
            self._file = None
        for partial in self._partial:
            partial.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()

    @staticmethod
    def _sync(file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())
        file.close()


def _map(path: Path, dtype: np.dtype) -> NDArray:
    """The file as a read-only array; an empty file (which cannot be mapped) as an empty one."""
    size = path.stat().st_size
    if not size:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=(size // dtype.itemsize,)).view(np.ndarray)
