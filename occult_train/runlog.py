"""`log.jsonl` of a run: a JSON object a line, each with its `kind` and `step`. Nothing here imports torch."""

import json
from pathlib import Path
from typing import Any

from occult_train.errors import UserError, writing


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a record. Raises UserError if the disk does not take it."""
    with writing(str(path)), path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The records, without a last line that was cut off when its writer was killed.

    Raises:
        UserError: another line is damaged.
        OSError: the file cannot be read.
    """
    records = [_parse(line) for line in path.read_text(errors="replace").splitlines()]
    if None in records[:-1]:
        raise UserError(f"{path}:{records.index(None) + 1} is damaged; repair that line or remove the file")
    return [record for record in records if record is not None]


def rewind(path: Path, step: int) -> None:
    """Drop the records after `step`: a run that went further continues from there. The file is replaced at once."""
    kept = [record for record in read(path) if record["step"] <= step] if path.exists() else []
    aside = path.with_name(f"{path.name}.writing")
    aside.write_text("".join(json.dumps(record) + "\n" for record in kept))
    aside.replace(path)


def _parse(line: str) -> dict[str, Any] | None:
    """A line's record, or None if it is damaged."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"kind", "step"} <= record.keys() else None
