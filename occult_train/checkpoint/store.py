"""The folder of checkpoints: a checkpoint is complete or absent, `latest` names the newest, old ones are removed."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from occult_train.checkpoint.shards import Entry, read_entry
from occult_train.errors import CheckpointError
from occult_train.inside import inside

FORMAT = "occult-checkpoint"
VERSION = 2
MANIFEST = "checkpoint.json"
_STEP = re.compile(r"step-(\d{8,})$")


class Checkpoint:
    """A complete checkpoint, opened for reading."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.state: dict[str, Any] = manifest["state"]
        self.entries = {name: _entry(folder, name, e, manifest["files"]) for name, e in manifest["tensors"].items()}

    @property
    def step(self) -> int:
        """Optimizer steps taken when it was written."""
        return int(self.state["step"])

    @property
    def has_optimizer(self) -> bool:
        """Whether Adam's moments are there; an imported model has weights alone."""
        return any(name.startswith("exp_avg/") for name in self.entries)

    def read(self, name: str) -> Tensor:
        """One fp32 tensor, verified. Raises CheckpointError if it is damaged."""
        return read_entry(self.folder, name, self.entries[name])


class WeightsAlone(Checkpoint):
    """What a new run takes from another's checkpoint: weights, balancing bias and placement. It is before step 1."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.folder, self.taken_at = checkpoint.folder, checkpoint.step
        self.state = {"step": 0, "consumed_samples": 0}
        self.state |= {name: checkpoint.state.get(name, {}) for name in ("expert_bias", "placement")}
        self.entries = {name: entry for name, entry in checkpoint.entries.items() if "/" not in name}


def holds_checkpoint(path: Path) -> bool:
    """Whether `open_checkpoint` finds one to open."""
    return (path / MANIFEST).is_file() or (find_latest(path / "checkpoints") or find_latest(path)) is not None


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint folder, or the latest of a run's folder.

    Raises:
        CheckpointError: missing, incomplete, damaged, or not ours.
    """
    folder = path
    if not (folder / MANIFEST).is_file():
        newest = find_latest(path / "checkpoints") or find_latest(path)
        if newest is None:
            raise CheckpointError(_absent(path))
        folder = newest
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest.get("format") != FORMAT:
            raise CheckpointError(f"checkpoint {folder} is not of occult_train: its format is {manifest.get('format')}")
        if manifest["version"] != VERSION:
            raise CheckpointError(
                f"checkpoint {folder} has version {manifest['version']}, this program reads {VERSION}"
            )
        checkpoint = Checkpoint(folder, manifest)
        whole = manifest["sha256"] == _sha256(json.dumps(_body(manifest)))
        files, texts = manifest["files"], manifest["texts"]
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: {MANIFEST} cannot be understood ({error!r})") from None
    if not whole:
        raise CheckpointError(f"checkpoint {folder} is damaged: the checksum of {MANIFEST} does not match")
    _check_files(folder, files, texts)
    return checkpoint


def _entry(folder: Path, name: str, raw: dict[str, Any], files: dict[str, int]) -> Entry:
    """A tensor's place, which must lie in its file."""
    shape, offset = raw["shape"], raw["offset"]
    if any(type(number) is not int or number < 0 for number in (*shape, offset)):
        raise ValueError(f"{name} has shape {shape} at {offset}")
    entry = Entry(raw["file"], tuple(shape), offset, raw["sha256"])
    if offset + entry.nbytes > files[entry.file]:
        raise CheckpointError(
            f"checkpoint {folder} is damaged: {name} of shape {shape} does not fit into {entry.file}, "
            f"which has {files[entry.file]} bytes"
        )
    return entry


def _check_files(folder: Path, files: dict[str, int], texts: dict[str, str]) -> None:
    """Sizes of all files and checksums of the small ones; tensors have theirs verified when they are read."""
    for file in (*files, *texts):
        inside(folder, file, f"{folder}/{MANIFEST}", CheckpointError)
    for file, size in files.items():
        if not (folder / file).is_file():
            raise CheckpointError(f"checkpoint {folder} is incomplete: {file} is missing")
        if (folder / file).stat().st_size != size:
            found = (folder / file).stat().st_size
            raise CheckpointError(f"checkpoint {folder} is damaged: {file} has {found} bytes in place of {size}")
    for file, digest in texts.items():
        if _sha256((folder / file).read_text(errors="replace")) != digest:
            raise CheckpointError(f"checkpoint {folder} is damaged: the checksum of {file} does not match")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _absent(path: Path) -> str:
    if not path.exists():
        return f"checkpoint {path} does not exist"
    foreign = [n for n in ("latest", "zero_to_fp32.py", "pytorch_model.bin", "config.json") if (path / n).exists()]
    if foreign and not any(_STEP.match(p.name) for p in path.iterdir()):
        return f"checkpoint {path} is not of occult_train (found {foreign[0]})"
    return f"checkpoint {path} is incomplete or empty: there is no {MANIFEST}"


def find_latest(root: Path) -> Path | None:
    """The newest complete checkpoint under `root`: the one `latest` names, else the highest step; None if none."""
    try:
        named = (root / "latest").read_text().strip()
        if _STEP.match(named) and (root / named / MANIFEST).is_file():
            return root / named
    except (OSError, UnicodeDecodeError):
        pass
    complete = _complete(root)
    return complete[-1] if complete else None


def _complete(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if _STEP.match(p.name) and (p / MANIFEST).is_file()]
    # a save of the same step may have died between moving the old one aside and taking its place
    found += [p for p in root.glob("step-*.replaced") if root / p.stem not in found and (p / MANIFEST).is_file()]
    return sorted(found, key=lambda p: int(p.stem[5:]))


def partial_folder(root: Path, step: int) -> Path:
    """Where step's checkpoint is written before it is complete."""
    return root / f"step-{step:08d}.partial"


def remove_partial(root: Path) -> None:
    """Remove what interrupted saves left behind."""
    replaced = [p for p in root.glob("step-*.replaced") if (root / p.stem / MANIFEST).is_file()]
    for stale in [*root.glob("step-*.partial"), *replaced]:
        shutil.rmtree(stale, ignore_errors=True)


def begin(root: Path, step: int) -> Path:
    """Make an empty partial folder; called by one rank. Remains of interrupted saves are removed."""
    root.mkdir(parents=True, exist_ok=True)
    remove_partial(root)
    folder = partial_folder(root, step)
    folder.mkdir()
    return folder


def commit(root: Path, step: int, manifest: dict[str, Any], keep: int) -> Path:
    """Complete the partial folder: manifest, rename, `latest`, then remove old ones. Called by one rank.

    Args:
        manifest: `state`, `tensors` and `files` of `checkpoint.json`.
        keep: complete checkpoints to keep, 0 for all.
    """
    partial, final = partial_folder(root, step), root / f"step-{step:08d}"
    body = manifest | {"texts": {p.name: _sha256(p.read_text()) for p in sorted(partial.glob("*.yaml"))}}
    write_durably(partial / MANIFEST, _manifest(body))
    if final.exists():  # the run went back to an older checkpoint and came by again
        final.rename(root / f"{final.name}.replaced")
    partial.rename(final)
    _sync(root)
    write_durably(root / "latest", final.name + "\n")
    shutil.rmtree(root / f"{final.name}.replaced", ignore_errors=True)
    for old in [p for p in _complete(root) if p != final][: -(keep - 1) or None] if keep else []:
        # under a name that nobody takes for a whole one, should this be its last moment
        shutil.rmtree(old.rename(root / f"{old.name}.partial"))
    return final


def change_state(checkpoint: Checkpoint, changes: dict[str, Any]) -> None:
    """Set entries of a complete checkpoint's state. It is the old or the new one at every moment.

    Raises:
        CheckpointError: the disk does not take it; the checkpoint is as it was.
    """
    path = checkpoint.folder / MANIFEST
    try:
        body = _body(json.loads(path.read_text()))
        write_durably(path, _manifest(body | {"state": body["state"] | changes}))
    except OSError as error:
        text = f"checkpoint {checkpoint.folder} cannot be changed: {error.strerror or error}"
        raise CheckpointError(text) from None


def _manifest(body: dict[str, Any]) -> str:
    """The text of `checkpoint.json`."""
    head = {"format": FORMAT, "version": VERSION, "sha256": _sha256(json.dumps(body))}
    return json.dumps(head | body)


def _body(manifest: dict[str, Any]) -> dict[str, Any]:
    """What `_manifest` was given."""
    return {name: manifest[name] for name in manifest if name not in ("format", "version", "sha256")}


def write_durably(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    aside = path.with_name(path.name + ".writing")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
