"""What a run leaves behind for people to look at, and what that costs."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL, records, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from occult_train import runlog
from occult_train.config import load
from occult_train.errors import UserError
from occult_train.testing import run_distributed

STEPS = 3
RUN = {"loss", "balance_loss", "z_loss", "grad_norm", "lr", "tokens_per_second", "mfu"}
LAYER = {"balance_loss", "z_loss", "c_t", "intra_collaboration", "load_max_over_mean", "bytes_sent"}
PASSES = ("dispatch", "combine", "combine_backward", "dispatch_backward")


def train_with_known_peak(rank: int, arguments: list[str]) -> int:
    """Train as on a device whose peak rate is known, so that MFU is."""
    from occult_train import trainer

    trainer.peak_flops = lambda: 1e9  # type: ignore[assignment]
    return train(rank, arguments)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> Path:
    """A run of STEPS steps in two starts, with a CSV board beside TensorBoard."""
    run = tmp_path_factory.mktemp("watched") / "run"
    board = f"deepspeed.csv_monitor={{enabled: true, output_path: {run}/csv, job_name: board}}"
    arguments = [f"data.path={corpus}", f"output={run}", "monitor.histogram_interval=1", board]
    for steps in (STEPS - 1, STEPS):
        run_distributed(train_with_known_peak, 2, [*arguments, f"train.steps={steps}"], timeout=240)
    return run


@pytest.fixture(scope="module")
def events(watched: Path) -> EventAccumulator:
    """What TensorBoard would show."""
    accumulator = EventAccumulator(str(watched / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    accumulator.Reload()
    return accumulator


def test_every_promised_scalar_has_a_point_a_step(events: EventAccumulator) -> None:
    promised = {f"train/{name}" for name in RUN} | {"moe/c_t", "moe/bytes_sent"}
    for layer in ("moe/layer_00", "moe/layer_01"):
        promised |= {f"{layer}/{name}" for name in LAYER} | {f"{layer}/rows_sent/{name}" for name in PASSES}
    assert {tag for tag in events.Tags()["scalars"] if not tag.startswith("Train/")} == promised | {"evaluation/loss"}
    for tag in promised:
        assert [event.step for event in events.Scalars(tag)] == [1, 2, 3], tag


def test_scalars_are_those_of_the_log(watched: Path, events: EventAccumulator) -> None:
    steps = [record for record in runlog.read(watched / "log.jsonl") if record["kind"] == "step"]
    for name in RUN:
        logged = [record[name] for record in steps]
        assert [event.value for event in events.Scalars(f"train/{name}")] == pytest.approx(logged, rel=1e-6)
    layer = [record["layers"][1] for record in steps]
    for tag, values in {
        "balance_loss": [each["balance_loss"] for each in layer],
        "z_loss": [each["z_loss"] for each in layer],
        "intra_collaboration": [each["intra_share"] for each in layer],
        "rows_sent/combine": [each["rows_sent"]["combine"] for each in layer],
    }.items():
        assert [e.value for e in events.Scalars(f"moe/layer_01/{tag}")] == pytest.approx(values, rel=1e-6), tag


def test_losses_of_layers_average_to_those_of_the_step(watched: Path) -> None:
    for record in records(watched):
        if record["kind"] == "step":
            for name in ("balance_loss", "z_loss"):
                layers = [layer[name] for layer in record["layers"]]
                assert len(set(layers)) == 2
                assert record[name] == pytest.approx(sum(layers) / 2)


def test_a_histogram_a_layer_holds_every_expert_s_load(events: EventAccumulator) -> None:
    assert set(events.Tags()["histograms"]) == {f"moe/layer_0{i}/tokens_per_expert" for i in (0, 1)}
    for tag in events.Tags()["histograms"]:
        seen = events.Histograms(tag)
        assert [event.step for event in seen] == [1, 2, 3]
        for event in seen:
            assert event.histogram_value.num == 8
            assert event.histogram_value.sum == 8 * 32 * 3


def test_the_resolved_config_is_there_as_text(watched: Path, events: EventAccumulator) -> None:
    (tag,) = events.Tags()["tensors"]
    assert tag == "config/text_summary"
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)]
    assert texts[-1] == "```yaml\n" + (watched / "config.yaml").read_text() + "```"
    assert load([str(watched / "config.yaml")]).model.vocab_size == 320


def test_deepspeed_s_own_curve_goes_on_after_a_restart(events: EventAccumulator) -> None:
    assert [event.step for event in events.Scalars("Train/Samples/lr")] == [8, 16, 24]


def test_further_boards_of_deepspeed_get_the_same(watched: Path) -> None:
    (path,) = (watched / "csv").rglob("*train_loss.csv")
    with path.open() as file:
        rows = [row for row in csv.reader(file) if row[0].isdigit()]  # DeepSpeed writes a header at each start
    logged = [record["loss"] for record in records(watched) if record["kind"] == "step"]
    assert [float(row[1]) for row in rows] == pytest.approx(logged)


# ---------------------------------------------------------------- cost


def count_collectives(rank: int, arguments: list[str]) -> list[int]:
    """Collectives that each step calls for."""
    import torch.distributed as dist

    from occult_train import trainer

    counts: list[int] = []
    calls = [0]
    for name in ("all_reduce", "all_gather_object", "all_gather_into_tensor", "all_to_all_single", "broadcast"):
        setattr(dist, name, _counting(getattr(dist, name), calls))
    train_step = trainer.Trainer._train_step

    def counted(self: Any, batches: Any) -> None:
        before = calls[0]
        train_step(self, batches)
        counts.append(calls[0] - before)

    trainer.Trainer._train_step = counted  # type: ignore[method-assign]
    trainer.run(load(SMALL + arguments))
    return counts


def _counting(function: Any, calls: list[int]) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return function(*args, **kwargs)

    return counted


def test_a_logged_step_takes_one_collective_more(tmp_path: Path, corpus: str) -> None:
    arguments = [f"data.path={corpus}", f"output={tmp_path}/run", "train.steps=9", "monitor.interval=4"]
    for counts in run_distributed(count_collectives, 2, arguments, timeout=240):
        assert counts[5] > 0
        assert [count - counts[5] for count in counts[3:]] == [1, 0, 0, 0, 1, 1]
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 4, 8, 9, 9]


# ---------------------------------------------------------------- log.jsonl


def _write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = _write(tmp_path / "log.jsonl", '{"kind": "step", "step": 1}', '{"kind": "step", "step": 2}')
    whole = path.read_text()
    path.write_text(whole + '{"kind": "step", "st')
    assert [record["step"] for record in runlog.read(path)] == [1, 2]
    runlog.rewind(path, 2)
    assert path.read_text() == whole
    runlog.rewind(path, 1)
    assert [record["step"] for record in runlog.read(path)] == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize("line", ["", "nonsense", "[1]", '{"step": 1}', '{"kind": "step"}'])
def test_another_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    good = json.dumps({"kind": "step", "step": 1})
    path = _write(tmp_path / "log.jsonl", good, line, good)
    with pytest.raises(UserError, match=r"log\.jsonl:2 is damaged"):
        runlog.read(path)


def test_a_full_disk_is_told_in_one_line() -> None:
    with pytest.raises(UserError, match=r"^/dev/full cannot be written: No space left on device$"):
        runlog.append(Path("/dev/full"), {"kind": "step", "step": 1})


def test_a_log_that_is_not_there_begins_empty(tmp_path: Path) -> None:
    runlog.rewind(tmp_path / "log.jsonl", 0)
    runlog.append(tmp_path / "log.jsonl", {"kind": "step", "step": 1})
    assert runlog.read(tmp_path / "log.jsonl") == [{"kind": "step", "step": 1}]
