"""What `occult doctor` makes of what hosts say, and of rates between them."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from occult_train import memory
from occult_train.config import Config, load
from occult_train.errors import ConfigError
from occult_train.launcher import hostfile
from occult_train.launcher.doctor import command, facts, judge, links, report
from occult_train.launcher.doctor import memory as needs
from occult_train.launcher.doctor.host import Facts, Host, ask, clock_ahead
from occult_train.launcher.plan import Options

GPU = {"name": "NVIDIA H100 80GB HBM3", "memory": 80 << 30, "memory_free": 79 << 30, "driver": "570.1"}
WELL = Facts(
    name="a",
    folder=True,
    versions={"python": "3.11.7", "occult_train": "0.1.0 (0123abcd)", "torch": "2.13.0", "numpy": "2.4.6"},
    cores=16,
    memory=100 << 30,
    memory_free=90 << 30,
    disk_free=10**12,
    shared_memory_free=10**11,
    gpus=[GPU] * 2,
    gpu_links=["NV18"],
    networks={"eth0": "10000 Mb/s"},
)
TOPOLOGY = """
\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-47\t0\t\tN/A
GPU1\tNV18\t X \tNV18\tNODE\t0-47\t0\t\tN/A
GPU2\tSYS\tNV18\t X \tPHB\t0-47\t0\t\tN/A
NIC0\tPIX\tNODE\tPHB\t X

Legend:
  X    = Self
"""


def host(name: str = "a", **changes: Any) -> Host:
    """One that is well but for some facts."""
    return Host(name, [0, 1], replace(WELL, **changes), clock=(-0.1, 0.3))


def printed(table: Any) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


# ---------------------------------------------------------------- facts


def test_gpus_and_their_links_are_read_off_nvidia_smi() -> None:
    text = "NVIDIA H100 80GB HBM3, 81559, 81000, 570.86\nNVIDIA H100 80GB HBM3, 81559, [N/A], 570.86\n\nfailed\n"
    expected = {"memory": 81559 << 20, "memory_free": 81000 << 20, "driver": "570.86"}
    assert facts.gpus(text) == [{"name": "NVIDIA H100 80GB HBM3", **expected}]
    assert facts.gpus("") == []
    assert facts.gpu_links(TOPOLOGY) == ["NV18", "SYS"]
    assert facts.gpu_links("") == []


def test_networks_are_read_off_the_kernels_files(tmp_path: Path) -> None:
    for path, text in (
        ("net/eth0/speed", "10000\n"),
        ("net/lo/speed", "-1\n"),
        ("net/bond/speed", ""),
        ("infiniband/mlx5_0/ports/1/rate", "400 Gb/sec (4X NDR)\n"),
    ):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text)
    assert facts.networks(tmp_path) == {"eth0": "10000 Mb/s", "mlx5_0:1": "400 Gb/sec (4X NDR)"}


def test_a_program_that_is_missing_or_fails_says_nothing() -> None:
    assert facts.said("no-such-program") == ""
    assert facts.said(sys.executable, "-c", "print(1); raise SystemExit(3)") == ""
    assert facts.said(sys.executable, "-c", "print(1)") == "1\n"


def test_disk_is_looked_at_where_a_path_would_begin(tmp_path: Path) -> None:
    assert facts.free(tmp_path / "not" / "yet") == pytest.approx(facts.free(tmp_path), rel=0.01)


def test_this_machine_answers() -> None:
    (found,) = ask({"localhost": [0]}, ".")
    assert found.trouble == ""
    assert found.facts is not None
    assert found.facts.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found.facts.versions["torch"]
    assert found.facts.folder
    assert found.clock[0] <= 0 <= found.clock[1]
    assert 0 < found.facts.memory_free <= found.facts.memory


@pytest.mark.parametrize(
    "script, expected",
    [
        ("echo 'ssh: connect to host b port 22: Connection refused' >&2; exit 255", "ssh: connect to host b port 22"),
        ("echo 'env: python: No such file' >&2; exit 127", "there: env: python: No such file"),
        ("cat > /dev/null; echo Welcome!", "its answer cannot be read: 'Welcome!'"),
        ("cat > /dev/null", "its answer cannot be read: ''"),
        ("sleep 20", "no answer within 1 s"),
    ],
)
def test_a_host_that_does_not_answer_is_a_line(
    script: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "ssh"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(hostfile, "is_this_machine", lambda host: False)
    monkeypatch.setattr("occult_train.launcher.doctor.host.ASK_SECONDS", 1 if "sleep" in script else 15)
    (found,) = ask({"b": [0]}, ".")
    assert found.facts is None
    assert expected in found.trouble
    (line,) = judge.of_hosts([found])
    assert line.startswith(f"b: {found.trouble}; ")
    assert "none !" in printed(report.hosts_table([found]))


def test_greetings_before_the_answer_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "ssh"
    fake.write_text(f"#!/bin/sh\necho Welcome!\nexec {sys.executable} - {tmp_path} .\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(hostfile, "is_this_machine", lambda host: False)
    (found,) = ask({"b": [0]}, ".")
    assert found.trouble == ""


# ---------------------------------------------------------------- judging hosts


def test_hosts_that_are_well() -> None:
    assert judge.of_hosts([host("a"), host("b")]) == []


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"versions": WELL.versions | {"torch": "2.12.0"}}, "torch 2.12.0, elsewhere 2.13.0; install the same"),
        ({"versions": WELL.versions | {"numpy": ""}}, "numpy is missing, elsewhere 2.4.6; install the same"),
        ({"folder": False}, "the folder in which this was typed does not exist there; make it, or share the disk"),
        ({"disk_free": 10**9}, "1.0 GB of disk are free, 5.0 are wanted; make room"),
        ({"memory_free": 1 << 30}, "1.1 of 107.4 GB of memory are free; who takes it?"),
        ({"shared_memory_free": 64 << 20}, "0.07 GB of /dev/shm are free, which NCCL needs; containers take"),
        ({"gpus": [GPU]}, "slot 1 is to be used but there are 1 GPUs; correct the hostfile"),
        ({"gpus": [GPU, GPU | {"memory_free": 10 << 30}]}, "GPU 1: 75.2 of 85.9 GB are taken; see nvidia-smi there"),
        ({"gpus": [GPU | {"name": "A100"}] * 2}, "GPUs A100, elsewhere NVIDIA H100 80GB HBM3; use hosts of one kind"),
        ({"gpus": [GPU | {"driver": "535"}] * 2}, "driver 535, elsewhere 570.1; use hosts of one kind"),
        ({"gpu_links": ["SYS"]}, "GPU links SYS, elsewhere NV18; use hosts of one kind"),
    ],
)
def test_what_is_wrong_with_one_host_is_named_once(changes: dict[str, Any], expected: str) -> None:
    (line,) = judge.of_hosts([host("a"), host("b", **changes), host("c")])
    assert line.startswith(f"b: {expected}")


def test_a_host_without_our_package_is_told_how() -> None:
    found = judge.of_hosts([host("a"), host("b", versions=WELL.versions | {"occult_train": ""}), host("c")])
    assert found[0] == "b: occult_train cannot be imported there; install it, or share the folder that holds it"


@pytest.mark.parametrize(
    "clock, expected",
    [
        ((-0.2, 0.4), None),
        ((-0.9, 5.0), None),  # nobody can tell
        ((1.5, 2.5), "its clock is 2.0 s ahead of this machine's; let chrony or ntpd set it"),
        ((-3700.2, -3599.8), "its clock is 3650.0 s behind this machine's; let chrony or ntpd set it"),
    ],
)
def test_clocks(clock: tuple[float, float], expected: str | None) -> None:
    found = judge.of_hosts([replace(host("b"), clock=clock)])
    assert found == ([] if expected is None else [f"b: {expected}"])


def test_a_clock_is_bounded_by_question_and_answer() -> None:
    """Asked at 100.0, it began at 107.2 and ended at 107.9 by its own clock; the answer came at 101.0."""
    assert clock_ahead((100.0, 101.0), (107.2, 107.9)) == pytest.approx((6.9, 7.2))


def test_what_differs_is_marked_in_the_table() -> None:
    hosts = [host("a"), host("b", versions=WELL.versions | {"torch": "2.12.0"}, cores=8), host("c")]
    lines = printed(report.hosts_table(hosts)).splitlines()
    assert [("!" in line) for line in lines if line.strip()[:1] in ("a", "b", "c") and "GB" in line] == [0, 1, 0]
    (marked,) = [line for line in lines if "!" in line]
    assert "8 !" in marked
    assert "torch 2.12.0 !" in marked
    assert "2 x NVIDIA H100 80GB HBM3, NV18" in marked
    assert report.usual_line(hosts).startswith("usual: python 3.11.7, occult_train 0.1.0 (0123abcd), torch 2.13.0")


# ---------------------------------------------------------------- links


@pytest.mark.parametrize("players", range(1, 10))
def test_everybody_meets_everybody_once_and_nobody_twice_in_a_round(players: int) -> None:
    rounds = links.tournament(players)
    for pairs in rounds:
        met = [player for pair in pairs for player in pair]
        assert len(met) == len({*met})
    met = sorted(pair for pairs in rounds for pair in pairs)
    assert met == [(i, j) for i in range(players) for j in range(i + 1, players)]
    assert len(rounds) <= max(1, players - 1 + players % 2)


def rates(size: int, slow: dict[tuple[int, int], float], usual: float = 10.0) -> list[list[float]]:
    """A matrix whose named pairs have other rates."""
    return [[0.0 if i == j else slow.get((min(i, j), max(i, j)), usual) for j in range(size)] for i in range(size)]


@pytest.mark.parametrize(
    "slow, expected",
    [
        ({}, []),
        ({(1, 3): 7.0}, []),
        ({(1, 3): 2.0}, ["slow link between b and d: 2 GB/s in all-reduce where others have 10"]),
        (
            {(0, 2): 2.0, (1, 2): 2.0, (2, 3): 2.0},
            ["slow link of c, with every other: 2 GB/s in all-reduce where others have 10"],
        ),
    ],
)
def test_slow_links_are_named(slow: dict[tuple[int, int], float], expected: list[str]) -> None:
    found = judge.of_links("abcd", rates(4, slow), rates(4, slow))
    assert [line.split(";")[0] for line in found] == expected


def test_one_host_of_three_may_be_slow_with_both_others() -> None:
    slow = rates(3, {(0, 1): 1.0, (1, 2): 1.0})
    (line,) = judge.of_links("abc", slow, slow)
    assert line.startswith("slow link of b, with every other")


def test_two_hosts_have_nothing_to_compare() -> None:
    assert judge.of_links("ab", rates(2, {(0, 1): 0.001}), rates(2, {})) == []


def test_a_link_that_is_slow_in_all_to_all_alone() -> None:
    (line,) = judge.of_links("abcd", rates(4, {(0, 1): 1.0}), rates(4, {}))
    assert line.startswith("slow link between a and b: 1 GB/s in all-to-all where others have 10")


def test_pairs_that_were_not_measured_are_not_slow() -> None:
    missing = rates(4, {(0, 1): 0.0})
    assert judge.of_links("abcd", missing, missing) == []
    assert printed(report.links_table("abcd", {"all_to_all": missing, "all_reduce": missing})).count("·") == 6


def test_of_many_sides_the_slowest_partner_is_shown() -> None:
    names = [f"host{i}" for i in range(20)]
    matrix = rates(20, {(3, 7): 1.0})
    text = printed(report.links_table(names, {"all_to_all": matrix, "all_reduce": matrix}))
    assert [line.split()[1] for line in text.splitlines() if line.split()[:1] in (["host3"], ["host7"])] == [
        "host7",
        "host3",
    ]


# ---------------------------------------------------------------- memory


def _large() -> Config:
    config = Config()
    config.model.vocab_size = 50304
    return config


def test_memory_is_judged_by_each_gpu() -> None:
    config = _large()
    full = memory.estimate(config, 4, "cuda").total
    tight = GPU | {"memory_free": int(full * 1.02)}
    hosts = [host("a"), host("b", gpus=[GPU | {"memory_free": int(full * 1.2)}, tight])]
    need = needs.estimate(config, 4, hosts)
    wide = [line for line in need.findings if line.startswith("a")]
    assert len(wide) == (2 if full > needs.SHARE * GPU["memory_free"] else 0)
    (line,) = [line for line in need.findings if line.startswith("b")]
    assert line.startswith(f"b GPU 1: a rank needs {full / 1e9:.1f} GB, {full * 1.02 / 1e9:.1f} are free; try train.")


def test_memory_of_hosts_without_gpus_is_shared_by_their_ranks() -> None:
    config = _large()
    config.model.num_hidden_layers = 1
    full = memory.estimate(config, 2, "cpu").total
    hosts = [host("a", gpus=[], memory_free=int(2.2 * full)), host("b", gpus=[], memory_free=int(1.9 * full))]
    (line,) = needs.estimate(config, 2, hosts).findings
    assert line.startswith(f"b: 2 ranks need {2 * full / 1e9:.1f} GB")


def test_settings_that_cannot_run_on_the_hosts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"2 ranks are not divisible by parallel\.expert=4"):
        needs.estimate(load(["parallel.expert=4", "model.vocab_size=64"]), 2, [host()])


def test_checkpoints_need_disk() -> None:
    config = load(["model.vocab_size=64", "checkpoint.keep=3"])
    assert needs.estimate(config, 1, []).disk == 4 * 12 * config.model.num_params()


# ---------------------------------------------------------------- the command


def test_what_ranks_print_is_found_among_other_lines() -> None:
    found = {"across": {}, "inside": [], "complete": True, "device": "cpu"}
    text = f"node0: noise\nnode0: {links.MARK}{json.dumps(found)}\nnode1: more"
    assert command._read(text) == (found, "")
    assert "fewer hosts" in command._read(text.replace("true", "false"))[1]
    failed = f'{links.MARK}{{"error": "RuntimeError: no route"}}\nTraceback'
    assert command._read(failed)[1].endswith("RuntimeError: no route")
    assert command._read("x\nModuleNotFoundError: No module named 'torch'\n")[1].endswith("named 'torch'")


def test_this_machine_alone(tmp_path: Path) -> None:
    """Through the whole command: two ranks are started, meet and measure."""
    words = ["doctor", "--json", "out.json"]
    done = subprocess.run(
        [sys.executable, "-m", "occult_train.launcher.cli", *words], cwd=tmp_path, capture_output=True, text=True
    )
    found = json.loads((tmp_path / "out.json").read_text())
    assert done.returncode == (0 if found["well"] else 1), done.stdout + done.stderr
    assert found["links"]["complete"]
    size = len(found["hosts"][0]["slots"])
    assert size == 1 or found["links"]["inside"][0]["all_reduce"][0][1] > 0
    assert ("all is well" in done.stdout) == found["well"]


def test_hosts_that_do_not_answer_are_left_out_of_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hosts"
    path.write_text("a slots=2\nb slots=2\nc slots=2\n")
    asked: list[hostfile.Slots] = []

    def answers(slots: hostfile.Slots, output: str) -> list[Host]:
        asked.append(slots)
        return [host("a"), Host("b", [0, 1], trouble="no answer within 15 s"), host("c")]

    def measures(options: Options, hosts: list[Host]) -> tuple[dict[str, Any], str]:
        started.append([host.name for host in hosts])
        return {}, ""

    started: list[list[str]] = []
    monkeypatch.setattr(command, "ask", answers)
    monkeypatch.setattr(command, "_measure", measures)
    assert command.examine([], Options(hostfile=str(path), exclude="a:1"), tmp_path / "out.json") == 1
    assert asked == [{"a": [0], "b": [0, 1], "c": [0, 1]}]
    assert started == [["a", "c"]]
    findings = json.loads((tmp_path / "out.json").read_text())["findings"]
    assert findings == ["b: no answer within 15 s; is it up, and does `ssh b true` work without a password?"]
