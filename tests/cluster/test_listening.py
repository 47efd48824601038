"""What listens while a run trains: rank 0's store and gloo, at the hosts' addresses of the hostfile, and nothing that
another network reaches."""

import re
import subprocess
import time
from pathlib import Path

import pytest
from host_runs import FAULTY, environment

from occult_train.tools.bench import networks
from occult_train.tools.bench.hosts import Host

pytestmark = pytest.mark.cluster
SETTINGS = ["--hostfile", "hosts", "--master-port", "29611", "a.yaml", "output=run", "parallel.expert=2"]


def listening(host: Host) -> list[tuple[str, str]]:
    """Program and address of each socket that listens on a host, for TCP or UDP."""
    words = host.command("ss", "-Hltunp")
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    found = []
    for line in lines:
        program = re.search(r'users:\(\("([^"]+)"', line)
        found.append((program[1] if program else "?", line.split()[4]))
    return sorted(found)


def test_nothing_listens_beyond_what_ranks_need(two: list[Host], one_rank_each: Path) -> None:
    """Both hosts also have a network that no rank is on."""
    for host in two:
        subprocess.run(host.command("ip", "address", "add", "192.0.2.7/24", "dev", networks.INTERFACE), check=True)
    before = [listening(host) for host in two]
    assert before == [[("sshd", f"{host.address}:22")] for host in two]
    (one_rank_each / "run").mkdir()
    (one_rank_each / "run" / "fault.json").write_text('{"kind": "carry_on", "rank": 0, "step": 2, "pause": 0.5}')
    words = [*FAULTY, "train", *SETTINGS, "train.steps=40"]
    with subprocess.Popen(
        two[0].command(*words, folder=one_rank_each),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not (one_rank_each / "run" / "reached").exists():
            assert process.poll() is None, process.stdout and process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        found = [[entry for entry in listening(host) if entry[0] != "sshd"] for host in two]
        process.terminate()
        process.communicate(timeout=120)
    for host, entries in zip(two, found, strict=True):
        assert entries, "ranks listen for each other"
        for program, address in entries:
            assert program.startswith(("python", "pt_")), (host.name, entries)
            assert address.rsplit(":", 1)[0] == host.address, (host.name, entries)
    assert f"{two[0].address}:29611" in [address for _, address in found[0]]
    assert [host.processes() for host in two] == [[], []]
