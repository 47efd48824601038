"""Source files cut in spans of bounded size, and read as documents."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

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


@dataclass(frozen=True)
class Key:
    """Where a text is in a JSON line."""

    name: str
    option: str
    """Of the command, that says so."""


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
    for (text,) in records(span, (Key(text_key, "--text-key"),), counts, min_bytes):
        yield text


def records(span: Span, keys: tuple[Key, ...], counts: ReadCounts, min_bytes: int = 1) -> Iterator[tuple[str, ...]]:
    """As `documents`, with a text for each key: one of a document, two of a prompt and its response.

    A record whose last text is blank is left out, and one with fewer than `min_bytes` bytes in all.
    """
    with open(span.file.path, "rb") as file:
        lines = _lines(file, span)
        found = _json_texts(lines, span, keys, counts) if span.file.is_json_lines else _plain(lines, span, counts)
        for texts in found:
            size = sum(len(text.encode()) for text in texts) if min_bytes > 1 else 1
            if not texts[-1] or texts[-1].isspace() or size < min_bytes:
                counts.empty += 1
            else:
                yield texts


def sample_texts(files: list[SourceFile], size: int, keys: tuple[Key, ...], seed: int) -> Iterator[str]:
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
        for texts in records(Span(file, start, min(start + SAMPLE_BLOCK, file.size)), keys, ReadCounts()):
            text = "".join(texts)
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


def _plain(lines: Iterator[tuple[int, bytes]], span: Span, counts: ReadCounts) -> Iterator[tuple[str]]:
    content = b"".join(line for _, line in lines)
    if content or not span.start:  # a later span without lines lies within one long line
        yield (_decode(content, counts).removeprefix("\ufeff"),)


def _json_texts(
    lines: Iterator[tuple[int, bytes]], span: Span, keys: tuple[Key, ...], counts: ReadCounts
) -> Iterator[tuple[str, ...]]:
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
            wanted = " and a ".join(repr(key.name) for key in keys)
            raise DataError(f"{_where(span, at)}: not an object with a {wanted} but {type(record).__name__}")
        texts = [_text(record, key, span, at) for key in keys]
        mended = tuple(mend_surrogates(text) for text in texts)
        if counts.bad_utf8 == bad:
            counts.bad_utf8 += any(new is not old for new, old in zip(mended, texts, strict=True))
        yield mended


def _text(record: dict[str, Any], key: Key, span: Span, at: int) -> str:
    """What a JSON line holds under a key."""
    if key.name not in record:
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        raise DataError(f"{_where(span, at)}: no key {key.name!r} ({key.option}); its keys are {keys}")
    text = record[key.name]
    if not isinstance(text, str):
        raise DataError(f"{_where(span, at)}: {key.name!r} holds {type(text).__name__}, not text")
    return text


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
