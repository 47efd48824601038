"""The folder that a corpus is made in: what is there already, and who may write."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from occult_train.data.corpus import open_corpus
from occult_train.data.metadata import METADATA, read_metadata
from occult_train.errors import DataError


def is_same(output: Path, fingerprint: str) -> bool:
    """Whether a complete corpus of just this is there."""
    try:
        return read_metadata(output).get("fingerprint") == fingerprint
    except DataError:
        return False


def existing(output: Path, fingerprint: str) -> dict[str, Any] | None:
    """The metadata of a complete corpus of just this; None if the folder has no complete corpus.

    Raises:
        DataError: it has another one.
    """
    if not (output / METADATA).exists():
        return None
    if not is_same(output, fingerprint):
        raise DataError(f"{output} holds a corpus of other text or settings; --overwrite replaces it")
    try:
        return open_corpus(output, setting="--output").metadata
    except DataError as error:
        raise DataError(f"{error}; remove {output / METADATA} to make the corpus anew") from None


def remove_corpus(output: Path) -> None:
    """What an earlier corpus left that would belie the new one."""
    for name in (METADATA, "tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        (output / name).unlink(missing_ok=True)


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the folder against a second run. The lock ends with the process, however that ends."""
    with open(output / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another occult prepare is writing to {output}") from None
        except OSError:
            pass  # a file system without locks
        yield
    (output / ".lock").unlink(missing_ok=True)
