"""Errors that are a user's to mend. The entry points print their message alone, in one line, and exit with 2."""


class UserError(Exception):
    """Something the user typed or gave is wrong. The message names the setting, its value and what it clashes with.

    It is one line, whatever the user's values hold.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(part.strip() for part in message.splitlines()))


class ConfigError(UserError):
    """A configuration value is unknown, of the wrong type, or impossible beside another."""


class DataError(UserError):
    """A corpus, tokenizer or text file is missing, damaged or does not fit the model."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, incomplete or of another model."""


class PlacementError(UserError):
    """An expert placement is not a permutation, or belongs to another model."""
