"""Experts placed anew while training: the run is the one without, and C_T falls."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_runs import records, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_trainer import assert_same

from occult_train.checkpoint import placing
from occult_train.checkpoint.store import Checkpoint, open_checkpoint
from occult_train.moe.placement import Placement, to_json
from occult_train.moe.statistics import RoutingStatistics
from occult_train.moe.synthetic import statistics_of
from occult_train.replacing import Proposal, Replacer
from occult_train.testing import run_distributed

STEPS = 8
REPLACE = ["moe.replace.interval=3", "moe.replace.window=2", "moe.replace.min_gain=0"]
STATISTICS = ["moe.statistics.start=1", "moe.statistics.steps=2"]
"""Of the first window."""
CONTIGUOUS = dict.fromkeys(range(2), Placement.contiguous(8))
REVERSED = dict.fromkeys(range(2), Placement(tuple(reversed(range(8)))))


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    """Records of the log of one kind, without what depends on the clock."""
    found = [record for record in records(run) if record["kind"] == kind]
    return [{k: v for k, v in record.items() if k not in ("solve_seconds", "move_seconds")} for record in found]


def checkpoint(run: Path, step: int = STEPS) -> Checkpoint:
    return open_checkpoint(run / "checkpoints" / f"step-{step:08d}")


@pytest.fixture(scope="module")
def common(corpus: str) -> list[str]:
    """Settings of all runs."""
    return [f"data.path={corpus}", f"train.steps={STEPS}", "optimizer.lr=3e-3", "moe.balance=bias", "checkpoint.keep=0"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, common: list[str]) -> Path:
    """The run whose experts stay."""
    run = tmp_path_factory.mktemp("plain") / "run"
    run_distributed(train, 2, [*common, f"output={run}", *STATISTICS], timeout=240)
    return run


@pytest.fixture(scope="module")
def replaced(tmp_path_factory: pytest.TempPathFactory, common: list[str]) -> Path:
    """The run whose experts are placed anew after steps 3 and 6, with a checkpoint inside of the second window, while
    statistics are gathered too."""
    run = tmp_path_factory.mktemp("replaced") / "run"
    more = [f"output={run}", "checkpoint.interval=5", *STATISTICS]
    run_distributed(train, 2, [*common, *REPLACE, *more], timeout=240)
    return run


def train_and_tell(rank: int, arguments: list[str]) -> list[str]:
    """Train; what the user was told."""
    from occult_train.monitor import Monitor

    told: list[str] = []
    Monitor.say = lambda self, text: told.append(text)  # type: ignore[method-assign]
    train(rank, arguments)
    return told


def assert_same_training(run: Path, plain: Path) -> None:
    """Losses, weights and moments to 1e-5; biases, which move by signs, exactly."""
    ours, theirs = lines(run, "step"), lines(plain, "step")[-len(lines(run, "step")) :]
    for name in ("step", "loss", "balance_loss", "z_loss", "grad_norm", "lr"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=1e-5), name
    left, right = checkpoint(run), checkpoint(plain)
    assert left.entries.keys() == right.entries.keys()
    for name in left.entries:
        expected = right.read(name)
        assert (left.read(name) - expected).norm() <= 1e-5 * expected.norm(), name
    assert left.state["expert_bias"] == right.state["expert_bias"]


def test_replaced_experts_train_as_those_that_stay(replaced: Path, plain: Path) -> None:
    assert [r["step"] for r in lines(replaced, "replacement")] == [3, 6]
    assert all(r["experts_moved"] > 0 < r["bytes_moved"] for r in lines(replaced, "replacement"))
    assert_same_training(replaced, plain)
    assert placing.recorded(checkpoint(plain)) == CONTIGUOUS
    assert CONTIGUOUS != placing.recorded(checkpoint(replaced, 5)) != placing.recorded(checkpoint(replaced))


def c_t_by_hand(sets_NK: torch.Tensor, placement: Placement) -> float:
    """Over two devices."""
    homes = {expert: device for device, experts in enumerate(placement.by_device(2)) for expert in experts}
    return sum(len({homes[expert] for expert in experts}) for experts in sets_NK.tolist()) / len(sets_NK)


def test_c_t_is_that_of_the_window_and_falls(replaced: Path, plain: Path) -> None:
    """What was counted is what the log says of the window's steps, and what both placements make of its choices."""
    first, second = lines(replaced, "replacement")
    by_step, unmoved = ({r["step"]: r["layers"] for r in lines(run, "step")} for run in (replaced, plain))
    sets = RoutingStatistics.load(plain / "statistics.safetensors").layers
    placements = placing.recorded(checkpoint(replaced, 5))
    for at, layer in enumerate(first["layers"]):
        for record, steps in ((first, (2, 3)), (second, (5, 6))):
            logged = sum(by_step[step][at]["c_t"] for step in steps) / 2
            assert record["layers"][at]["c_t"] == pytest.approx(logged, rel=1e-9)
        assert layer["c_t"] == pytest.approx(c_t_by_hand(sets[at].sets_NK, CONTIGUOUS[at]), rel=1e-9)
        assert layer["moved"] == (layer["c_t_expected"] < layer["c_t"]) == (placements[at] != CONTIGUOUS[at])
        if layer["moved"]:
            assert layer["c_t_expected"] == pytest.approx(c_t_by_hand(sets[at].sets_NK, placements[at]), rel=1e-9)
            assert by_step[4][at]["c_t"] != unmoved[4][at]["c_t"], "logged as it is from then on"
        assert 1 <= layer["load_expected"] <= 2
    events = EventAccumulator(str(replaced / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("moe/experts_moved")] == [
        (r["step"], r["experts_moved"]) for r in lines(replaced, "replacement")
    ]


def test_a_run_resumed_inside_of_a_window_decides_what_it_would_have(
    tmp_path: Path, common: list[str], replaced: Path
) -> None:
    run = tmp_path / "run"
    start = f"checkpoint.resume={replaced}/checkpoints/step-00000005"
    run_distributed(train, 2, [*common, *REPLACE, f"output={run}", start], timeout=240)
    assert_same(checkpoint(run), checkpoint(replaced))
    assert checkpoint(run).state["placement"] == checkpoint(replaced).state["placement"]
    assert lines(run, "replacement") == lines(replaced, "replacement")[1:]
    assert lines(run, "step") == lines(replaced, "step")[5:]


def test_another_number_of_ranks_goes_on_with_the_placement(
    tmp_path: Path, common: list[str], replaced: Path, plain: Path
) -> None:
    """From 2 ranks to 4, from stage 1 to 3, inside of a window, whose counts are left aside."""
    run = tmp_path / "run"
    start = [f"checkpoint.resume={replaced}/checkpoints/step-00000005", "zero.stage=3"]
    told = run_distributed(train_and_tell, 4, [*common, *REPLACE, f"output={run}", *start], timeout=240)[0]
    assert placing.recorded(checkpoint(run)) == placing.recorded(checkpoint(replaced, 5)) != CONTIGUOUS
    assert lines(run, "replacement") == []
    assert_same_training(run, plain)
    assert told[0].endswith("step-00000005 at step 5, with its placement")
    assert "step 6: experts stay: moe.replace.window=2, but only 1 of its steps were counted" in told


def test_another_size_of_expert_parallelism_and_another_placement(
    tmp_path: Path, common: list[str], replaced: Path, plain: Path
) -> None:
    run, file = tmp_path / "run", tmp_path / "placement.json"
    file.write_text(to_json(REVERSED))
    start = [f"checkpoint.resume={replaced}/checkpoints/step-00000005", "parallel.expert=4", f"moe.placement={file}"]
    told = run_distributed(train_and_tell, 4, [*common, f"output={run}", *start], timeout=240)[0]
    assert told[0].endswith(f"at step 5, with moe.placement={file} in place of its own")
    assert placing.recorded(checkpoint(run)) == REVERSED
    assert_same_training(run, plain)


def test_an_applied_placement_is_continued_with(tmp_path: Path, common: list[str], plain: Path) -> None:
    """Of a run that was started with a file; the same command goes on, with what was applied since."""
    run, file = tmp_path / "run", tmp_path / "placement.json"
    file.write_text(to_json(REVERSED))
    arguments = [*common, f"output={run}", f"moe.placement={file}"]
    run_distributed(train, 2, [*arguments, "train.steps=5", "scheduler.name=constant"], timeout=240)
    assert placing.recorded(checkpoint(run, 5)) == REVERSED
    applied = {0: Placement((0, 2, 4, 6, 1, 3, 5, 7)), 1: Placement((3, 1, 4, 5, 2, 6, 0, 7))}
    placing.apply(run, applied)
    run_distributed(train, 2, [*arguments, "train.steps=6", "scheduler.name=constant"], timeout=240)
    assert placing.recorded(checkpoint(run, 6)) == applied


def test_damaged_counts_are_named(tmp_path: Path, common: list[str], replaced: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step-00000005"
    shutil.copytree(checkpoint(replaced, 5).folder, folder)
    path = folder / "replace-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-8] + b"\0" * 8)
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    with pytest.raises(RuntimeError, match=r"step-00000005: replace-00001\.safetensors is damaged"):
        run_distributed(train, 2, [*common, *REPLACE, f"output={tmp_path}/run"], timeout=240)


def proposal(dispatcher: str) -> Proposal:
    """For four experts on four devices of two nodes, used in pairs of which each is on both nodes."""
    replacer = object.__new__(Replacer)
    layer = SimpleNamespace(placement=Placement.contiguous(4), options=SimpleNamespace(dispatcher=dispatcher))
    wanted = SimpleNamespace(method="hypergraph", load_bound=2.0)
    vars(replacer).update(wanted=wanted, seed=0, layers={0: layer}, grid=SimpleNamespace(expert_size=4, nodes=2))
    return replacer._solve(0, statistics_of(torch.tensor([[0, 2], [1, 3]] * 50), 4))


def test_nodes_count_where_the_dispatch_reaches_each_once() -> None:
    by_node = proposal("hierarchical")
    assert (by_node.c_t, by_node.c_t_expected, by_node.nodes, by_node.nodes_expected) == (2, 2, 2, 1)
    assert by_node.gains(0.02)
    flat = proposal("dedup")
    assert (flat.c_t, flat.c_t_expected, flat.nodes, flat.nodes_expected) == (2, 2, 0, 0)
    assert not flat.gains(0)


def test_statistics_are_by_expert_wherever_experts_live(replaced: Path, plain: Path) -> None:
    """The routing is that of the run whose experts stay, and nothing that re-placement counted is missing."""
    ours, theirs = (RoutingStatistics.load(run / "statistics.safetensors") for run in (replaced, plain))
    assert ours.tokens == 2 * 8 * 32
    for layer in range(2):
        assert torch.equal(ours.layers[layer].loads_E, theirs.layers[layer].loads_E)
        assert torch.equal(ours.layers[layer].pairs_EE, theirs.layers[layer].pairs_EE)
