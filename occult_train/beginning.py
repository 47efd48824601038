"""What a run begins with: a checkpoint, the weights of one, a Hugging Face model, or random weights."""

from pathlib import Path

from occult_train.checkpoint.state import larger_than_files
from occult_train.checkpoint.store import Checkpoint, WeightsAlone, find_latest, holds_checkpoint, open_checkpoint
from occult_train.config import Config
from occult_train.data.loader import open_corpora
from occult_train.errors import CheckpointError
from occult_train.hub import files as hub_files
from occult_train.hub.source import HubModel, open_model

Beginning = Checkpoint | HubModel | None


def find(config: Config) -> Beginning:
    """Open what the run begins with: its own checkpoint before that of `checkpoint.resume`, before
    `model.from_pretrained`. Weights are not read yet.

    Raises:
        CheckpointError: a checkpoint is missing or damaged.
        DataError: the model is damaged, or the corpus has other token ids than it.
    """
    checkpoint = _checkpoint(config)
    if checkpoint is not None:
        if kept := hub_files.kept(checkpoint):
            _check_tokenizer(config, kept, f"checkpoint.resume={config.checkpoint.resume}")
        return checkpoint
    folder = config.model.from_pretrained
    if not folder:
        return None
    if not hub_files.is_model(Path(folder)) and holds_checkpoint(Path(folder)):
        checkpoint = open_checkpoint(Path(folder))
        if large := larger_than_files(config.model, checkpoint.entries):
            raise CheckpointError(f"checkpoint {checkpoint.folder}: its configuration {large}")
        words = hub_files.kept(checkpoint) or checkpoint.folder.parent.parent
        _check_tokenizer(config, words, f"model.from_pretrained={folder}")
        return WeightsAlone(checkpoint)
    _check_tokenizer(config, Path(folder), f"model.from_pretrained={folder}")
    return open_model(Path(folder))


def keep_files(beginning: Beginning, run: Path) -> None:
    """Copy the tokenizer and settings of the model that it goes back to into the run's folder; one rank does."""
    if isinstance(beginning, HubModel):
        hub_files.keep(beginning.folder, run)
    elif beginning is None:
        hub_files.forget(run)
    elif kept := hub_files.kept(beginning):
        hub_files.keep(kept, run)


def describe(beginning: Checkpoint | HubModel, placed: str) -> list[str]:
    """Lines for the user, once it is loaded.

    Args:
        placed: words on where a checkpoint's experts are put.
    """
    fresh = "AdamW's moments start from zero"
    if isinstance(beginning, HubModel):
        size = f"{beginning.bytes_read / 1e9:.2f} GB on this rank"
        return [*beginning.config.remarks(), f"weights of {beginning.folder}, {size}; {fresh}"]
    if isinstance(beginning, WeightsAlone):
        return [f"weights of {beginning.folder}, step {beginning.taken_at}{placed}; {fresh}"]
    weights_alone = "" if beginning.has_optimizer else f"; it holds weights alone, so {fresh}"
    return [f"continuing {beginning.folder} at step {beginning.step}{placed}{weights_alone}"]


def _checkpoint(config: Config) -> Checkpoint | None:
    setting, output = config.checkpoint.resume, Path(config.output)
    if setting == "none":
        return None
    own = find_latest(output / "checkpoints")
    if setting == "auto":
        return None if own is None else open_checkpoint(own)
    given = _given(setting)
    if own is not None and not given.folder.resolve().is_relative_to(output.resolve()):
        return open_checkpoint(own)  # the run began with the given one and has gone on since
    return given


def _given(setting: str) -> Checkpoint:
    """The checkpoint that checkpoint.resume names."""
    try:
        return open_checkpoint(Path(setting))
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint.resume={setting} (auto, none, or a path): {error}") from None


def _check_tokenizer(config: Config, model: Path, setting: str) -> None:
    hub_files.check_same_tokenizer(model, open_corpora(config.data)[0][0].tokenizer, setting)
