"""Text to token ids in parallel, in parts that survive an interruption.

A part is a bounded amount of text. Its files lie in `OUTPUT/parts/` under a name made of all that its content depends
on (files, their sizes and times, tokenizer, settings): a part that is there need not be made again, and one of other
settings is never taken for it. `NAME.bin/.idx` hold a sequence a document; `NAME.npz`, written last, the rest.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from occult_train.data.indexed import IndexedReader, IndexedWriter, token_dtype
from occult_train.data.reading import Key, ReadCounts, Span, records
from occult_train.data.tokenizer import Tokenizer, load_tokenizer
from occult_train.errors import DataError

PART_BYTES = 4 << 20
"""Text in a part: a few seconds of work, and at most a few hundred MB of memory."""
FORMAT = 2
"""Raised when parts of earlier versions of this file must not be used again."""


@dataclass(frozen=True)
class PartSettings:
    """What all parts of a corpus share."""

    folder: str
    """Where parts are written."""
    tokenizer: str
    """A file that `load_tokenizer` reads."""
    tokenizer_sha256: str
    eod_id: int
    """The id appended to each document."""
    eod: str | None
    """The token of that id, where it was named."""
    keys: tuple[Key, ...]
    """Where the text is in a JSON line: one key of documents, two of prompts and responses."""
    min_bytes: int
    begin: tuple[int, ...] = ()
    """Ids put before each document."""

    @property
    def examples(self) -> bool:
        """Whether documents are prompts with their responses."""
        return len(self.keys) == 2


@dataclass(frozen=True)
class Part:
    """Some spans of text, and the name of the files that hold their tokens."""

    name: str
    spans: tuple[Span, ...]

    @property
    def size(self) -> int:
        """Bytes of its spans."""
        return sum(span.stop - span.start for span in self.spans)


@dataclass(frozen=True)
class PartContent:
    """A finished part."""

    reader: IndexedReader
    """One document of the reader for each that was read, end-of-document id included."""
    hashes: NDArray[np.uint64]
    """[documents] of the text, of an example's prompt."""
    sizes: NDArray[np.int64]
    """[documents] bytes of the text in UTF-8."""
    counts: ReadCounts


def plan_parts(spans: Iterable[Span], settings: PartSettings, size: int = PART_BYTES) -> list[Part]:
    """Gather spans, in their order, into parts of about `size` bytes."""
    parts: list[Part] = []
    gathered: list[Span] = []
    total = 0
    for span in spans:
        if gathered and total + span.stop - span.start > size:
            parts.append(_part(gathered, settings))
            gathered, total = [], 0
        gathered.append(span)
        total += span.stop - span.start
    return [*parts, _part(gathered, settings)] if gathered else parts


def encode_parts(parts: list[Part], settings: PartSettings, workers: int) -> Iterator[Part]:
    """Make the parts that are not there yet, and yield each, in any order, when it is.

    Args:
        workers: processes; with 1 the work is done in this one.

    Raises:
        DataError: of a worker that met bad text, or was killed.
    """
    missing = []
    for part in parts:
        if _known(part, settings).is_file():
            yield part
        else:
            missing.append(part)
    if workers == 1 or len(missing) < 2:
        for part in missing:
            encode_part(part, settings)
            yield part
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(missing)), mp_context=context, initializer=_initialise)
    try:
        work = {pool.submit(encode_part, part, settings): part for part in missing}
        for future in as_completed(work):
            future.result()
            yield work[future]
    except BrokenProcessPool:
        raise DataError("a worker was killed, perhaps for memory; run again with fewer --workers to go on") from None
    finally:
        pool.shutdown(cancel_futures=True)


def encode_part(part: Part, settings: PartSettings) -> None:
    """Tokenise one part and write its files."""
    tokenizer = _tokenizer(settings.tokenizer, settings.tokenizer_sha256, settings.eod)
    counts, hashes, sizes = ReadCounts(), [], []
    dtype = token_dtype(tokenizer.vocab_size)
    with IndexedWriter(Path(settings.folder, part.name), dtype, settings.examples) as writer:
        for span in part.spans:
            for texts in records(span, settings.keys, counts, settings.min_bytes):
                named = (texts[0] or texts[-1]).encode()  # examples of one prompt stay together
                hashes.append(int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "little"))
                sizes.append(sum(len(text.encode()) for text in texts))
                ids = [tokenizer.encode(text) for text in texts]
                ids[0] = [*settings.begin, *ids[0]]
                ids[-1].append(settings.eod_id)
                writer.add_many(np.array([*chain(*ids)]), np.array([len(sequence) for sequence in ids]))
    known = _known(part, settings)
    partial = Path(f"{known}.partial")
    with open(partial, "wb") as file:
        np.savez(
            file,
            hashes=np.array(hashes, np.uint64),
            sizes=np.array(sizes, np.int64),
            counts=np.array([counts.empty, counts.bad_utf8], np.int64),
        )
    partial.replace(known)


def read_part(part: Part, settings: PartSettings) -> PartContent:
    """Open a finished part."""
    hashes, sizes, counts = read_known(part, settings)
    reader = IndexedReader(Path(settings.folder, part.name), settings.examples)
    return PartContent(reader, hashes, sizes, counts)


def read_known(part: Part, settings: PartSettings) -> tuple[NDArray[np.uint64], NDArray[np.int64], ReadCounts]:
    """Hashes, sizes and counts of a finished part, without its tokens."""
    with np.load(_known(part, settings)) as known:
        return known["hashes"], known["sizes"], ReadCounts(*known["counts"].tolist())


def _part(spans: list[Span], settings: PartSettings) -> Part:
    depends = asdict(settings) | {"folder": "", "tokenizer": "", "format": FORMAT, "spans": [asdict(s) for s in spans]}
    name = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]
    return Part(name, tuple(spans))


def _known(part: Part, settings: PartSettings) -> Path:
    return Path(settings.folder, f"{part.name}.npz")


@lru_cache(maxsize=1)
def _tokenizer(path: str, sha256: str, eod: str | None) -> Tokenizer:
    tokenizer = load_tokenizer(path, eod)
    if tokenizer.fingerprint() != sha256:
        raise DataError(f"tokenizer {path} changed while it was in use")
    return tokenizer


def _initialise() -> None:
    """In a worker: end silently on Ctrl-C, and when the parent is gone, however it ended."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
