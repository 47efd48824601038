"""`occult place`: what it prints, writes and draws, what it sets in a checkpoint, and mistakes."""

import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from occult_train.checkpoint import placing, store
from occult_train.checkpoint.shards import ShardWriter
from occult_train.launcher.cli import main
from occult_train.moe.costs import cost
from occult_train.moe.placement import Placement, read
from occult_train.moe.statistics import RoutingStatistics
from occult_train.moe.synthetic import clustered, statistics_of
from occult_train.tools.place_report import Wanted, compare, sentences

EXPERTS, TOP_K, LAYERS = 16, 3, (0, 2)


def choices(layer: int, strength: float = 3.0) -> Tensor:
    return clustered(3000, EXPERTS, TOP_K, 4, strength, seed=layer)


def write(path: Path, part: slice, layers: tuple[int, ...] = LAYERS) -> RoutingStatistics:
    parts = {layer: statistics_of(choices(layer)[part], EXPERTS) for layer in layers}
    statistics = RoutingStatistics(EXPERTS, TOP_K, parts)
    statistics.save(path)
    return statistics


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write(tmp_path / "seen.safetensors", slice(0, 1500))
    return tmp_path / "seen.safetensors"


def make_run(root: Path, expert: int) -> Path:
    """A run's folder with a checkpoint of a model with experts in layers 0 and 2, and statistics."""
    folder = store.begin(root / "checkpoints", 5)
    shapes = {f"layers.{layer}.moe.router.weight": (EXPERTS, 2) for layer in LAYERS}
    writer = ShardWriter(folder / "model-00000.safetensors", shapes)
    for name, shape in shapes.items():
        writer.write(name, torch.ones(shape))
    writer.close()
    text = (
        f"parallel: {{expert: {expert}}}\nmodel: {{num_experts: {EXPERTS}, hidden_size: 64, num_attention_heads: 4}}\n"
    )
    text += "train: {global_batch_size: 8, precision: bf16}\ndata: {sequence_length: 32}\n"
    for place in (root, folder):
        (place / "config.yaml").write_text(text)
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    tensors = {name: entry.to_json() for name, entry in writer.entries.items()}
    write(root / "statistics.safetensors", slice(0, 1500))
    return store.commit(root / "checkpoints", 5, {"state": {"step": 5}, "tensors": tensors, "files": files}, 0)


def occult(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["occult", "place", *(str(a) for a in arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def rows(text: str, devices: int) -> dict[tuple[str, str], list[str]]:
    """Cells of the table for D, by layer and method."""
    table = text[text.index(f"D={devices} devices") :].split("└")[0]
    found, layer = {}, ""
    for line in table.splitlines():
        if line.startswith("│"):
            first, method, *cells = (cell.strip() for cell in line.strip("│").split("│"))
            layer = first or layer
            found[layer, method] = cells
    return found


def test_prints_costs_writes_and_draws(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    statistics = RoutingStatistics.load(file)
    unseen = write(tmp_path / "unseen.safetensors", slice(1500, 3000))
    output, figure = tmp_path / "made" / "p.json", tmp_path / "made" / "p.png"
    options = ["--devices", "2,4", "--for-devices", 4, "--output", output, "--figure", figure]
    options += ["--held-out", tmp_path / "unseen.safetensors", "--hidden", 64, "--step-tokens", 1000]
    assert occult(monkeypatch, file, *options) == 0
    text = capsys.readouterr().out
    placements = read(output, list(LAYERS), EXPERTS)
    expected = {layer: cost(statistics.layers[layer], placements[layer], 4) for layer in LAYERS}
    assert all(found.load <= 1.1 for found in expected.values())
    table = rows(text, 4)
    for layer in LAYERS:
        got, other = expected[layer], cost(unseen.layers[layer], placements[layer], 4)
        # four exchanges of C_T · 3/4 rows of 64 values of two bytes
        moved = 4 * got.c_t * 0.75 * 1000 * 64 * 2 / 1e6
        assert table[str(layer), "hypergraph"] == [
            *(f"{got.c_t:.3f}", f"{other.c_t:.3f} ± {other.c_t_error:.3f}", f"{got.intra_share:.1%}"),
            *(f"{got.load:.2f}", f"{moved:.3f}"),
        ]
        plain = cost(statistics.layers[layer], Placement.contiguous(EXPERTS), 4)
        assert table[str(layer), "contiguous"][0] == f"{plain.c_t:.3f}"
    mean = sum(found.c_t for found in expected.values()) / 2
    assert table["all", "hypergraph"][0] == f"{mean:.3f}"
    assert {method for _, method in table} == {"contiguous", "greedy, no bound", "greedy", "hypergraph"}
    assert re.search(r"^D=4: C_T \d\.\d+ → \d\.\d+ \(-\d+\.\d% ± \d\.\d\d%, held out\)$", text, re.MULTILINE)
    with Image.open(figure) as image:
        assert image.size[0] > 500


def test_a_run_says_what_its_steps_are_and_for_how_many_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run", expert=4)
    assert occult(monkeypatch, folder, "--devices", "4", "--method", "greedy", "--apply") == 0
    text = capsys.readouterr().out
    statistics = RoutingStatistics.load(tmp_path / "run" / "statistics.safetensors")
    applied = placing.recorded(store.open_checkpoint(folder))
    wanted = Wanted("greedy", 1.1, 1, 8.0, 0)
    for layer in LAYERS:
        solved = compare(layer, statistics.layers[layer], None, 4, wanted)
        assert applied[layer] == solved.chosen.placement != Placement.contiguous(EXPERTS)
        moved = 4 * solved.costs["greedy"].c_t * 0.75 * 8 * 32 * 64 * 2 / 1e6
        assert rows(text, 4)[str(layer), "greedy"][-1] == f"{moved:.3f}"


def test_a_user_s_own_placement(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert occult(monkeypatch, file, "--devices", 4, "--output", tmp_path / "p.json", "--method", "contiguous") == 0
    capsys.readouterr()
    assert occult(monkeypatch, file, "--devices", 4, "--method", tmp_path / "p.json") == 0
    table = rows(capsys.readouterr().out, 4)
    assert table["0", "file"] == table["0", "contiguous"]


def test_default_devices_that_do_not_fit_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    twelve = statistics_of(clustered(500, 12, 2, 2, 1.0), 12)
    RoutingStatistics(12, 2, {0: twelve}).save(tmp_path / "twelve.safetensors")
    assert occult(monkeypatch, tmp_path / "twelve.safetensors", "--method", "greedy") == 0
    text = capsys.readouterr().out
    assert "D=8 does not divide 12 experts: left out" in text
    assert "D=4 devices" in text
    assert "D=16 devices" not in text


def verdict(sets_TK: Tensor, experts: int, devices: int, held_out: Tensor | None = None) -> str:
    wanted = Wanted("hypergraph", 1.1, 1, 8.0, 0)
    other = None if held_out is None else statistics_of(held_out, experts)
    return "\n".join(sentences([compare(0, statistics_of(sets_TK, experts), other, devices, wanted)], wanted, TOP_K))


def test_says_when_placement_is_not_worth_it() -> None:
    """Of uniform routing, on the tokens that were seen something is saved, on others nothing."""
    uniform_TK = clustered(600, EXPERTS, TOP_K, 4, 0.0)
    assert "not worth it" in verdict(uniform_TK[:300], EXPERTS, 4, uniform_TK[300:])
    assert "not worth it" not in verdict(choices(0)[:300], EXPERTS, 4, choices(0)[300:600])


def test_compares_by_what_was_minimised() -> None:
    """On nodes a placement may need more devices if it needs fewer nodes."""
    statistics, wanted = statistics_of(choices(0, 1.0), EXPERTS), Wanted("hypergraph", 2.0, 2, 8.0, 0)
    found = compare(0, statistics, None, 4, wanted)
    costs = {name: c.c_t + 8 * c.nodes for name, c in found.costs.items()}
    best = min(costs["contiguous"], costs["greedy"])
    assert found.over_best[0] == pytest.approx(costs["hypergraph"] - best)
    assert found.over_best[0] <= 0
    assert found.saved[0] == pytest.approx(found.costs["contiguous"].c_t - found.costs["hypergraph"].c_t)


def test_says_that_a_bound_cannot_be_met() -> None:
    one_is_hot_TK = torch.tensor([[0, 1, e] for e in range(2, 8)] * 5)
    text = verdict(one_is_hot_TK, 8, 4)
    # experts 0 and 1 take 30 of 90 choices each, the coldest 5: the fullest device has at least 35 of 22.5
    assert "no placement meets the load bound of 1.1; it is held to the least maximum, 1.556" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--devices", "3"], "--devices=3: D=3 does not divide 16 experts"),
        (["--devices", "4", "--nodes", "3"], "D=4 is not a multiple of --nodes=3"),
        (["--devices", "two"], "--devices=two is not a list of numbers"),
        (["--method", "best"], "--method=best is none of contiguous, greedy, hypergraph, and no file"),
        (["--output", "p.json"], "need --for-devices"),
        (["--apply", "--for-devices", "4"], "--apply needs a checkpoint or a run"),
        (["--load-bound", "0.5"], "load_bound=0.5 is below 1"),
        (["--held-out", "nowhere"], "statistics nowhere cannot be read"),
    ],
)
def test_mistakes_are_one_line(
    file: Path,
    options: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert occult(monkeypatch, file, *options) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_statistics_of_another_model(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "other.safetensors", slice(0, 100), layers=(0,))
    assert occult(monkeypatch, file, "--held-out", tmp_path / "other.safetensors") == 2
    assert "other.safetensors are of another model" in capsys.readouterr().err


def test_a_run_without_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert occult(monkeypatch, tmp_path) == 2
    assert f"count some: occult profile {tmp_path}" in capsys.readouterr().err
