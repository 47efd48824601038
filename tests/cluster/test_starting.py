"""Runs on several hosts, started in every way that the README names."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from host_runs import BIN, OCCULT, TELLING, typed

from occult_train.tools.bench import hosts, networks
from occult_train.tools.bench.hosts import Host


def notes(folder: Path) -> list[str]:
    """What ranks said, in order."""
    found = sorted((folder / "run").glob("note-*"), key=lambda path: int(path.name.removeprefix("note-")))
    return [path.read_text() for path in found]


def losses(run: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of each logged step."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records if r["kind"] == "step"]


def test_hosts_have_their_own_names_networks_processes_and_files(allowed: None, tmp_path: Path) -> None:
    """Of the cluster itself: what is done on one host is seen there alone, the shared disk is shared, and all of it is
    gone afterwards."""
    with hosts.cluster(2) as made:
        one, other = made
        assert typed(one, ["hostname"], tmp_path).out == "node0\n"
        assert typed(one, ["ssh", "node1", "hostname; hostname -I"], tmp_path).out.split() == ["node1", "10.213.7.2"]
        typed(one, ["touch", str(one.private / "mine"), str(tmp_path / "ours")], tmp_path)
        assert typed(one, ["ls", str(one.private)], tmp_path).out == "mine\n"
        assert typed(other, ["ls", str(one.private)], tmp_path).out == ""
        assert typed(other, ["ls", "ours"], tmp_path).out == "ours\n"
        assert [len(host.processes()) for host in made] == [0, 0]
        sleeper = subprocess.Popen(one.command("sleep", "600"))
        assert typed(other, ["pgrep", "sleep"], tmp_path).code == 1
        while not one.processes():
            pass
        other.cut_off()
        assert typed(one, ["ssh", "-o", "ConnectTimeout=1", "node1", "true"], tmp_path).code == 255
        other.cut_off(False)
        assert typed(one, ["ssh", "node1", "true"], tmp_path).code == 0
    assert sleeper.wait(timeout=10) != 0
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert networks.prefix(0)[-1] not in left
    assert not made[0].private.exists()


RECEIVE = """import socket, sys, time
with socket.create_server((sys.argv[1], 9000)) as server:
    print("listening", flush=True)
    sender, _ = server.accept()
    start = time.monotonic() if sender.recv(1) else 0
    while sender.recv(1 << 16):
        pass
    print(time.monotonic() - start)
"""
SEND = """import socket, sys
with socket.create_connection((sys.argv[1], 9000)) as receiver:
    receiver.sendall(bytes(4_000_000))
"""


def seconds_of_four_megabytes(sender: Host, receiver: Host) -> float:
    """From the first byte to the last."""
    listening = receiver.command(sys.executable, "-c", RECEIVE, receiver.address)
    with subprocess.Popen(listening, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "listening\n"
        assert subprocess.run(sender.command(sys.executable, "-c", SEND, receiver.address), check=False).returncode == 0
        return float(process.stdout.readline())


def test_a_clusters_links_are_as_slow_as_asked(allowed: None) -> None:
    """4 MB at 40 Mbit/s take 0.8 s, of which the buckets at both ends of a link spare at most 0.11 s."""
    with hosts.cluster(2, rate="40mbit") as made:
        assert seconds_of_four_megabytes(*made) > 0.68
        assert seconds_of_four_megabytes(made[0], made[0]) < 0.5


def test_ranks_on_two_hosts_find_each_other_over_pdsh(two: list[Host], folder: Path) -> None:
    """Started from a folder of its own, with settings that a remote shell must not touch; variables of the file that
    DeepSpeed reads reach all hosts."""
    (folder / "hosts").write_text("node0 slots=1\nnode1 slots=1\n")
    (folder / ".deepspeed_env").write_text("TOLD=by-file\n")
    words = ["train", "--hostfile", "hosts", "a.yaml", "output=run", "parallel.expert=2", "data.tokenizer='$HOME;*'"]
    ended = typed(two[0], [*TELLING, *words], folder)
    assert ended.code == 0, ended.out
    told = f"by-file {folder.name} $HOME;*"
    assert notes(folder) == [f"0 0 node0 1 {told}", f"1 0 node1 1 {told}"]
    assert [host.processes() for host in two] == [[], []]


def test_a_line_of_deepspeeds_environment_file_that_it_cannot_read(two: list[Host], folder: Path) -> None:
    (folder / ".deepspeed_env").write_text("TOLD=by-file\nPATH\n")
    ended = typed(two[0], [*TELLING, "train", "--hostfile", "hosts", "a.yaml", "output=run"], folder)
    assert (ended.code, ended.out) == (2, "error: .deepspeed_env:2: 'PATH' is not of the form NAME=value\n")


@pytest.mark.cluster
@pytest.mark.parametrize(
    "words, expected",
    [
        (["--exclude", "node0:1@node1:0"], ["0 0 node0 1", "1 0 node1 1"]),
        (["--include", "node1"], ["0 0 node1 1", "1 1 node1 1"]),
        (["--launcher", "mpich", "--include", "node1"], ["0 0 node1 1", "1 1 node1 1"]),
        (["--launcher", "mpich", "--exclude", "node0:1@node1:1"], ["0 0 node0 1", "1 0 node1 1"]),
        (["--launcher", "mpich"], ["0 0 node0 6", "1 1 node0 6", "2 0 node1 6", "3 1 node1 6"]),
    ],
)
def test_slots_and_launchers(two: list[Host], folder: Path, words: list[str], expected: list[str]) -> None:
    settings = ["a.yaml", "output=run", f"parallel.expert={len(expected)}"]
    ended = typed(two[0], [*TELLING, "train", "--hostfile", "hosts", *words, *settings], folder)
    assert ended.code == 0, ended.out
    assert [note.rsplit(" ", 3)[0] for note in notes(folder)] == expected
    assert [host.processes() for host in two] == [[], []]


@pytest.mark.cluster
def test_each_host_keeps_the_logs_of_its_ranks(two: list[Host], folder: Path) -> None:
    logs = two[0].private / "logs"
    words = ["--hostfile", "hosts", "--deepspeed-args", f"--enable_each_rank_log {logs}"]
    ended = typed(two[0], [*TELLING, "train", *words, "a.yaml", "output=run"], folder)
    assert ended.code == 0, ended.out
    assert "here is" not in ended.out
    for number, host in enumerate(two):
        said = typed(host, ["sh", "-c", f"cat {logs}/*"], folder).out
        assert sorted(line for line in said.splitlines() if "here is" in line) == [
            f"here is {2 * number + local} {local} node{number} 6 - {folder.name} -" for local in (0, 1)
        ]


@pytest.mark.cluster
def test_every_way_of_starting_gives_the_same_run(two: list[Host], folder: Path) -> None:
    """One host and two, through `occult`, `deepspeed` and mpirun (which mpi4py then finds)."""
    rank = "occult_train.train"
    starts = {
        "one": [*OCCULT, "train"],
        "pdsh": [*OCCULT, "train", "--hostfile", "hosts"],
        "mpich": [*OCCULT, "train", "--hostfile", "hosts", "--launcher", "mpich"],
        "hand": [str(BIN / "deepspeed"), "--hostfile", "hosts", "--module", rank],
        "mpirun": [str(BIN / "mpirun"), "-hosts", "node0,node1", "-ppn", "2", "-n", "4", sys.executable, "-m", rank],
    }
    found = {}
    for name, words in starts.items():
        # these hosts share a kernel, by which UCX takes them for one machine with shared memory
        ended = typed(two[0], [*words, "a.yaml", f"output={name}", "moe.dispatcher=dedup"], folder, UCX_TLS="tcp")
        assert ended.code == 0, ended.out
        found[name] = losses(folder / name)
        assert [step for step, _, _ in found[name]] == [1, 2, 3]
    assert all(one == found["one"] for one in found.values())


@pytest.mark.cluster
def test_only_checkpoints_need_a_disk_that_hosts_share(two: list[Host], folder: Path) -> None:
    """The run's folder is each host's own but for its checkpoints; a failure is noted on every host."""
    run, shared = two[0].private / "run", folder / "shared"
    shared.mkdir()
    for host in two:
        assert typed(host, ["mkdir", str(run)], folder).code == 0
        assert typed(host, ["ln", "-s", str(shared), str(run / "checkpoints")], folder).code == 0
    words = [*OCCULT, "train", "--hostfile", "hosts", "a.yaml", f"output={run}", "moe.dispatcher=dedup"]
    for steps in (3, 5):
        ended = typed(two[0], [*words, f"train.steps={steps}"], folder)
        assert ended.code == 0, ended.out
    assert f"continuing {run}/checkpoints/step-00000003 at step 3" in ended.out
    assert (shared / "step-00000005" / "checkpoint.json").exists()
    assert typed(two[1], ["ls", str(run)], folder).out.split() == ["checkpoints"]
    ended = typed(two[0], [*words, "train.steps=7", "optimizer.lr=1e30", "scheduler.warmup_steps=0"], folder)
    assert ended.code == 1, ended.out
    for host in two:
        assert "kind: diverged" in typed(host, ["sh", "-c", f"cat {run}/errors/*"], folder).out
