"""What training reads: datasets from the data settings, and the micro-batches of a rank."""

from typing import Protocol, Self

import torch

from occult_train.config import DataConfig
from occult_train.data.blend import BlendedDataset
from occult_train.data.corpus import Corpus, check_vocab, open_corpus
from occult_train.data.indexed import IndexedReader
from occult_train.data.samples import GPTDataset, HeldOut, Sample
from occult_train.errors import DataError

VOCAB_MULTIPLE = 64


class Samples(Protocol):
    """Training samples without end, each a pure function of its index."""

    def __getitem__(self, index: int) -> Sample:
        """`input_ids` [S], `labels` [S] and perhaps `document_ids` [S], int64."""


class Batches:
    """The micro-batches of one rank, without end.

    Row b of micro-batch a of rank r is sample `consumed + (a * world_size + r) * micro_batch_size + b` of the dataset,
    counted from the start of an optimizer step: a global batch is the same set of samples whatever the number of ranks
    and of accumulation steps.

    Args:
        dataset: the samples.
        consumed_samples: samples that the run has used on all ranks so far; a multiple of the global batch.
        micro_batch_size: rows of a micro-batch.
        rank: this data-parallel rank.
        world_size: data-parallel ranks.
    """

    def __init__(
        self, dataset: Samples, *, consumed_samples: int, micro_batch_size: int, rank: int, world_size: int
    ) -> None:
        if consumed_samples < 0 or micro_batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"impossible batches: {consumed_samples=}, {micro_batch_size=}, {rank=}, {world_size=}")
        self.dataset = dataset
        self.consumed_samples = consumed_samples
        """Samples used on all ranks, those of the last micro-batch included."""
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Sample:
        """The next micro-batch: `input_ids`, `labels` and perhaps `document_ids`, each int64 [micro, S] on the CPU."""
        first = self.consumed_samples + self.rank * self.micro_batch_size
        samples = [self.dataset[first + row] for row in range(self.micro_batch_size)]
        self.consumed_samples += self.world_size * self.micro_batch_size
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def open_corpora(data: DataConfig) -> tuple[list[Corpus], list[float]]:
    """The corpora that `data.path` or `data.blend` names, and their weights.

    A blend is in the order of its paths, so that the order in which settings were given does not matter.

    Raises:
        DataError: a corpus cannot be opened, or two were made with different tokenizers.
    """
    if not data.blend:
        return [open_corpus(data.path, tokenizer=data.tokenizer)], [1.0]
    paths = sorted(data.blend)
    corpora = [open_corpus(path, setting="data.blend", tokenizer=data.tokenizer) for path in paths]
    _check_same_tokenizer([("data.blend", corpus) for corpus in corpora])
    return corpora, [data.blend[path] for path in paths]


def resolve_vocab(data: DataConfig, vocab_size: int) -> int:
    """`model.vocab_size`, checked; 0 becomes the tokenizer's size, padded to a multiple of 64.

    Raises:
        DataError: it is smaller than the tokenizer's, or 0 while no tokenizer is known.
    """
    corpora, _ = open_corpora(data)
    if vocab_size:
        for corpus in corpora:
            check_vocab(corpus, vocab_size)
        return vocab_size
    sizes = [size for corpus in corpora if (size := corpus.vocab_size) is not None]
    if not sizes:
        raise DataError(
            f"model.vocab_size=0 stands for the tokenizer's size, and {corpora[0].path} comes without a tokenizer; "
            "set data.tokenizer or model.vocab_size"
        )
    return -(-max(sizes) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def build_datasets(data: DataConfig, seed: int, *, vocab_size: int = 0) -> tuple[GPTDataset | BlendedDataset, HeldOut]:
    """Training and held-out samples.

    Held out is `data.valid_path` if set (all of a bare pair, the valid side of a prepared folder), else the valid side
    of each corpus, the corpora of a blend taking turns piece by piece. It is empty if none of this exists.

    Args:
        data: the settings.
        seed: of the shuffles.
        vocab_size: `model.vocab_size`; ids from it on are refused when read. 0 takes the tokenizers'.

    Raises:
        DataError: a corpus is missing, damaged, too short for one sample, or does not fit the others or the vocabulary.
    """
    corpora, weights = open_corpora(data)
    limit = vocab_size or max((corpus.vocab_size or 0 for corpus in corpora), default=0)
    for corpus in corpora:
        check_vocab(corpus, limit or 2**63)
    train = [
        GPTDataset(c.train, data.sequence_length, seed, mask_documents=data.mask_documents, vocab_size=limit)
        for c in corpora
    ]
    readers = _held_out_readers(data, corpora, limit)
    try:
        valid = HeldOut(readers, data.sequence_length, mask_documents=data.mask_documents, vocab_size=limit)
    except DataError as error:
        raise DataError(f"held-out text: {error}; prepare more (--valid-fraction), or set data.valid_path") from None
    return (BlendedDataset(train, weights) if data.blend else train[0]), valid


def _held_out_readers(data: DataConfig, corpora: list[Corpus], limit: int) -> list[IndexedReader]:
    if not data.valid_path:
        return [corpus.valid for corpus in corpora if corpus.valid is not None]
    corpus = open_corpus(data.valid_path, setting="data.valid_path", tokenizer=data.tokenizer)
    setting = "data.blend" if data.blend else "data.path"
    _check_same_tokenizer([*((setting, c) for c in corpora), ("data.valid_path", corpus)])
    check_vocab(corpus, limit or 2**63)
    return [corpus.train if corpus.valid is None else corpus.valid]


def _check_same_tokenizer(corpora: list[tuple[str, Corpus]]) -> None:
    """Prepared folders, each with the setting that names it, know their tokenizer; a bare pair fits any."""
    known = [(f"{setting}={c.path}", c.metadata["tokenizer_sha256"]) for setting, c in corpora if c.metadata]
    for name, tokenizer in known[1:]:
        if tokenizer != known[0][1]:
            raise DataError(f"{known[0][0]} and {name} were made with different tokenizers")
