"""`occult doctor` on hosts of which one has something wrong."""

import importlib.metadata
import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from host_runs import OCCULT, Ended, typed

from occult_train.tools.bench import hosts, networks

pytestmark = pytest.mark.cluster
BOUND = 120.0
"""Seconds, of which it takes 18 for two hosts and 40 for four on two cores that have nothing else to do."""


def doctor(made: list[hosts.Host], folder: Path, *words: str) -> tuple[Ended, dict[str, Any]]:
    """What it prints and what it writes, on hosts of one slot."""
    (folder / "hosts").write_text("".join(f"{host.name} slots=1\n" for host in made))
    began = time.monotonic()
    ended = typed(made[0], [*OCCULT, "doctor", "--hostfile", "hosts", "--json", "out.json", *words], folder)
    assert time.monotonic() - began < BOUND, ended.out
    return ended, json.loads((folder / "out.json").read_text())


def wrong(ended: Ended) -> list[str]:
    """What was found."""
    return [line.removeprefix("wrong: ") for line in ended.out.splitlines() if line.startswith("wrong: ")]


def test_two_hosts_that_are_well(allowed: None, tmp_path: Path) -> None:
    """Of a link of 25 MB/s each way; gloo's all-to-all mostly sends one way at a time."""
    with hosts.cluster(2, rate="200mbit") as made:
        ended, found = doctor(made, tmp_path)
        assert [host.processes() for host in made] == [[], []]
    assert (ended.code, wrong(ended), ended.out.splitlines()[-1]) == (0, [], "all is well"), ended.out
    assert found["well"] is True
    assert [host["facts"]["name"] for host in found["hosts"]] == ["node0", "node1"]
    across = found["links"]["across"]
    assert 0.018 < across["all_reduce"][0][1] < 0.035
    assert 0.009 < across["all_to_all"][1][0] < 0.035
    assert across["all_reduce"][0][0] == 0


def test_the_host_with_the_slow_link_is_named(allowed: None, tmp_path: Path) -> None:
    with hosts.cluster(4, rate="200mbit") as made:
        shape = ["tbf", "rate", "40mbit", "burst", networks.BURST, "latency", networks.QUEUE]
        change = ["tc", "qdisc", "replace", "dev", networks.INTERFACE, "root", *shape]
        subprocess.run(made[2].command(*change), check=True)
        ended, found = doctor(made, tmp_path)
    assert ended.code == 1, ended.out
    (line,) = wrong(ended)
    assert line.startswith("slow link of node2, with every other: 0.00"), ended.out
    assert found["findings"] == [line]


def test_a_host_that_cannot_be_reached_and_one_of_another_version(allowed: None, tmp_path: Path) -> None:
    """The links between the others are measured all the same."""
    (metadata,) = [path for path in importlib.metadata.files("safetensors") or [] if path.name == "METADATA"]
    other = tmp_path / "METADATA"
    text = str(metadata.locate().read_text())
    other.write_text(text.replace(f"\nVersion: {importlib.metadata.version('safetensors')}\n", "\nVersion: 0.5.3\n"))
    with hosts.cluster(3, rate="200mbit") as made:
        subprocess.run(made[1].command("mount", "--bind", str(other), str(metadata.locate())), check=True)
        made[2].cut_off()
        ended, found = doctor(made, tmp_path)
        alone, _ = doctor(made, tmp_path, "--include", "node0")
    assert ended.code == 1, ended.out
    lost, differs = wrong(ended)
    assert re.match("node2: ssh: connect to host node2 port 22: (No route to host|Connection timed out); is", lost)
    expected = f"node1: safetensors 0.5.3, elsewhere {importlib.metadata.version('safetensors')}; install the same"
    assert differs == expected, ended.out
    assert found["links"]["across"]["all_reduce"][0][1] > 0.01
    assert (alone.code, wrong(alone)) == (0, []), alone.out


def test_a_run_that_is_too_large_for_the_hosts(allowed: None, tmp_path: Path) -> None:
    settings = ["model.hidden_size=8192", "model.vocab_size=50304", "train.global_batch_size=2", "parallel.expert=2"]
    with hosts.cluster(2, rate="200mbit") as made:
        ended, found = doctor(made, tmp_path, *settings)
    assert ended.code == 1, ended.out
    assert [line.split(" need ")[0] for line in wrong(ended) if "ranks" in line] == ["node0: 1 ranks", "node1: 1 ranks"]
    assert found["memory"]["rank"]["weights"] > 30e9
