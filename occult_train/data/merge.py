"""Finished parts to the files of a corpus: the split into train and valid, and the merge."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from occult_train.data.indexed import IndexedWriter, token_dtype
from occult_train.data.metadata import Merged, Tally
from occult_train.data.parts import Part, PartContent, PartSettings, read_known, read_part
from occult_train.errors import DataError


def valid_below(parts: list[Part], settings: PartSettings, fraction: float) -> int:
    """The limit below which the hash of a document's text puts it into the held-out side.

    It is `fraction` of the range of hashes, moved so that either side has at least one document: the split depends on
    the texts, not on their order, and equal texts are on one side.

    Raises:
        DataError: there are fewer than two different documents.
    """
    documents, low, high = 0, 2**64, -1
    for part in parts:
        hashes = read_known(part, settings)[0]
        if len(hashes):
            documents += len(hashes)
            low, high = min(low, int(hashes.min())), max(high, int(hashes.max()))
    if low >= high:
        raise DataError(
            f"the sources hold {documents} document{'s' if documents != 1 else ''}, and at least 2 different ones are "
            "needed, one of them to hold out; a plain text file is one document: split it (split -n l/100 FILE) or "
            "give a .jsonl file"
        )
    return min(max(int(fraction * 2**64), low + 1), high)


def merge_parts(
    parts: list[Part],
    settings: PartSettings,
    output: Path,
    *,
    vocab_size: int,
    fraction: float,
    before_finish: Callable[[], None],
) -> Merged:
    """Write `train` and `valid` .bin/.idx into `output`, a part at a time.

    Args:
        fraction: of the documents to hold out.
        before_finish: called when all is written aside, before any file gets its name.
    """
    limit = np.uint64(valid_below(parts, settings, fraction))
    merged = Merged(Tally(np.zeros(vocab_size, np.int64)), Tally(np.zeros(vocab_size, np.int64)))
    dtype = token_dtype(vocab_size)
    both = settings.examples
    with IndexedWriter(output / "train", dtype, both) as train, IndexedWriter(output / "valid", dtype, both) as valid:
        for part in parts:
            content = read_part(part, settings)
            merged.counts.add(content.counts)
            held_out = content.hashes < limit
            _copy(content, held_out, valid, merged.valid)
            _copy(content, ~held_out, train, merged.train)
        before_finish()
    return merged


def _copy(content: PartContent, chosen: NDArray[np.bool_], writer: IndexedWriter, tally: Tally) -> None:
    """Append the chosen documents of a part to a side."""
    lengths, prompts = np.diff(content.reader.offsets), content.reader.prompts
    tokens = content.reader.read(0, content.reader.tokens)
    counted = np.ones(len(tokens), np.bool_)
    sequences = lengths[:, None]
    if prompts is not None:
        sequences = np.stack((prompts, lengths - prompts), axis=1)
        counted = np.repeat(np.tile([False, True], len(lengths)), sequences.ravel())
    mine = np.repeat(chosen, lengths)
    writer.add_many(tokens[mine], sequences[chosen].ravel())
    tally.documents += int(chosen.sum())
    tally.bytes += int(content.sizes[chosen].sum())
    tally.tokens += int(lengths[chosen].sum())
    tally.unigrams += np.bincount(tokens[mine & counted], minlength=len(tally.unigrams))
