"""Logical checkpoints: exact over any change of topology, complete or absent, and clear about damage."""

import json
import os
import random
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from occult_train.checkpoint import state, store
from occult_train.checkpoint.logical import KINDS, key, logical_tensors
from occult_train.checkpoint.shards import ShardWriter, read_entry
from occult_train.config import Config, load, to_yaml
from occult_train.engine import build_engine, learning_rate, set_learning_rate
from occult_train.errors import CheckpointError
from occult_train.moe.placement import Placement, to_json
from occult_train.parallel import zero
from occult_train.parallel.grid import Grid
from occult_train.testing import run_distributed

SMALL = [
    "model.vocab_size=64",
    "model.hidden_size=32",
    "model.intermediate_size=16",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_experts=8",
    "model.num_experts_per_tok=3",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
    "train.gradient_clipping=0.5",
    "train.precision=fp32",
    "deepspeed.zero_optimization.stage3_param_persistence_threshold=40",  # else a model this small stays whole
    "data.sequence_length=16",
    "scheduler.warmup_steps=0",
    "moe.balance=bias",
]


def start(overrides: list[str]) -> tuple[Config, Grid, Any]:
    config = load(SMALL + overrides)
    grid = Grid.create(config.parallel.expert)
    return config, grid, build_engine(config, grid)


def train(config: Config, grid: Grid, engine: Any, steps: range) -> list[float]:
    """Losses of optimizer steps on tokens that depend on the step alone."""
    losses = []
    for step in steps:
        tokens = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(step))
        set_learning_rate(engine, learning_rate(config, step))
        engine.module.train()
        total, accumulation = torch.zeros(()), config.accumulation_steps(grid.world_size)
        for part in range(accumulation):
            row = tokens[part * grid.world_size + grid.rank][None]
            loss = engine(row, row)
            total += engine.module.last_losses.cross_entropy.float()
            engine.backward(loss)
            if config.zero.stage == 0 and engine.is_gradient_accumulation_boundary():
                zero.clip_stage_0(engine, grid, config.train.gradient_clipping)
            engine.step()
        engine.module.finish_step()
        dist.all_reduce(total)
        losses.append(float(total) / accumulation / grid.world_size)
    return losses


def everything(engine: Any, grid: Grid) -> dict[str, torch.Tensor]:
    """All logical tensors of all ranks, and the balancing biases."""
    own = {}
    zero.make_states(engine)
    for tensor in logical_tensors(engine.module, grid):
        for kind in KINDS:
            value = zero.get_full(engine, tensor.parameter, kind).clone()
            parts = value if tensor.expert else [value]
            own |= {key(kind, piece): part.clone() for piece, part in zip(tensor.pieces, parts, strict=True)}
    for index, layer in engine.module.moe_layers().items():
        own[f"bias.{index}"] = layer.router.expert_bias.clone()
    ranks: list[Any] = [None] * grid.world_size
    dist.all_gather_object(ranks, own)
    return {name: tensor for part in ranks for name, tensor in part.items()}


def first_half(_rank: int, overrides: list[str], root: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    config, grid, engine = start(overrides)
    train(config, grid, engine, range(3))
    state.save(engine, grid, Path(root), 3, {"consumed_samples": 12}, to_yaml(config), keep=2)
    return everything(engine, grid), train(config, grid, engine, range(3, 6))


def second_half(_rank: int, variants: list[list[str]], root: str) -> list[tuple[dict[str, torch.Tensor], list[float]]]:
    results = []
    for overrides in variants:
        config, grid, engine = start(overrides)
        state.load(engine, grid, store.open_checkpoint(Path(root)))
        results.append((everything(engine, grid), train(config, grid, engine, range(3, 6))))
    return results


@pytest.fixture(scope="module")
def permuted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A placement file with another permutation in each layer."""
    rng, placements = random.Random(3), {}
    for layer in range(2):
        slots = list(range(8))
        rng.shuffle(slots)
        placements[layer] = Placement(tuple(slots))
    path = tmp_path_factory.mktemp("placement") / "placement.json"
    path.write_text(to_json(placements))
    return f"moe.placement={path}"


def test_reshard_is_exact(tmp_path: Path, permuted: str) -> None:
    saved = {}
    for stage, extra in ((1, []), (3, [permuted])):
        root = str(tmp_path / str(stage))
        overrides = [f"zero.stage={stage}", "parallel.expert=2", *extra]
        saved[stage] = (root, *run_distributed(first_half, 2, overrides, root, timeout=240)[0])
    targets = {
        1: [["zero.stage=0"]],
        2: [
            ["zero.stage=3", "parallel.expert=2"],
            ["zero.stage=1", "parallel.expert=2", permuted],
            ["zero.stage=2", "parallel.expert=1"],
            ["zero.stage=0", "parallel.expert=2"],
        ],
        4: [["zero.stage=3", "parallel.expert=4", permuted], ["zero.stage=1", "parallel.expert=2"]],
    }
    for stage, (root, tensors, losses) in saved.items():
        assert tensors["bias.0"].abs().max() > 0
        for ranks, variants in targets.items():
            results = run_distributed(second_half, ranks, variants, root, timeout=240)[0]
            for overrides, (found, later) in zip(variants, results, strict=True):
                case = f"stage {stage} to {ranks} ranks, {overrides}"
                assert found.keys() == tensors.keys(), case
                for name, tensor in tensors.items():
                    assert torch.equal(found[name], tensor), f"{case}: {name}"
                for got, expected in zip(later, losses, strict=True):
                    assert abs(got - expected) <= 1e-5 * expected, f"{case}: {later} against {losses}"


def test_precision_changes_keep_masters(tmp_path: Path) -> None:
    root = str(tmp_path)
    overrides = ["zero.stage=1", "parallel.expert=2", "train.precision=bf16"]
    tensors, _ = run_distributed(first_half, 2, overrides, root, timeout=240)[0]
    variants = [
        ["zero.stage=1", "parallel.expert=2", "train.precision=fp32"],
        ["zero.stage=3", "parallel.expert=2", "train.precision=bf16"],
        ["zero.stage=2", "parallel.expert=1", "train.precision=bf16"],
    ]
    for found, _ in run_distributed(second_half, 2, variants, root, timeout=240)[0]:
        for name, tensor in tensors.items():
            assert torch.equal(found[name], tensor), name


def save_and_die(_rank: int, root: str, point: str) -> None:
    """Save step 1 whole, then die in the middle of saving step 2."""
    config, grid, engine = start(["parallel.expert=2"])
    train(config, grid, engine, range(1))
    state.save(engine, grid, Path(root), 1, {"consumed_samples": 4}, to_yaml(config), keep=1)
    train(config, grid, engine, range(1, 2))

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if point == "first shard" and grid.rank == 1:
        ShardWriter.write = die  # type: ignore[method-assign]
    elif point == "middle of shards" and grid.rank == 0:
        written, write = [], ShardWriter.write

        def third(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
            written.append(name)
            die() if len(written) == 3 else write(self, name, tensor)

        ShardWriter.write = third  # type: ignore[method-assign]
    elif point == "before rename":
        store.write_durably = die  # type: ignore[assignment]
    elif point == "before latest":
        durably = store.write_durably
        store.write_durably = lambda p, t: die() if p.name == "latest" else durably(p, t)  # type: ignore[assignment]
    elif point == "before removal":
        shutil.rmtree = die  # type: ignore[assignment]
    state.save(engine, grid, Path(root), 2, {"consumed_samples": 8}, to_yaml(config), keep=1)


@pytest.mark.parametrize(
    ("point", "step"),
    [
        ("first shard", 1),
        ("middle of shards", 1),
        ("before rename", 1),
        ("before latest", 1),
        ("before removal", 2),
    ],
)
def test_killed_while_saving(tmp_path: Path, point: str, step: int) -> None:
    with pytest.raises(RuntimeError, match="rank"):
        run_distributed(save_and_die, 2, str(tmp_path), point, timeout=120)
    checkpoint = store.open_checkpoint(tmp_path)
    assert checkpoint.step == step
    for name in checkpoint.entries:
        checkpoint.read(name)
    store.begin(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.glob("*.partial")) == ["step-00000003.partial"], "remains are removed"


def disk_full(rank: int, root: str) -> str:
    config, grid, engine = start(["parallel.expert=2"])
    state.save(engine, grid, Path(root), 1, {}, to_yaml(config), keep=2)
    if rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        state.save(engine, grid, Path(root), 2, {}, to_yaml(config), keep=2)
    except CheckpointError as error:
        return str(error)
    return ""


def test_full_disk_fails_on_all_ranks_and_keeps_the_last(tmp_path: Path) -> None:
    messages = run_distributed(disk_full, 2, str(tmp_path), timeout=120)
    for message in messages:
        assert "rank 1: File too large" in message
        assert "step-00000001" in message
    assert store.open_checkpoint(tmp_path).step == 1


# ------------------------------------------------------------------------------------------ files, in one process


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


def test_killed_between_moving_the_old_one_aside_and_taking_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tmp_path, 5, keep=1)
    rename, renamed = Path.rename, []

    def dies_second(self: Path, target: Path) -> Path:
        if self.name.startswith("step-"):
            renamed.append(self)
            if len(renamed) == 2:
                raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", dies_second)
    with pytest.raises(KeyboardInterrupt):
        fake(tmp_path, 5, keep=1)
    monkeypatch.undo()
    assert not (tmp_path / "step-00000005").exists()
    assert store.open_checkpoint(tmp_path).read("a").shape == (3, 5)
    fake(tmp_path, 6, keep=1)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000006"]


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
    store.commit(root, 1, {"state": {"step": 1}, "tensors": tensors, "files": {}}, 0)
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
