"""What travels with a model beside its weights: tokenizer files, and the settings that are not the architecture's."""

import json
import shutil
from pathlib import Path
from typing import Any

from occult_train.checkpoint.store import Checkpoint
from occult_train.data.tokenizer import find_tokenizer, load_tokenizer
from occult_train.errors import DataError
from occult_train.inside import inside

FOLDER = "hub"
"""Where a run keeps the files of the Hugging Face model that it began with."""
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
SETTINGS_FILES = ("config.json", "generation_config.json")
SAMPLE = "The quick brown fox, 1,234.5 × 67 = ?\n\n\tdef f(x):  return x  # größer, 你好, мир, 🙂"


def is_model(folder: Path) -> bool:
    """Whether a folder is a Hugging Face model's."""
    return (folder / SETTINGS_FILES[0]).is_file()


def copy_files(source: Path, target: Path, names: tuple[str, ...]) -> list[str]:
    """Copy those files that there are, and return their names.

    Raises:
        DataError: one is a link to somewhere else, whose content would travel on with the model.
    """
    there = [name for name in names if (source / name).is_file()]
    for name in there:
        inside(source, name, "a model", DataError)
    if there:
        target.mkdir(parents=True, exist_ok=True)
    for name in there:
        shutil.copyfile(source / name, target / name)
    return there


def keep(source: Path, run: Path) -> None:
    """Copy a model's files into a run's folder, for export and generation. Another model's are replaced."""
    if source.resolve() == (run / FOLDER).resolve():
        return
    shutil.rmtree(run / FOLDER, ignore_errors=True)
    copy_files(source, run / FOLDER, (*TOKENIZER_FILES, *SETTINGS_FILES))


def forget(run: Path) -> None:
    """Remove what `keep` copied: the run begins from random weights."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)


def kept(checkpoint: Checkpoint) -> Path | None:
    """The folder with the files of the model that a checkpoint's run began with, if it began with one."""
    folder = checkpoint.folder.parent.parent / FOLDER
    return folder if folder.is_dir() else None


def read_settings(folder: Path | None, name: str) -> dict[str, Any]:
    """The object in one of `SETTINGS_FILES`; empty if there is none.

    Raises:
        DataError: the file is damaged.
    """
    if folder is None or not (folder / name).is_file():
        return {}
    try:
        return dict(json.loads((folder / name).read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{folder / name} is damaged: {error}") from None


def check_same_tokenizer(model: Path, corpus: Path | None, setting: str) -> None:
    """Refuse text in other token ids than the model knows.

    Args:
        model: a folder with the model's tokenizer; without one nothing can be checked.
        corpus: tokenizer file of the text, if known.
        setting: what names the model, e.g. `model.from_pretrained=PATH`.

    Raises:
        DataError: the tokenizers are not the same.
    """
    found = find_tokenizer(model)
    if found is None or corpus is None or found.read_bytes() == corpus.read_bytes():
        return
    if load_tokenizer(corpus).encode(SAMPLE) == load_tokenizer(found).encode(SAMPLE):
        return
    raise DataError(
        f"the corpus was made with tokenizer {corpus}, {setting} has another, {found}; prepare the text with "
        f"--tokenizer {found}"
    )
