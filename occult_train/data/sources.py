"""The files that the text of a corpus comes from."""

import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from occult_train.errors import DataError

JSON_LINES = (".jsonl", ".ndjson")
TEXT_ENDINGS = (
    *(".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc", ".html", ".htm", ".xml"),
    *(".py", ".pyi", ".pyx", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".hh", ".cu", ".cuh", ".java", ".kt", ".scala"),
    *(".go", ".rs", ".js", ".jsx", ".ts", ".tsx", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".swift", ".m", ".cs"),
    *(".fs", ".hs", ".ml", ".ex", ".erl", ".clj", ".sh", ".bash", ".zsh", ".sql", ".cmake", ".proto", ".css"),
    *(".yaml", ".yml", ".toml", ".cfg", ".ini"),
)
"""Endings read as plain text in a folder, in upper or lower case, besides JSON_LINES. A file that is named itself may
have any ending."""
SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules"})
"""Folders left out, besides those whose name begins with a dot."""
STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True, order=True)
class SourceFile:
    """A file to read: plain text (one document) or JSON lines (one document a line)."""

    path: str
    size: int
    """Bytes."""
    modified: int
    """Nanoseconds since 1970: with path and size it stands for the content."""

    @property
    def is_json_lines(self) -> bool:
        """Whether each line is a document."""
        return self.path.lower().endswith(JSON_LINES)


@dataclass
class Found:
    """The files of all sources, in the order of their paths, and how many lookalikes were left out."""

    files: list[SourceFile] = field(default_factory=list)
    binary: int = 0
    """Files of a text ending in folders that hold NUL bytes."""


def find_files(sources: Iterable[str], *, stdlib: bool = False, without: Path | None = None) -> Found:
    """All files that the sources name. A file reached twice counts once.

    Folders are searched with their subfolders for TEXT_ENDINGS and JSON_LINES. Hidden files and folders,
    SKIPPED_FOLDERS and links to folders are passed over.

    Args:
        sources: files and folders.
        stdlib: also the running interpreter's standard library.
        without: a folder that is not searched (the output).

    Raises:
        DataError: a source does not exist, cannot be read, is a binary file, or a folder without text.
    """
    found = Found()
    files: dict[str, SourceFile] = {}
    for source in sources:
        path = Path(source)
        if path.is_dir():
            names = list(_walk(path, without))
            if not names:
                raise DataError(f"source folder {source} holds no text file ({', '.join(JSON_LINES)} or plain text)")
        elif path.exists():
            names = [path]
        else:
            raise DataError(f"source {source} does not exist")
        for name in names:
            resolved = os.path.realpath(name)
            if not resolved.lower().endswith(JSON_LINES) and _is_binary(resolved):
                if not path.is_dir():
                    raise DataError(f"source {source} is not a text file: it holds NUL bytes")
                found.binary += 1
                continue
            files[resolved] = _stat(resolved)
        if not any(os.path.realpath(name) in files for name in names):
            raise DataError(f"source folder {source} holds no text: its {len(names)} files are binary")
    for name in stdlib_files() if stdlib else ():
        files[os.path.realpath(name)] = _stat(os.path.realpath(name))
    found.files = sorted(files.values())
    return found


def stdlib_files(root: Path | None = None) -> list[Path]:
    """The .py files of a standard library, without installed packages, tests and caches.

    Args:
        root: its folder; None takes the running interpreter's.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in STDLIB_SKIPPED)
        names += [Path(folder, f) for f in sorted(files) if f.endswith(".py")]
    if not names:
        raise DataError(f"--stdlib: {root} holds no Python source; this interpreter has none to read")
    return names


def _walk(root: Path, without: Path | None) -> Iterator[Path]:
    avoided = os.path.realpath(without) if without else ""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(
            f
            for f in folders
            if not f.startswith(".") and f not in SKIPPED_FOLDERS and os.path.realpath(Path(folder, f)) != avoided
        )
        for name in sorted(files):
            path = Path(folder, name)
            if not name.startswith(".") and name.lower().endswith(TEXT_ENDINGS + JSON_LINES) and path.is_file():
                yield path


def _is_binary(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return b"\0" in file.read(8192)
    except OSError as error:
        raise DataError(f"source {path} cannot be read: {error.strerror}") from None


def _stat(path: str) -> SourceFile:
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"source {path} cannot be read: {error.strerror}") from None
    return SourceFile(path, status.st_size, status.st_mtime_ns)
