"""Files that another file names, such as an index its shards: they lie in the folder of that file, or are refused."""

from pathlib import Path
from typing import Any

from occult_train.errors import UserError


def inside(folder: Path, name: Any, named_by: str, error: type[UserError]) -> Path:
    """The path of a file of a folder.

    Args:
        name: of the file, without folders, as found in a file that somebody else may have made.
        named_by: that file, for the message.
        error: what is raised.

    Raises:
        UserError: (an `error`) it is no plain name, or a link that leaves the folder. Links of Hugging Face's cache,
            from a snapshot to the blobs beside it, do not count as leaving.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise error(f"{named_by} names {name!r}, which is not the name of a file beside it")
    path, home = folder / name, folder.resolve()
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # links in a circle
        raise error(f"{path}, which {named_by} names, is a link to nothing") from None
    if target.parent not in homes:
        raise error(f"{path}, which {named_by} names, is a link out of its folder, to {target}; put the file there")
    return path
