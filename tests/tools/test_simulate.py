"""`occult simulate`: its model by hand, what it prints, its fit to this machine, and mistakes."""

import csv
import math
import sys
from pathlib import Path

import pytest
import torch

from occult_train.errors import ConfigError
from occult_train.launcher.cli import main
from occult_train.moe.links import Cluster, Link, Shape, by_node_ms, copies_share, flat_ms, used_devices
from occult_train.moe.statistics import RoutingStatistics
from occult_train.moe.synthetic import clustered, statistics_of
from occult_train.tools.simulate_fit import Fit, fit
from occult_train.tools.simulate_model import load_cluster, pruned, spread

# without latency, and a byte takes a millisecond within a node, ten to another
SLOW = Cluster(2, Link(0.0, 1e-6), Link(0.0, 1e-7))
TWO_BY_TWO = Shape(4, 4, 2)


def test_a_message_costs_latency_and_its_bytes() -> None:
    assert Link(5.0, 2.0).milliseconds(3, 4e6) == pytest.approx(0.015 + 2.0)
    assert Link(5.0, 2.0).milliseconds(0, 0) == 0


def test_flat_by_hand() -> None:
    """Every token needs devices 0 and 2, one on each node; one token a device, one byte a row."""
    share = torch.tensor([1.0, 0, 1, 0], dtype=torch.float64)
    # device 0 receives from its one neighbour 1 byte, and from two devices of the other node 2, ten times as slow
    assert flat_ms(share, TWO_BY_TWO, SLOW, 1, 1) == pytest.approx(20)
    # on one node of four it receives from three
    assert flat_ms(share, Shape(4, 4, 4), SLOW, 1, 1) == pytest.approx(3)
    # sending counts where it is more: to three devices a copy each
    assert flat_ms(torch.ones(4, dtype=torch.float64), Shape(4, 4, 4), SLOW, 10, 3) == pytest.approx(90)


def test_by_node_by_hand() -> None:
    used = torch.tensor([[True, True, True, False]])  # of every token: both devices of node 0, one of node 1
    # network: node 0 gets a row from each device of node 1, so does each of its devices: 1 row of 10 ms.
    # Node 0 then has 4 tokens, two on each device, each to the other device: 2 rows; on node 1 two to device 2.
    assert by_node_ms(used, TWO_BY_TWO, SLOW, 1, 1) == pytest.approx(10 + 2)
    # flat: device 0 gets 2 rows from the other node
    assert flat_ms(used.double().mean(0), TWO_BY_TWO, SLOW, 1, 1) == pytest.approx(20)


def test_on_one_node_both_ways_are_one() -> None:
    sets_NK = clustered(500, 16, 4, 4, 2.0).sort(1).values
    used = used_devices(sets_NK, torch.arange(16) // 2, 8)
    one = Shape(8, 8, 8)
    assert by_node_ms(used, one, Cluster(), 100, 64) == pytest.approx(
        flat_ms(used.double().mean(0), one, Cluster(), 100, 64)
    )


def test_volumes_by_hand() -> None:
    sets_NK = torch.tensor([[0, 1], [0, 2], [0, 3]])
    device_E = torch.tensor([0, 0, 1, 1])
    assert copies_share(sets_NK, device_E, 2).tolist() == [4 / 3, 2 / 3]
    assert used_devices(sets_NK, device_E, 2).tolist() == [[True, False], [True, True], [True, True]]


def test_pruned_tokens_need_a_random_part_of_their_devices() -> None:
    used = used_devices(clustered(4000, 16, 4, 4, 0.0), torch.arange(16) // 2, 8)
    less = pruned(used, 2)
    assert torch.equal(less.sum(1), used.sum(1).clamp(max=2))
    assert not bool((less & ~used).any())
    assert float((less.double().mean(0) - 0.25).abs().max()) < 0.04  # each device is as likely as any
    assert torch.equal(pruned(used, 8), used)


@pytest.mark.parametrize(
    ("devices", "experts", "expected"),
    [
        (4, 64, Shape(4, 4, 4)),
        (16, 64, Shape(16, 16, 8)),
        (1024, 64, Shape(1024, 64, 8)),  # 16 sets of experts
        (8, 60, Shape(8, 4, 4)),  # 8 does not divide 60
        (24, 48, Shape(24, 24, 8)),
        (6, 12, Shape(6, 6, 6)),
        (12, 12, Shape(12, 4, 4)),  # sets on 6 would lie across nodes
    ],
)
def test_experts_are_spread_as_far_as_they_go(devices: int, experts: int, expected: Shape) -> None:
    assert spread(devices, experts, Cluster()) == expected


def test_fit_by_hand() -> None:
    """Three messages of 2 ms and a gigabyte a second: 6 + 1, 6 + 10 and 6 + 100 ms; the middle took a quarter more."""
    found = Fit(4, "cpu", (1e6, 1e7, 1e8), (7.0, 20.0, 106.0))
    assert found.link.latency_us == pytest.approx(2000)
    assert found.link.gigabytes_per_second == pytest.approx(1.0)
    assert found.error == pytest.approx(16 / 20 - 1)
    assert not found.agrees
    assert "not to be trusted" in found.words()
    assert Fit(4, "cpu", (1e6, 1e7, 1e8), (7.0, 16.5, 106.0)).agrees


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_model_holds_on_this_machine(ranks: int) -> None:
    found = fit(ranks)
    assert abs(found.error) <= 0.15, found.words()


# --- the command


def occult(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["occult", "simulate", *(str(a) for a in arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    layers = {layer: statistics_of(clustered(2000, 16, 3, 4, 3.0, seed=layer), 16) for layer in (0, 2)}
    RoutingStatistics(16, 3, layers).save(tmp_path / "seen.safetensors")
    return tmp_path / "seen.safetensors"


def test_prints_and_writes(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cluster.yaml").write_text("devices_per_node: 4\ninter: {gigabytes_per_second: 12.5}\n")
    options = ["--devices", "2,8,16,64", "--hidden", 64, "--method", "greedy", "--csv", tmp_path / "out.csv"]
    assert occult(monkeypatch, file, *options, "--cluster", tmp_path / "cluster.yaml") == 0
    text = capsys.readouterr().out
    assert "4 devices a node" in text
    assert "between nodes 8 us + 12.5 GB/s" in text
    assert "further sets of experts work side by side" in text
    with (tmp_path / "out.csv").open() as lines:
        rows = {int(row["devices"]): {k: float(v) for k, v in row.items()} for row in csv.DictReader(lines)}
    assert [(r["expert_parallel"], r["nodes"]) for r in rows.values()] == [(2, 1), (8, 2), (16, 4), (16, 4)]
    for row in rows.values():
        assert row["dedup_ms"] <= row["copies_ms"] + 1e-12
        assert row["c_t_placed"] <= row["c_t"]
    assert rows[8]["node_ms"] < rows[8]["dedup_ms"], "one row over the slow network in place of several"
    assert rows[8]["placed_ms"] < rows[8]["dedup_ms"]
    assert math.isnan(rows[8]["pruned_1_ms"]), "two experts a device are fewer than K=3"
    assert rows[8]["pruned_2_ms"] < rows[8]["placed_ms"]
    assert {k: v for k, v in rows[16].items() if k != "devices"} == pytest.approx(
        {k: v for k, v in rows[64].items() if k != "devices"}, nan_ok=True
    )


def test_without_statistics(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert occult(monkeypatch, "--shape", "64,32,8,2", "--clusters", 2, "--devices", "2", "--method", "greedy") == 0
    assert "rows of 128 bytes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "give --hidden"),
        (["--hidden", "8", "--layer", "1"], "--layer=1 has no statistics"),
        (["--hidden", "8", "--devices", "2,-4"], "--devices=2,-4 is not a list"),
        (["--hidden", "8", "--method", "best"], "method=best is not one of"),
        (["--hidden", "8", "--cluster", "nowhere"], "--cluster=nowhere cannot be read"),
        (["--hidden", "8", "--fit", "--ranks", "1"], "at least two ranks"),
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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nodes: 4", "it knows devices_per_node, intra, inter"),
        ("intra: {latency: 4}", "it knows latency_us, gigabytes_per_second"),
        ("intra: {gigabytes_per_second: 0}", "gigabytes_per_second=0 is no positive number"),
        ("inter: {latency_us: fast}", "latency_us=fast is no positive number"),
        ("devices_per_node: 0", "devices_per_node=0 is no positive whole number"),
        ("- 1", "it knows"),
        ("{", "is no YAML"),
    ],
)
def test_mistakes_in_a_description(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_cluster(tmp_path / "cluster.yaml")


def test_a_description_keeps_defaults(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("inter: {latency_us: 1}")
    assert load_cluster(tmp_path / "cluster.yaml") == Cluster(
        8, Cluster().intra, Link(1, Cluster().inter.gigabytes_per_second)
    )
