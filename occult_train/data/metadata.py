"""corpus.json: what is known of a prepared corpus."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occult_train.data.indexed import token_dtype
from occult_train.data.reading import ReadCounts
from occult_train.data.tokenizer import Tokenizer
from occult_train.errors import DataError

METADATA = "corpus.json"
"""Written last: a folder that has it is complete."""
FORMAT = 1
"""Version of corpus.json and of how text becomes tokens; an older corpus is not taken for the same."""


@dataclass
class Tally:
    """One side of the split."""

    unigrams: NDArray[np.int64]
    """[vocabulary] how often each id occurs where the loss is: in responses, if documents are examples."""
    documents: int = 0
    bytes: int = 0
    """Text in UTF-8."""
    tokens: int = 0
    """All ids, the end of each document included."""


@dataclass
class Merged:
    """What the merge saw."""

    train: Tally
    valid: Tally
    counts: ReadCounts = field(default_factory=ReadCounts)


def describe_tokens(merged: Merged, tokenizer: Tokenizer) -> dict[str, Any]:
    """The part of corpus.json that follows from the tokens and the tokenizer."""
    train, valid = merged.train, merged.valid
    return {
        "format": FORMAT,
        "vocab_size": tokenizer.vocab_size,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "tokenizer_sha256": tokenizer.fingerprint(),
        "eod_id": tokenizer.eod_id,
        "begin_ids": list(tokenizer.begin),
        "train": _counts(train),
        "valid": _counts(valid),
        "bytes_per_token": (train.bytes + valid.bytes) / (train.tokens + valid.tokens),
        "unigram_entropy": {
            "train": entropy(train.unigrams),
            "valid_under_train": cross_entropy(valid.unigrams, train.unigrams),
        },
        "empty_documents": merged.counts.empty,
        "documents_with_bad_utf8": merged.counts.bad_utf8,
    }


def read_metadata(folder: Path, setting: str = "data.path") -> dict[str, Any]:
    """corpus.json of a prepared folder.

    Raises:
        DataError: it is missing or not as `occult prepare` writes it.
    """
    file = folder / METADATA
    if not file.is_file():
        raise DataError(
            f"{setting}={folder} has no {METADATA}: not finished or not a corpus; run occult prepare "
            f"(a Megatron pair is named by its prefix, like {folder}/NAME)"
        )
    try:
        metadata = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None
    needed = ("vocab_size", "tokenizer", "tokenizer_sha256", "train", "valid")
    missing = [key for key in needed if key not in metadata] if isinstance(metadata, dict) else list(needed)
    if missing:
        raise DataError(f"{file} lacks {', '.join(missing)}: not made by occult prepare")
    return metadata


def write_metadata(folder: Path, metadata: dict[str, Any]) -> None:
    """Write corpus.json, whole or not at all."""
    partial = folder / f"{METADATA}.partial"
    partial.write_text(json.dumps(metadata, indent=2) + "\n")
    partial.replace(folder / METADATA)


def summary(metadata: dict[str, Any]) -> str:
    """corpus.json in a line."""
    train, valid = metadata["train"], metadata["valid"]
    text = (
        f"{train['tokens']:,} tokens of {train['documents']:,} documents to train on, "
        f"{valid['tokens']:,} of {valid['documents']:,} held out, vocabulary {metadata['vocab_size']}, "
        f"{metadata['bytes_per_token']:.2f} bytes a token, "
        f"{_responses(metadata)}"
        f"unigram loss {metadata['unigram_entropy']['valid_under_train']:.3f} nats"
    )
    notes = {
        "empty documents left out": metadata["empty_documents"],
        "binary files left out": metadata["binary_files"],
        "documents with bad UTF-8 mended": metadata["documents_with_bad_utf8"],
    }
    return text + "".join(f"; {count} {what}" for what, count in notes.items() if count)


def _responses(metadata: dict[str, Any]) -> str:
    if not metadata.get("examples"):
        return ""
    return f"examples with {metadata['response_tokens']:,} tokens of responses to train on, "


def entropy(counts: NDArray[np.int64]) -> float:
    """Entropy of a distribution given by its counts, in nats."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def cross_entropy(counts: NDArray[np.int64], model: NDArray[np.int64]) -> float:
    """Mean nats per token of `counts` [vocabulary] under the shares of `model` [vocabulary], one added to each count.

    It is the held-out loss of a model that knows how often tokens occur, and nothing else.
    """
    shares = (model + 1) / (model.sum() + len(model))
    return float(-(counts * np.log(shares)).sum() / counts.sum())


def _counts(tally: Tally) -> dict[str, int]:
    return {"documents": tally.documents, "tokens": tally.tokens, "bytes": tally.bytes}
