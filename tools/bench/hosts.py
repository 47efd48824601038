"""A cluster of hosts on one machine, for root: each has a network, name, processes and /tmp of its own, and an sshd.

    python -m occult_train.tools.bench.hosts --hosts 2 --rate 200mbit          # a shell on the first of them

Hosts are called node0, node1, ...; each reaches every other by ssh without a password. The rest of the disk is shared.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer

from occult_train.errors import UserError
from occult_train.tools.bench import networks

PROGRAMS = {"ip": "iproute2", "tc": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh"}
"""What a cluster is made of, by the package that brings it."""
START_SECONDS = 20.0
SSH = """Host *
    IdentityFile {folder}/key
    UserKnownHostsFile {folder}/known_hosts
    StrictHostKeyChecking yes
    LogLevel ERROR
"""
SSHD = """ListenAddress {address}
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
PidFile none
"""
BEGIN = """set -e
mount --make-rprivate /
mount -t tmpfs tmpfs {private}
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
mount --bind {folder}/hosts /etc/hosts
mkdir -p /run/sshd
hostname {name}
exec {sshd} -D -e -f {folder}/sshd_config-{name}
"""
"""The first process of a host; all others of the host end with it."""


@dataclass(frozen=True)
class Host:
    """One of a cluster."""

    number: int
    pid: int
    """Of its first process, as the machine counts."""
    private: Path
    """A folder of the same path on each host, and of other content."""

    @property
    def name(self) -> str:
        """As the others call it."""
        return f"node{self.number}"

    @property
    def address(self) -> str:
        """In the cluster's network."""
        return networks.address(self.number)

    def command(self, *words: str, folder: str | Path = "/") -> list[str]:
        """The command that runs `words` on this host, in a folder."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--uts", "--net", "--pid"]
        return [*enter, "sh", "-c", 'cd "$0" && exec "$@"', str(folder), *words]

    def processes(self) -> list[psutil.Process]:
        """All that run on it but its sshd."""
        space = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for process in psutil.process_iter(["name", "status"]):
            with contextlib.suppress(OSError, psutil.Error):
                lives = process.info["status"] != psutil.STATUS_ZOMBIE and process.info["name"] != "sshd"
                if lives and os.readlink(f"/proc/{process.pid}/ns/pid") == space:
                    found.append(process)
        return found

    def cut_off(self, is_cut: bool = True) -> None:
        """Pull the plug of its network, or put it back."""
        networks.cut(self.number, is_cut)

    def lose(self) -> None:
        """Take its network, then end everything on it, as if its power had failed."""
        self.cut_off()
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(self.pid).kill()


def missing() -> str:
    """What this machine or user lacks for a cluster; empty for nothing."""
    packages = sorted({package for program, package in PROGRAMS.items() if _find(program) is None})
    if packages:
        return f"it needs {', '.join(packages)}: apt-get install {' '.join(packages)}"
    try:
        with networks.limited(1, "1gbit"):
            done = subprocess.run(_spaces(0, "true"), capture_output=True, text=True)
    except UserError as error:
        return str(error)
    return f"namespaces of one's own are not allowed: {done.stderr.strip()}" if done.returncode else ""


@contextlib.contextmanager
def cluster(count: int, rate: str = "", delay: str = "") -> Iterator[list[Host]]:
    """Hosts while the context lasts; whatever happens, nothing of them is left.

    Args:
        count: how many.
        rate: what each host sends and receives at most, as `tc` takes it; empty for no limit.
        delay: of what a host sends, as `tc` takes it; empty for none.

    Raises:
        UserError: something is not installed or not allowed, or a host did not come up; the message says what.
    """
    packages = sorted({package for program, package in PROGRAMS.items() if _find(program) is None})
    if packages:
        raise UserError(f"a cluster of hosts needs {', '.join(packages)}: apt-get install {' '.join(packages)}")
    with contextlib.ExitStack() as stack:
        stack.enter_context(networks.limited(count, rate, delay))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="occult-hosts-")))
        _write_files(folder, count)
        yield [stack.enter_context(_host(number, folder)) for number in range(count)]


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _write_files(folder: Path, count: int) -> None:
    """One key for all hosts and users, and what the hosts know of each other."""
    names = {f"node{number}": networks.address(number) for number in range(count)}
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True)
    public = (folder / "key.pub").read_text()
    (folder / "known_hosts").write_text(f"{','.join([*names, *names.values()])} {public}")
    (folder / "ssh_config").write_text(SSH.format(folder=folder))
    (folder / "hosts").write_text(
        "".join(["127.0.0.1 localhost\n", *(f"{address} {name}\n" for name, address in names.items())])
    )
    (folder / "private").mkdir()
    for name, address in names.items():
        (folder / f"sshd_config-{name}").write_text(SSHD.format(folder=folder, address=address))
        script = BEGIN.format(folder=folder, private=folder / "private", name=name, sshd=_find("sshd"))
        (folder / f"begin-{name}").write_text(script)


def _spaces(number: int, *words: str) -> list[str]:
    """A command with namespaces of its own, on a network; it ends with this process."""
    spaces = ["unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child=SIGKILL"]
    return ["setpriv", "--pdeathsig", "KILL", *networks.prefix(number), *spaces, *words]


@contextlib.contextmanager
def _host(number: int, folder: Path) -> Iterator[Host]:
    with (folder / f"log-node{number}").open("wb") as log:
        outer = subprocess.Popen(_spaces(number, "sh", str(folder / f"begin-node{number}")), stdout=log, stderr=log)
    host = None
    try:
        host = _await(outer, number, folder)
        yield host
    finally:
        outer.kill()  # and with it the host
        outer.wait()
        deadline = time.monotonic() + START_SECONDS
        while host is not None and psutil.pid_exists(host.pid) and time.monotonic() < deadline:
            time.sleep(0.02)


def _await(outer: "subprocess.Popen[bytes]", number: int, folder: Path) -> Host:
    """The host once its sshd listens."""
    log, deadline = folder / f"log-node{number}", time.monotonic() + START_SECONDS
    while outer.poll() is None and time.monotonic() < deadline:
        children = psutil.Process(outer.pid).children()
        if children and "Server listening" in log.read_text():
            return Host(number, children[0].pid, folder / "private")
        time.sleep(0.02)
    raise UserError(f"host node{number} did not come up: {log.read_text().strip()}")


def main(
    hosts: Annotated[int, typer.Option(min=1, max=16)] = 2,
    rate: Annotated[str, typer.Option(help="Of a host's link, each way, as tc takes it. Default: no limit.")] = "",
    delay: Annotated[str, typer.Option(help="Of what a host sends, as tc takes it. Default: none.")] = "",
) -> None:
    """Make a cluster, open a shell on its first host, and take everything away behind it."""
    with cluster(hosts, rate, delay) as made:
        names = " ".join(host.name for host in made)
        print(f"a shell on {made[0].name} of {names}; leave it and they are gone", flush=True)
        shell = made[0].command(os.environ.get("SHELL", "/bin/sh"), folder=Path.cwd())
        raise typer.Exit(subprocess.run(shell).returncode)


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
