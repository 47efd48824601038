"""The folder of checkpoints, in one process: complete or absent, old ones removed, damage named."""

import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from running import SMALL

from occult_train.checkpoint import state, store
from occult_train.checkpoint.logical import logical_tensors
from occult_train.checkpoint.shards import ShardWriter, read_entry
from occult_train.config import load
from occult_train.errors import CheckpointError
from occult_train.parallel.grid import Grid


def fake(root: Path, step: int, keep: int = 0) -> Path:
    """A complete checkpoint of two tensors."""
    folder = store.begin(root, step)
    writer = ShardWriter(folder / "model-00000.safetensors", {"a": (3, 5), "b": (0, 2)})
    writer.write("a", torch.arange(15.0).view(3, 5) + step)
    writer.write("b", torch.zeros(0, 2))
    writer.close()
    (folder / "config.yaml").write_text("{}")
    files = {p.name: p.stat().st_size for p in folder.iterdir()}
    tensors = {name: entry.to_json() for name, entry in writer.entries.items()}
    return store.commit(root, step, {"state": {"step": step}, "tensors": tensors, "files": files}, keep)


def test_shard_is_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = fake(tmp_path, 7)
    loaded = load_file(folder / "model-00000.safetensors")
    assert torch.equal(loaded["a"], torch.arange(15.0).view(3, 5) + 7)
    assert loaded["b"].shape == (0, 2)
    checkpoint = store.open_checkpoint(tmp_path)
    assert torch.equal(checkpoint.read("a"), loaded["a"])
    assert checkpoint.read("b").shape == (0, 2)


def test_retention_and_latest(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        fake(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000015", "step-00000020"]
    assert store.find_latest(tmp_path) == tmp_path / "step-00000020"
    fake(tmp_path, 17, keep=2)  # a run that went back keeps what it wrote
    assert store.find_latest(tmp_path) == tmp_path / "step-00000017"
    assert (tmp_path / "step-00000017").exists()
    fake(tmp_path, 17, keep=0)
    assert store.open_checkpoint(tmp_path).step == 17
    fake(tmp_path, 30, keep=1)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000030"]


def dies_at(operation: int, root: Path, step: int, keep: int) -> bool:
    """Save in another process that dies before so many operations on files, nothing flushed. False if it lived."""
    pid = os.fork()
    if pid == 0:
        left = [operation]

        def count(event: str, _arguments: object) -> None:
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir"):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)

        sys.addaudithook(count)
        fake(root, step, keep)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


@pytest.mark.parametrize("step", [7, 6], ids=["next step", "same step again"])
def test_killed_before_any_operation_on_files(tmp_path: Path, step: int) -> None:
    """What was there loads, or what was being written; all that passes for whole is whole; the next save cleans up."""
    for operation in itertools.count(1):
        root = tmp_path / str(operation)
        fake(root, 5, keep=2)
        fake(root, 6, keep=2)
        died = dies_at(operation, root, step, keep=1)
        newest = store.open_checkpoint(root)
        assert newest.step in ((6, step) if died else (step,))
        if step == 7:
            named = root / (root / "latest").read_text().strip()
            assert store.open_checkpoint(named).step == newest.step, "`latest` is written last"
        for folder in store._complete(root):
            checkpoint = store.open_checkpoint(folder)
            assert torch.equal(checkpoint.read("a"), torch.arange(15.0).view(3, 5) + checkpoint.step)
        fake(root, 8, keep=1)
        assert sorted(p.name for p in root.iterdir()) == ["latest", "step-00000008"]
        if not died:
            break
    assert operation > 15


def test_latest_that_points_nowhere_falls_back(tmp_path: Path) -> None:
    fake(tmp_path, 5)
    fake(tmp_path, 6)
    shutil.rmtree(tmp_path / "step-00000006")
    assert store.open_checkpoint(tmp_path).step == 5


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("flip", "a in model-00000.safetensors is damaged"),
        ("truncate", "model-00000.safetensors has 100 bytes in place of"),
        ("remove", "model-00000.safetensors is missing"),
        ("manifest", "checkpoint.json cannot be understood"),
        ("manifest value", "the checksum of checkpoint.json does not match"),
        ("config", "the checksum of config.yaml does not match"),
        ("no manifest", "incomplete or empty"),
        ("foreign", "not of occult_train"),
        ("version", "version 99"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: str, message: str) -> None:
    folder = fake(tmp_path / "x", 5)
    shard, manifest = folder / "model-00000.safetensors", folder / store.MANIFEST
    if damage == "flip":
        raw = bytearray(shard.read_bytes())
        raw[-10] ^= 1
        shard.write_bytes(raw)
    elif damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:100])
    elif damage == "remove":
        shard.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:50])
    elif damage == "manifest value":
        manifest.write_text(manifest.read_text().replace('"step": 5', '"step": 4'))
    elif damage == "config":
        (folder / "config.yaml").write_text("[]")
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "foreign":
        manifest.unlink()
        (folder / "zero_to_fp32.py").write_text("")
    elif damage == "version":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 99}))
    with pytest.raises(CheckpointError, match=message.replace(".", r"\.")) as caught:
        store.open_checkpoint(folder).read("a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("partitioned", [False, True])
def test_dense_tensors_are_spread_over_the_ranks_by_size(partitioned: bool) -> None:
    """At ZeRO-3 nothing but the shape tells a parameter's size."""
    model = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(size)) for size in (100, 40, 30, 30, 5))
    for parameter in model if partitioned else ():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    written = [[t.pieces[0] for t in logical_tensors(model, Grid(r, 2)) if t.writes[0]] for r in range(2)]
    assert written == [["0", "4"], ["1", "2", "3"]]


def test_another_model_is_refused(tmp_path: Path) -> None:
    def build(*overrides: str) -> list[Any]:
        from occult_train.models.gpt import GPT

        return logical_tensors(GPT(load([*SMALL, *overrides]).model), Grid())

    root = tmp_path / "root"
    folder = store.begin(root, 1)
    logical = build()
    shapes = {piece: tensor.shape for tensor in logical for piece in tensor.pieces}
    writer = ShardWriter(folder / "model-00000.safetensors", shapes)
    for name, shape in shapes.items():
        writer.write(name, torch.zeros(shape))
    writer.close()
    tensors = {n: e.to_json() for n, e in writer.entries.items()}
    files = {writer.path.name: writer.path.stat().st_size}
    store.commit(root, 1, {"state": {"step": 1}, "tensors": tensors, "files": files}, 0)
    checkpoint = store.open_checkpoint(root)
    state.check_fits(checkpoint, logical, ("param",))
    for override, message in (
        ("model.hidden_size=64", "has shape"),
        ("model.num_hidden_layers=3", "it has no layers.2"),
        ("model.num_hidden_layers=1", "this one has no layers.1"),
        ("model.qk_norm=none", "this one has no layers.0.attention.q_norm"),
        ("model.num_experts=16", "has shape"),
    ):
        with pytest.raises(CheckpointError, match=message):
            state.check_fits(checkpoint, build(override), ("param",))


def test_read_entry_checks_bytes(tmp_path: Path) -> None:
    folder = fake(tmp_path, 1)
    entry = store.open_checkpoint(tmp_path).entries["a"]
    assert read_entry(folder, "a", entry).shape == (3, 5)
    (folder / entry.file).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_entry(folder, "a", entry)
