"""Corpora on disk: a folder made by `occult prepare`, or a bare Megatron .bin/.idx pair."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from occult_train.data.indexed import IndexedReader, pair, split_prefix
from occult_train.data.metadata import METADATA, read_metadata
from occult_train.data.tokenizer import find_tokenizer, load_tokenizer
from occult_train.errors import DataError
from occult_train.inside import inside


@dataclass(frozen=True)
class Corpus:
    """An open corpus."""

    path: Path
    """As it was given."""
    train: IndexedReader
    valid: IndexedReader | None
    """Held-out text. A bare pair has none."""
    tokenizer: Path | None
    """Tokenizer file, checked to be the one that the corpus was made with; a bare pair has what it was given."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """The content of corpus.json; empty for a bare pair."""

    @property
    def vocab_size(self) -> int | None:
        """Ids of the tokenizer, or None if nothing is known of it."""
        if "vocab_size" in self.metadata:
            return int(self.metadata["vocab_size"])
        return load_tokenizer(self.tokenizer).vocab_size if self.tokenizer else None


def open_corpus(path: str | Path, *, setting: str = "data.path", tokenizer: str | Path = "") -> Corpus:
    """Open a folder made by `occult prepare`, or a Megatron pair by its prefix, with or without ".bin".

    Args:
        path: the folder or prefix.
        setting: where the path comes from, for messages.
        tokenizer: the tokenizer of a bare pair (file or folder); for a prepared folder it must be the folder's own.

    Raises:
        DataError: nothing is there, it is unfinished or damaged, or the tokenizer is another one.
    """
    if not str(path):
        raise DataError(f"{setting} is empty; name a folder made by `occult prepare`, or a .bin/.idx prefix")
    path = Path(path)
    prefix = split_prefix(path)
    bin_path, idx_path = pair(prefix)
    if path.is_dir() and ((path / METADATA).exists() or not bin_path.exists()):
        return _open_folder(path, setting, tokenizer)
    if not bin_path.exists() and not idx_path.exists():
        raise DataError(f"{setting}={path} does not exist, neither as a folder nor as {bin_path.name} and .idx")
    file = _tokenizer_file(tokenizer)
    return Corpus(path, IndexedReader(prefix), None, file)


def check_vocab(corpus: Corpus, vocab_size: int) -> None:
    """Raise DataError if the corpus' tokenizer has ids that a model of `vocab_size` embeddings lacks.

    Nothing is known of a bare pair without a tokenizer: its ids are checked when samples are read.
    """
    known = corpus.vocab_size
    if known is not None and known > vocab_size:
        raise DataError(
            f"model.vocab_size={vocab_size} is smaller than the {known} ids of the tokenizer of {corpus.path} "
            f"({corpus.tokenizer})"
        )


def _open_folder(folder: Path, setting: str, tokenizer: str | Path) -> Corpus:
    metadata = read_metadata(folder, setting)
    examples = bool(metadata.get("examples"))
    train, valid = IndexedReader(folder / "train", examples), IndexedReader(folder / "valid", examples)
    for name, reader in (("train", train), ("valid", valid)):
        recorded = metadata[name].get("tokens") if isinstance(metadata[name], dict) else None
        if recorded != reader.tokens:
            raise DataError(f"{reader.bin_path} has {reader.tokens} tokens, {METADATA} beside it says {recorded}")
    file = inside(folder, metadata["tokenizer"], f"{folder}/{METADATA}", DataError)
    if not file.is_file():
        raise DataError(f"{folder} has lost its tokenizer {file.name}")
    for candidate in (file, _tokenizer_file(tokenizer)):
        if candidate and _sha256(candidate) != metadata["tokenizer_sha256"]:
            raise DataError(
                f"wrong tokenizer for the corpus {setting}={folder}: {candidate} has SHA-256 "
                f"{_sha256(candidate)[:12]}…, the corpus was made with {str(metadata['tokenizer_sha256'])[:12]}…"
            )
    return Corpus(folder, train, valid, file, metadata)


def _tokenizer_file(tokenizer: str | Path) -> Path | None:
    """The file that data.tokenizer names, directly or by its folder."""
    if not str(tokenizer):
        return None
    path = Path(tokenizer)
    found = find_tokenizer(path) if path.is_dir() else path
    if found is None or not found.is_file():
        raise DataError(f"data.tokenizer={tokenizer} " + ("holds no tokenizer" if path.is_dir() else "does not exist"))
    return found


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"tokenizer {path} cannot be read: {error.strerror}") from None
