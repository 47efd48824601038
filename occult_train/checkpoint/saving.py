"""Writing a checkpoint while training goes on.

1. `begin` makes the folder. Collective.
2. The main threads gather a few parameters at a time and copy what their rank writes into blocks of host memory.
3. A thread of each rank writes its blocks to its two files and makes them durable, training or not.
4. It says over the job's store what it has written, or why not. Rank 0's thread completes the checkpoint once it has
   heard all ranks, or removes it, and says which. No thread takes part in a collective.
5. The main threads ask how it went when they like (`done`), or wait for it (`wait`).
"""

import contextlib
import json
import os
import queue
import secrets
import shutil
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from occult_train.checkpoint import store
from occult_train.checkpoint.blocks import Block, Blocks, Copier
from occult_train.checkpoint.gathering import gather_pieces
from occult_train.checkpoint.logical import KINDS, Logical, key, logical_tensors
from occult_train.checkpoint.shards import ShardWriter
from occult_train.errors import CheckpointError
from occult_train.parallel import zero
from occult_train.parallel.grid import Grid

PATIENCE = timedelta(days=7)
"""For other ranks' disks. A rank that is gone is not waited for: the job ends."""
LOWEST_PRIORITY = 19


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds beside tensors, as of the moment of saving."""

    state: dict[str, Any]
    config_yaml: str
    files: Mapping[str, bytes]
    """Further files of this rank, by name."""
    keep: int
    """Complete checkpoints to keep, 0 for all."""


def begin(engine: Any, grid: Grid, root: Path, step: int, contents: Contents, blocks: Blocks, yields: bool) -> "Saving":
    """Copy a checkpoint of the engine and begin to write it. Collective. One at a time.

    Args:
        step: optimizer steps taken.
        blocks: to copy into. Where they do not take all, this waits until the rest has been written.
        yields: whether writing gives way to whatever else runs on the host.

    Raises:
        CheckpointError: on every rank if the folder cannot be made.
    """
    logical = logical_tensors(engine.module, grid)
    size = sum(tensor.nbytes_of_all_ranks for tensor in logical)
    said: list[Any] = [_begin_folder(root, step), secrets.token_hex(4)] if grid.rank == 0 else [None, None]
    dist.broadcast_object_list(said)
    error, token = said
    if error:
        raise CheckpointError(_cannot_be_written(root, f"rank 0: {error}", size))
    folder = store.partial_folder(root, step)
    writers = {
        "model": ShardWriter(folder / f"model-{grid.rank:05d}.safetensors", _shapes(logical, KINDS[:1])),
        "optimizer": ShardWriter(folder / f"optimizer-{grid.rank:05d}.safetensors", _shapes(logical, KINDS[1:])),
    }
    saving = Saving(grid, root, step, size, token, list(writers.values()), contents, blocks, yields)
    zero.make_states(engine)
    for tensor, kind, number, value in gather_pieces(engine, grid, logical):
        saving.copier.put(writers["model" if kind == "param" else "optimizer"], key(kind, tensor.pieces[number]), value)
    saving.copier.finish()
    return saving


def _begin_folder(root: Path, step: int) -> str:
    """Empty if it went well."""
    try:
        store.begin(root, step)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _shapes(logical: list[Logical], kinds: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    return {
        key(kind, piece): tensor.shape
        for tensor in logical
        for kind in kinds
        if kind in tensor.kinds
        for piece, mine in zip(tensor.pieces, tensor.writes, strict=True)
        if mine
    }


def _cannot_be_written(root: Path, why: str, size: int) -> str:
    """The message of a failed save; what it left behind is removed."""
    store.remove_partial(root)
    with contextlib.suppress(OSError):  # not even the folder could be made
        why += f"; it has {size:,} bytes, {shutil.disk_usage(root).free:,} are free"
    kept = store.find_latest(root)
    kept_text = f"the last complete checkpoint is {kept}" if kept else "there is no earlier checkpoint"
    return f"a checkpoint cannot be written to {root}: {why}; {kept_text}"


class Saving(threading.Thread):
    """This rank's part of a checkpoint on its way to the disk.

    Args:
        size: bytes of all ranks' tensors.
        token: of this save, the same on all ranks and of no other one.
        writers: of this rank's files.
        blocks: are given back when written.
        yields: as of `begin`.
    """

    def __init__(
        self,
        grid: Grid,
        root: Path,
        step: int,
        size: int,
        token: str,
        writers: list[ShardWriter],
        contents: Contents,
        blocks: Blocks,
        yields: bool,
    ) -> None:
        super().__init__(name="occult-saving", daemon=True)
        self.step, self.folder = step, root / f"step-{step:08d}"
        self._grid, self._root, self._size, self._token, self._writers = grid, root, size, token, writers
        self._contents, self._blocks, self._yields = contents, blocks, yields
        self._full: queue.SimpleQueue[Block | None] = queue.SimpleQueue()
        self.copier = Copier(blocks, self._full, self.start)
        self._store = dist.distributed_c10d._get_default_store().clone()  # a thread's own, that no other waits for
        self._failure: BaseException | None = None
        self._message = ""

    @property
    def nbytes(self) -> int:
        """Of this rank's files of tensors."""
        return sum(writer.nbytes for writer in self._writers)

    def done(self) -> bool:
        """Whether the checkpoint is complete. Ranks may hear of it at different times.

        Raises:
            CheckpointError: some rank could not write. Earlier checkpoints are untouched.
        """
        if self.is_alive():
            return False
        if self._message and isinstance(self._failure, OSError | None):
            raise CheckpointError(self._message)
        if self._failure is not None:
            raise self._failure
        return True

    def wait(self) -> Path:
        """Wait until all ranks' parts are written, and return the folder of the complete checkpoint.

        Raises:
            CheckpointError: on every rank if any rank could not write. Earlier checkpoints are untouched.
        """
        self.join()
        self.done()
        return self.folder

    # ---------------------------------------------------------------- the thread

    def run(self) -> None:
        """Write, and agree with the other ranks' threads."""
        if self._yields and sys.platform == "linux":  # where a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        self._guarded(self._write_shards)
        self._guarded(self._write_files)
        try:
            self._agree()
        except RuntimeError as error:  # the store's: rank 0 is gone
            self._failure = self._failure or error

    def _guarded(self, action: Any) -> None:
        """Run it unless something failed before."""
        try:
            if self._failure is None:
                action()
        except BaseException as error:  # whatever it is, the main thread raises it
            self._failure = error

    def _write_shards(self) -> None:
        """The blocks come back even when nothing can be written any more: the main thread may wait for them."""
        while (block := self._full.get()) is not None:
            self._guarded(block.write)
            self._blocks.give(block)
        for writer in self._writers:
            self._guarded(writer.close)
            writer.abandon()

    def _write_files(self) -> None:
        folder = store.partial_folder(self._root, self.step)
        for name, content in self._contents.files.items():
            (folder / name).write_bytes(content)

    def _agree(self) -> None:
        said: dict[str, Any] = {"tensors": {n: e.to_json() for w in self._writers for n, e in w.entries.items()}}
        if self._failure is not None:
            said = {"error": f"rank {self._grid.rank}: {_reason(self._failure)}"}
        if self._grid.rank:
            self._store.set(self._key(self._grid.rank), json.dumps(said))
            self._message = self._hear("end")
            return
        others = [json.loads(self._hear(rank)) for rank in range(1, self._grid.world_size)]
        self._message = self._complete([said, *others])
        self._store.set(self._key("end"), self._message)

    def _key(self, name: int | str) -> str:
        return f"occult/saving/{self._token}/{name}"

    def _hear(self, name: int | str) -> str:
        self._store.wait([self._key(name)], PATIENCE)
        return str(self._store.get(self._key(name)).decode())

    def _complete(self, ranks: list[dict[str, Any]]) -> str:
        """Make a checkpoint of all ranks' parts; the message to all of them, empty if it went well."""
        failed = [said["error"] for said in ranks if "error" in said]
        if not failed:
            self._guarded(lambda: self._commit([said["tensors"] for said in ranks]))
            failed = [f"rank 0: {_reason(self._failure)}"] if self._failure is not None else []
        return _cannot_be_written(self._root, failed[0], self._size) if failed else ""

    def _commit(self, parts: list[dict[str, Any]]) -> None:
        folder, contents = store.partial_folder(self._root, self.step), self._contents
        (folder / "config.yaml").write_text(contents.config_yaml)
        sizes = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
        # in an order that does not tell who wrote what, so that an export's files do not either
        tensors = dict(sorted((name, entry) for part in parts for name, entry in part.items()))
        manifest = {"state": contents.state, "tensors": tensors, "files": sizes}
        store.commit(self._root, self.step, manifest, contents.keep)


def _reason(failure: BaseException) -> str:
    return (failure.strerror if isinstance(failure, OSError) else None) or str(failure) or type(failure).__name__
