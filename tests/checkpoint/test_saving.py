"""Checkpoints that are written while training goes on: those of the moment of saving, byte for byte."""

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from running import everything, start, status, train

from occult_train.checkpoint import state, store
from occult_train.checkpoint.blocks import Blocks
from occult_train.checkpoint.shards import ShardWriter
from occult_train.config import to_yaml
from occult_train.parallel import zero
from occult_train.testing import RankError, requires_gpus, run_distributed

ROOM = 64 << 20


def held_back() -> threading.Event:
    """Nothing is written to any shard until it is set."""
    go, append = threading.Event(), ShardWriter.append

    def later(self: ShardWriter, name: str, data: memoryview) -> None:
        go.wait()
        append(self, name, data)

    ShardWriter.append = later  # type: ignore[method-assign]
    return go


def save_beside_training(_rank: int, variants: list[list[str]], root: str) -> list[tuple[Any, ...]]:
    """Of each variant: whether it was complete before anything was written, the losses after the save, and those of a
    run that continues from it. `saved` was waited for, `beside` is of the same moment and was written two steps later.
    """
    results = []
    for number, overrides in enumerate(variants):
        config, grid, engine = start(overrides)
        folder = Path(root, str(number))
        train(config, grid, engine, range(2))
        given = (2, {"consumed_samples": 8}, to_yaml(config), 1, {f"mine-{grid.rank}": b"x"})
        state.save(engine, grid, folder / "saved", *given)
        append, blocks = ShardWriter.append, Blocks(ROOM)
        go = held_back()
        saving = state.begin_save(engine, grid, folder / "beside", *given, blocks)
        losses = train(config, grid, engine, range(2, 4))
        early = saving.done()
        go.set()
        ShardWriter.append = append  # type: ignore[method-assign]
        saving.wait()
        losses += train(config, grid, engine, range(4, 5))
        config, grid, engine = start(overrides)
        state.load(engine, grid, store.open_checkpoint(folder / "beside"))
        results.append((early, losses, train(config, grid, engine, range(2, 5))))
    return results


def check_saves_beside_training(root: Path, ranks: int, variants: list[list[str]], backend: str = "gloo") -> None:
    found = run_distributed(save_beside_training, ranks, variants, str(root), timeout=400, backend=backend)
    for number, (early, losses, resumed) in enumerate(found[0]):
        assert not early, variants[number]
        assert resumed == losses, variants[number]
        saved, beside = ({p.name: p.read_bytes() for p in path.iterdir()} for path in folders(root / str(number)))
        assert len(saved) == 2 + 3 * ranks
        assert beside == saved, variants[number]


def folders(root: Path) -> list[Path]:
    return [root / name / "step-00000002" for name in ("saved", "beside")]


VARIANTS = [[f"zero.stage={stage}", f"parallel.expert={expert}"] for stage in range(4) for expert in (1, 2)]
VARIANTS += [[f"zero.stage={stage}", "parallel.expert=2", "train.precision=bf16"] for stage in (1, 2, 3)]
VARIANTS += [["zero.stage=2", "parallel.expert=1", "train.precision=bf16", "train.trainable=moe"]]


def test_a_save_beside_training_is_the_one_that_was_waited_for(tmp_path: Path) -> None:
    check_saves_beside_training(tmp_path, 2, VARIANTS)


def test_where_experts_have_several_holders_on_one_of_two_shares(tmp_path: Path) -> None:
    check_saves_beside_training(tmp_path, 4, [["zero.stage=1", "parallel.expert=2"]])


@pytest.mark.gpu
@requires_gpus(2)
def test_on_gpus(tmp_path: Path) -> None:
    way = ["moe.backend=reference"]
    check_saves_beside_training(tmp_path, 2, [[*variant, *way] for variant in VARIANTS], "nccl")


def memory_of_saving(_rank: int, limit: int, root: str) -> tuple[int, int, int, bool]:
    """By how many bytes this process grew at most while two checkpoints of 60 MB a rank were written slowly, what the
    blocks had, their number that was used for the second one alone, and whether training waited."""
    shape = ["model.hidden_size=128", "model.intermediate_size=256", "model.num_hidden_layers=12", "parallel.expert=2"]
    config, grid, engine = start(shape)
    zero.make_states(engine)
    append = ShardWriter.append

    def slowly(self: ShardWriter, name: str, data: memoryview) -> None:
        time.sleep(0.005)
        append(self, name, data)

    ShardWriter.append = slowly  # type: ignore[method-assign]
    blocks = Blocks(limit)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    first = state.begin_save(engine, grid, Path(root), 1, {}, to_yaml(config), 1, {}, blocks)
    first.wait()
    used = blocks.bytes
    state.begin_save(engine, grid, Path(root), 2, {}, to_yaml(config), 1, {}, blocks).wait()
    return status("VmHWM") - before, used, blocks.bytes - used, first.copier.waited


@pytest.mark.parametrize("limit", [6 << 20, 20 << 20, 200 << 20])
def test_memory_is_bounded_and_used_again(tmp_path: Path, limit: int) -> None:
    for grown, used, more, waited in run_distributed(memory_of_saving, 2, limit, str(tmp_path)):
        assert waited == (limit < 60e6)
        assert used == limit if waited else used < limit
        assert used + more < min(limit + 1, 100e6), "two checkpoints have 120 MB"
        # without blocks it measured 3 to 11 MB: tests/checkpoint/test_checkpoint.py
        assert grown < used + more + 20e6
    checkpoint = store.open_checkpoint(tmp_path)
    for name in checkpoint.entries:
        checkpoint.read(name)


def save_and_be_killed(rank: int, root: str, seed: int) -> None:
    """Save step 1 whole, then step 2 beside training, slowly; one rank is killed at some moment of that."""
    config, grid, engine = start(["zero.stage=1", "parallel.expert=1"])
    train(config, grid, engine, range(1))
    state.save(engine, grid, Path(root), 1, {"consumed_samples": 4}, to_yaml(config), keep=1)
    train(config, grid, engine, range(1, 2))
    rng = random.Random(seed)
    append, victim, moment = ShardWriter.append, rng.randrange(2), rng.uniform(0, 0.5)

    def slowly(self: ShardWriter, name: str, data: memoryview) -> None:
        time.sleep(0.005)
        append(self, name, data)

    ShardWriter.append = slowly  # type: ignore[method-assign]
    dist.barrier()
    if rank == victim:
        threading.Timer(moment, os.kill, (os.getpid(), signal.SIGKILL)).start()
    blocks = Blocks(ROOM)
    state.begin_save(engine, grid, Path(root), 2, {"consumed_samples": 8}, to_yaml(config), 1, {}, blocks)
    train(config, grid, engine, range(2, 1000))


def resume(_rank: int, root: str) -> tuple[int, dict[str, Any]]:
    """The step of the checkpoint that is left, and everything after step 3."""
    config, grid, engine = start(["zero.stage=1", "parallel.expert=1"])
    checkpoint = store.open_checkpoint(Path(root))
    for name in checkpoint.entries:
        checkpoint.read(name)
    state.load(engine, grid, checkpoint)
    train(config, grid, engine, range(checkpoint.step, 3))
    return checkpoint.step, everything(engine, grid)


def undisturbed(_rank: int) -> dict[str, Any]:
    config, grid, engine = start(["zero.stage=1", "parallel.expert=1"])
    train(config, grid, engine, range(3))
    return everything(engine, grid)


def test_killed_at_any_moment_of_writing_a_complete_checkpoint_is_left(tmp_path: Path) -> None:
    expected = run_distributed(undisturbed, 2)[0]
    for seed in range(4):
        root = str(tmp_path / str(seed))
        with pytest.raises(RankError, match=r"exit code -9|failed"):
            run_distributed(save_and_be_killed, 2, root, seed)
        step, found = run_distributed(resume, 2, root)[0]
        assert step in (1, 2), seed
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert value.equal(found[name]), f"{seed}: {name}"
