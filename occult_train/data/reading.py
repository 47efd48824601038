"""Source files cut in spans of bounded size, and read as documents."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from occult_train.data.shuffle import permutation
from occult_train.data.sources import SourceFile
from occult_train.errors import DataError

SAMPLE_BLOCK = 1 << 16
"""Bytes that a sample of the text takes from one place."""


@dataclass(frozen=True)
class Span:
    """The lines of a file that begin at byte `start` or later, and before byte `stop`."""

    file: SourceFile
    start: int
    stop: int


@dataclass
class ReadCounts:
    """What was met while reading."""

    empty: int = 0
    """Documents without text, or shorter than asked for, which are left out."""
    bad_utf8: int = 0
    """Documents in which bytes that are not UTF-8 became U+FFFD."""

    def add(self, other: "ReadCounts") -> None:
        """Add another's counts to this one's."""
        self.empty += other.empty
        self.bad_utf8 += other.bad_utf8


def spans(files: Iterable[SourceFile], size: int) -> Iterator[Span]:
    """Every file in spans of at most `size` bytes. A longer plain text thereby becomes several documents."""
    for file in files:
        for start in range(0, max(file.size, 1), size):
            yield Span(file, start, min(start + size, file.size))


def documents(span: Span, text_key: str, counts: ReadCounts, min_bytes: int = 1) -> Iterator[str]:
    """The documents of a span, memory for one at a time. What is left out or mended is added to `counts`.

    Args:
        text_key: where the text is in a JSON line.
        min_bytes: documents with fewer bytes of text are left out; blank ones always are.

    Raises:
        DataError: a JSON line is damaged, or has no text; names file and line.
    """
    with open(span.file.path, "rb") as file:
        lines = _lines(file, span)
        texts = _json_texts(lines, span, text_key, counts) if span.file.is_json_lines else _plain(lines, span, counts)
        for text in texts:
            if not text or text.isspace() or (min_bytes > 1 and len(text.encode()) < min_bytes):
                counts.empty += 1
            else:
                yield text


def sample_texts(files: list[SourceFile], size: int, text_key: str, seed: int) -> Iterator[str]:
    """About `size` bytes of text, drawn in blocks from all files alike: all of it if there is no more.

    The choice depends on the files' order and sizes, `size` and `seed`.
    """
    blocks = np.cumsum([-(-file.size // SAMPLE_BLOCK) for file in files])
    total = sum(file.size for file in files)
    chosen = np.arange(blocks[-1] if files else 0)
    if total > size:
        chosen = np.sort(permutation(len(chosen), seed)[: -(-len(chosen) * size // total)])
    left = size
    for number in chosen.tolist():
        place = int(np.searchsorted(blocks, number, side="right"))
        file = files[place]
        start = (number - (int(blocks[place - 1]) if place else 0)) * SAMPLE_BLOCK
        for text in documents(Span(file, start, min(start + SAMPLE_BLOCK, file.size)), text_key, ReadCounts()):
            yield text[:left]
            left -= len(text)
            if left <= 0:
                return


def _lines(file: BinaryIO, span: Span) -> Iterator[tuple[int, bytes]]:
    """`(byte offset, line)` of the lines that begin in a span."""
    at = span.start
    if at:
        file.seek(at - 1)
        at += len(file.readline()) - 1
    while at < span.stop:
        line = file.readline()
        if not line:
            return
        yield at, line
        at += len(line)


def _plain(lines: Iterator[tuple[int, bytes]], span: Span, counts: ReadCounts) -> Iterator[str]:
    content = b"".join(line for _, line in lines)
    if content or not span.start:  # a later span without lines lies within one long line
        yield _decode(content, counts).removeprefix("\ufeff")


def _json_texts(lines: Iterator[tuple[int, bytes]], span: Span, key: str, counts: ReadCounts) -> Iterator[str]:
    for at, line in lines:
        if not line.strip():
            continue
        bad = counts.bad_utf8
        decoded = _decode(line, counts).removeprefix("\ufeff")
        try:
            record = json.loads(decoded)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{_where(span, at)}: not valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise DataError(f"{_where(span, at)}: not an object with a {key!r} but {type(record).__name__}")
        if key not in record:
            keys = ", ".join(map(repr, list(record)[:8])) or "none"
            raise DataError(f"{_where(span, at)}: no key {key!r} (--text-key); its keys are {keys}")
        text = record[key]
        if not isinstance(text, str):
            raise DataError(f"{_where(span, at)}: {key!r} holds {type(text).__name__}, not text")
        mended = mend_surrogates(text)
        counts.bad_utf8 += mended is not text and counts.bad_utf8 == bad
        yield mended


def mend_surrogates(text: str) -> str:
    """The text with U+FFFD for lone surrogates (which JSON can escape but UTF-8 cannot hold); itself if it has none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _decode(content: bytes, counts: ReadCounts) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        counts.bad_utf8 += 1
        return content.decode(errors="replace")


def _where(span: Span, offset: int) -> str:
    """`file:line` of a byte offset; lines are counted only now that somebody wants to know."""
    number, left = 1, offset
    with open(span.file.path, "rb") as file:
        while left and (block := file.read(min(left, 1 << 20))):
            number += block.count(b"\n")
            left -= len(block)
    return f"{span.file.path}:{number}"
