"""Errors that are a user's to mend. The entry points print their message alone, in one line, and exit with 2."""

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 1000
"""Characters of a message to the user."""


class UserError(Exception):
    """Something the user typed or gave is wrong. The message names the setting, its value and what it clashes with.

    It is one line, whatever the user's values hold, and its middle is left out where they are very long.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(part.strip() for part in message.splitlines())
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 4 :]}")


class ConfigError(UserError):
    """A configuration value is unknown, of the wrong type, or impossible beside another."""


class DataError(UserError):
    """A corpus, tokenizer or text file is missing, damaged or does not fit the model."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, incomplete or of another model."""


class PlacementError(UserError):
    """An expert placement is not a permutation, or belongs to another model."""


class StatisticsError(UserError):
    """A file of routing statistics is missing, damaged, or of another model."""


class TrainingDiverged(Exception):
    """The loss or a gradient is no longer a number. Starting again would only repeat it."""


@contextmanager
def writing(setting: str) -> Iterator[None]:
    """Turn an OSError met in the block, such as a full disk, into a UserError that names where was written to.

    Args:
        setting: the setting and its value, e.g. `output=runs/mine`.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{setting} cannot be written: {error.strerror or error}") from None
