"""Samples of one corpus: documents shuffled, laid end to end, cut in pieces of equal length, pieces shuffled.

Examples (a prompt and its response) are not cut but packed: see packing.py. A label that no loss counts is -100.

Legend: S sequence length, D documents, P pieces of an epoch. A piece has S + 1 tokens, the last of which begins the
next piece: piece j is tokens j*S to j*S + S, so that `input_ids` are its first S tokens and `labels` its last S.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from occult_train.data.indexed import IndexedReader
from occult_train.data.packing import Packing, Packs
from occult_train.data.shuffle import permutation
from occult_train.errors import DataError

Sample = dict[str, torch.Tensor]
"""`input_ids` [S], `labels` [S] and, where documents are kept apart, `document_ids` [S], all int64."""
EPOCHS_KEPT = 2
NOT_COUNTED = -100
"""The label of a token that is not to be predicted."""


@dataclass(frozen=True)
class TokenStream:
    """A corpus with its documents in some order, read as one row of tokens.

    `ends` is int64 [D]: where in the row the d-th document of the order ends.
    """

    reader: IndexedReader
    order: NDArray[np.int64]
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, reader: IndexedReader, order: NDArray[np.int64]) -> "TokenStream":
        """The documents `order` [D] of a corpus."""
        return cls(reader, order, np.cumsum(np.diff(reader.offsets)[order]))

    def read(self, start: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens [length] from `start` on, and for each the document it is of, counted from 0 in this piece."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.ends, start + length, side="left"))
        stops = self.ends[first : last + 1]
        begins = self.reader.offsets[self.order[first : last + 1]]
        sizes = self.reader.offsets[self.order[first : last + 1] + 1] - begins
        # Where each document is cut by the piece: only the first and the last can be.
        skip = np.maximum(start - (stops - sizes), 0)
        take = np.minimum(stops, start + length) - np.maximum(stops - sizes, start)
        tokens = np.empty(length, np.int64)
        at = 0
        for begin, count in zip((begins + skip).tolist(), take.tolist(), strict=True):
            tokens[at : at + count] = self.reader.read(begin, begin + count)
            at += count
        seen = take > 0
        return tokens, np.repeat(np.cumsum(seen) - 1, take)


@dataclass(frozen=True)
class Cuts:
    """A stream of documents, cut in pieces."""

    stream: TokenStream
    sequence_length: int

    @property
    def reader(self) -> IndexedReader:
        """The corpus."""
        return self.stream.reader

    def piece(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64], None]:
        """Tokens and documents of S + 1 places, all of which are to be predicted."""
        return *self.stream.read(number * self.sequence_length, self.sequence_length + 1), None


class Cutting:
    """How a corpus of plain documents becomes pieces: laid end to end and cut.

    Raises:
        DataError: it has fewer than S + 1 tokens.
    """

    remark = ""

    def __init__(self, reader: IndexedReader, sequence_length: int) -> None:
        if reader.tokens < sequence_length + 1:
            raise DataError(
                f"{reader.bin_path} has {reader.tokens} tokens, fewer than the {sequence_length + 1} of one sample "
                f"(data.sequence_length={sequence_length} plus 1)"
            )
        self.reader, self.sequence_length = reader, sequence_length
        self.pieces = (reader.tokens - 1) // sequence_length

    def laid(self, order: NDArray[np.int64]) -> Cuts:
        """The pieces of the documents in the order `order` [D]."""
        return Cuts(TokenStream.of(self.reader, order), self.sequence_length)


def in_pieces(reader: IndexedReader, sequence_length: int) -> Cutting | Packing:
    """How a corpus becomes samples.

    Raises:
        DataError: S is less than 1, or the corpus too short for it.
    """
    if sequence_length < 1:
        raise DataError(f"data.sequence_length={sequence_length} must be at least 1")
    return Cutting(reader, sequence_length) if reader.prompts is None else Packing(reader, sequence_length)


class GPTDataset:
    """Endless training samples; `dataset[i]` is a pure function of (corpus, sequence_length, seed, i).

    Epoch e holds samples e*P to e*P + P - 1. In it each token is predicted once, but for the first and the fewer than S
    at the end; of examples each token of a response. Documents and pieces are shuffled anew in each epoch.

    Args:
        reader: the corpus.
        sequence_length: S.
        seed: any integer.
        mask_documents: also give `document_ids`.
        vocab_size: ids from it on are refused when they are read; 0 checks for negative ids alone.

    Raises:
        DataError: the corpus is too short for one sample.
    """

    def __init__(
        self,
        reader: IndexedReader,
        sequence_length: int,
        seed: int,
        *,
        mask_documents: bool = False,
        vocab_size: int = 0,
    ) -> None:
        self.reader = reader
        self.sequence_length = sequence_length
        self.seed = seed
        self.mask_documents = mask_documents
        self.vocab_size = vocab_size
        self._cutting = in_pieces(reader, sequence_length)
        self.samples_per_epoch = self._cutting.pieces
        self._epochs: OrderedDict[int, tuple[Cuts | Packs, NDArray[np.int64]]] = OrderedDict()

    @property
    def remarks(self) -> list[str]:
        """Lines for the user on what of the corpus is not used."""
        return [self._cutting.remark] if self._cutting.remark else []

    @property
    def has_examples(self) -> bool:
        """Whether not all labels count."""
        return isinstance(self._cutting, Packing)

    def __getitem__(self, index: int) -> Sample:
        if index < 0:
            raise IndexError(f"sample {index} is negative")
        epoch, within = divmod(index, self.samples_per_epoch)
        laid, pieces = self._epoch(epoch)
        return _sample(laid, int(pieces[within]), self)

    def _epoch(self, epoch: int) -> tuple[Cuts | Packs, NDArray[np.int64]]:
        """The shuffled documents and pieces of an epoch; the last few epochs asked for are kept."""
        if epoch not in self._epochs:
            laid = self._cutting.laid(permutation(len(self.reader), self.seed, epoch, 0))
            self._epochs[epoch] = laid, permutation(self.samples_per_epoch, self.seed, epoch, 1)
            while len(self._epochs) > EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(epoch)
        return self._epochs[epoch]


class HeldOut:
    """Validation samples in the order of the text: piece j of a corpus is tokens j*S to j*S + S, nothing is shuffled.

    Several corpora take turns, one piece each, until all have run out, so that the first pieces are of all of them.
    With no corpus there are no samples.

    Raises:
        DataError: a corpus is too short for one sample.
    """

    def __init__(
        self,
        readers: list[IndexedReader],
        sequence_length: int,
        *,
        mask_documents: bool = False,
        vocab_size: int = 0,
    ) -> None:
        self.sequence_length = sequence_length
        self.mask_documents = mask_documents
        self.vocab_size = vocab_size
        cuttings = [in_pieces(reader, sequence_length) for reader in readers]
        self._laid = [cutting.laid(np.arange(len(cutting.reader))) for cutting in cuttings]
        counts = [cutting.pieces for cutting in cuttings]
        self.remarks = [cutting.remark for cutting in cuttings if cutting.remark]
        pieces = np.concatenate([np.zeros(0, np.int64), *(np.arange(count) for count in counts)])
        corpora = np.repeat(np.arange(len(readers)), np.array(counts, np.int64))
        turn = np.lexsort((corpora, pieces))
        self._pieces, self._corpora = pieces[turn], corpora[turn]

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"held-out sample {index} of {len(self)}")
        return _sample(self._laid[self._corpora[index]], int(self._pieces[index]), self)


def _sample(laid: Cuts | Packs, piece: int, of: GPTDataset | HeldOut) -> Sample:
    """Piece `piece` as a sample, its ids checked."""
    tokens, documents, counted = laid.piece(piece)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0:
        raise DataError(f"{laid.reader.bin_path} holds the negative token id {low}")
    if of.vocab_size and high >= of.vocab_size:
        raise DataError(f"{laid.reader.bin_path} holds the token id {high}, beyond model.vocab_size={of.vocab_size}")
    labels = tokens[1:].copy() if counted is None else np.where(counted[1:], tokens[1:], NOT_COUNTED)
    sample = {"input_ids": torch.from_numpy(tokens[:-1]), "labels": torch.from_numpy(labels)}
    if of.mask_documents:
        sample["document_ids"] = torch.from_numpy(documents[:-1])
    return sample
