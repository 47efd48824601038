"""The placement that a checkpoint records: applied whole or not at all, and continued with unless another is new."""

import itertools
import os
import sys
from pathlib import Path

import pytest
import torch

from occult_train.checkpoint import placing, store
from occult_train.checkpoint.shards import ShardWriter
from occult_train.checkpoint.store import Checkpoint
from occult_train.errors import CheckpointError, PlacementError
from occult_train.moe.placement import Placement, to_table

CONTIGUOUS = {0: Placement((0, 1, 2, 3)), 2: Placement((0, 1, 2, 3))}
OTHER = {0: Placement((3, 1, 2, 0)), 2: Placement((1, 0, 3, 2))}
THIRD = {0: Placement((2, 3, 0, 1)), 2: Placement((2, 1, 3, 0))}


def fake(root: Path, **state: object) -> Path:
    """A checkpoint of a model with 4 experts in layers 0 and 2."""
    folder = store.begin(root / "checkpoints", 5)
    shapes = {f"layers.{layer}.moe.router.weight": (4, 2) for layer in (0, 2)} | {"layers.1.mlp.w1.weight": (3, 2)}
    writer = ShardWriter(folder / "model-00000.safetensors", shapes)
    for name, shape in shapes.items():
        writer.write(name, torch.ones(shape))
    writer.close()
    (folder / "config.yaml").write_text("{}")
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    tensors = {name: entry.to_json() for name, entry in writer.entries.items()}
    common = {"step": 5, "placement": to_table(CONTIGUOUS)}
    manifest = {"state": common | state, "tensors": tensors, "files": files}
    return store.commit(root / "checkpoints", 5, manifest, 0)


def test_applied_to_a_run_or_a_checkpoint(tmp_path: Path) -> None:
    folder = fake(tmp_path, learned={"a": [0.1, None]})
    placing.apply(tmp_path, OTHER)
    assert placing.recorded(store.open_checkpoint(folder)) == OTHER
    placing.apply(folder, {2: THIRD[2]})
    checkpoint = store.open_checkpoint(tmp_path)
    assert placing.recorded(checkpoint) == {0: OTHER[0], 2: THIRD[2]}
    assert checkpoint.state["learned"] == {"a": [0.1, None]}
    for name in checkpoint.entries:
        checkpoint.read(name)
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint.json", "config.yaml", "model-00000.safetensors"]


def test_a_checkpoint_without_a_placement_gets_one(tmp_path: Path) -> None:
    placing.apply(fake(tmp_path, placement={}), {2: THIRD[2]})
    assert placing.recorded(store.open_checkpoint(tmp_path)) == {0: CONTIGUOUS[0], 2: THIRD[2]}


@pytest.mark.parametrize(
    ("placements", "message"),
    [
        ({0: OTHER[0], 1: OTHER[0]}, r"the placement names layer 1, checkpoint \S+ has experts in \[0, 2\]"),
        ({0: Placement.contiguous(8)}, r"the placement of layer 0 is of 8 experts, checkpoint \S+ has 4 there"),
    ],
)
def test_another_model_s_placement_is_refused(tmp_path: Path, placements: dict[int, Placement], message: str) -> None:
    before = (fake(tmp_path) / store.MANIFEST).read_bytes()
    with pytest.raises(PlacementError, match=f"^{message}$"):
        placing.apply(tmp_path, placements)
    assert (store.open_checkpoint(tmp_path).folder / store.MANIFEST).read_bytes() == before


def test_what_is_no_whole_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        placing.apply(tmp_path / "nowhere", OTHER)
    manifest = fake(tmp_path) / store.MANIFEST
    manifest.write_text(manifest.read_text().replace('"step": 5', '"step": 6'))
    with pytest.raises(CheckpointError, match=r"the checksum of checkpoint\.json does not match"):
        placing.apply(tmp_path, OTHER)


def dies_at(operation: int, folder: Path) -> bool:
    """Apply in another process that dies before so many operations on files. False if it lived."""
    pid = os.fork()
    if pid == 0:
        left = [operation]

        def count(event: str, _arguments: object) -> None:
            if event in ("open", "os.mkdir", "os.rename", "os.remove"):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)

        sys.addaudithook(count)
        placing.apply(folder, OTHER)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def test_killed_while_it_is_applied(tmp_path: Path) -> None:
    """The old placement or the new one, in a whole checkpoint."""
    seen = []
    for operation in itertools.count(1):
        root = tmp_path / str(operation)
        folder = fake(root)
        died = dies_at(operation, folder)
        seen.append(placing.recorded(store.open_checkpoint(root)))
        placing.apply(folder, THIRD)
        assert placing.recorded(store.open_checkpoint(root)) == THIRD
        if not died:
            break
    assert operation > 5
    assert seen[0] == CONTIGUOUS
    assert seen[-1] == OTHER
    assert all(found in (CONTIGUOUS, OTHER) for found in seen)


def opened(tmp_path: Path, placement: dict[int, Placement], setting: str, meant: dict[int, Placement]) -> Checkpoint:
    """Of a run that was last started with a setting, and has its experts elsewhere by now."""
    return store.open_checkpoint(fake(tmp_path, placement=to_table(placement), **placing.given(setting, meant)))


@pytest.mark.parametrize(
    ("setting", "meant", "then", "wins"),
    [
        ("auto", CONTIGUOUS, ("auto", CONTIGUOUS), OTHER),
        ("auto", CONTIGUOUS, ("file.json", THIRD), OTHER),
        ("contiguous", CONTIGUOUS, ("contiguous", CONTIGUOUS), OTHER),
        ("contiguous", CONTIGUOUS, ("auto", CONTIGUOUS), CONTIGUOUS),
        ("file.json", THIRD, ("file.json", THIRD), OTHER),
        ("file.json", THIRD, ("file.json", CONTIGUOUS), THIRD),
        ("file.json", THIRD, ("before.json", THIRD), THIRD),
        ("file.json", THIRD, ("auto", CONTIGUOUS), THIRD),
    ],
)
def test_which_placement_a_run_continues_with(
    tmp_path: Path,
    setting: str,
    meant: dict[int, Placement],
    then: tuple[str, dict[int, Placement]],
    wins: dict[int, Placement],
) -> None:
    assert placing.continued(setting, meant, opened(tmp_path, OTHER, *then)) == wins


def test_checkpoints_that_say_less(tmp_path: Path) -> None:
    """Of an earlier version, which does not say what its run was started with, and of an import, without placement."""
    old = store.open_checkpoint(fake(tmp_path / "old", placement=to_table(OTHER)))
    assert placing.continued("auto", CONTIGUOUS, old) == OTHER
    assert placing.continued("contiguous", CONTIGUOUS, old) == CONTIGUOUS
    bare = store.open_checkpoint(fake(tmp_path / "bare", placement={}))
    assert placing.continued("auto", CONTIGUOUS, bare) == CONTIGUOUS
    assert placing.continued("file.json", THIRD, bare) == THIRD


def test_another_model_s_record_is_left_to_loading(tmp_path: Path) -> None:
    eight = {0: Placement.contiguous(8)}
    assert placing.continued("auto", eight, store.open_checkpoint(fake(tmp_path))) == eight
