"""Networks of their own for ranks of one machine, joined by links of a set rate: namespaces, a bridge, tc. For root."""

import contextlib
import os
import subprocess
from collections.abc import Iterator

import psutil

from occult_train.errors import UserError

SUBNET = "10.213.7"
"""First three numbers of the ranks' addresses; rank r has r + 1 behind them."""
INTERFACE = "eth0"
"""Of each rank, in its own network."""
BRIDGE, NAMESPACE = "ob", "occult-"
"""What names begin with; the maker's process id follows."""
BURST = "256kb"
QUEUE = "2s"
"""Waiting time that a link's queue holds: TCP shall be slowed down, not lose packets."""


def address(rank: int) -> str:
    """Of a rank."""
    return f"{SUBNET}.{rank + 1}"


def prefix(rank: int) -> tuple[str, ...]:
    """What a command begins with that runs on a rank's network."""
    return "ip", "netns", "exec", _namespace(rank)


@contextlib.contextmanager
def limited(ranks: int, rate: str, delay: str = "") -> Iterator[None]:
    """Networks for ranks while the context lasts. Each sends at most `rate` and receives at most `rate`.

    Args:
        rate: as `tc` takes it, e.g. 100mbit; empty for no limit.
        delay: of everything that a rank sends, as `tc` takes it, e.g. 1ms; empty for none. The kernel must have netem.

    Raises:
        UserError: iproute2 is not installed, or this user may not make networks; the message says what failed.
    """
    _remove_abandoned()
    with contextlib.ExitStack() as stack:
        _run("ip", "link", "add", _bridge(), "type", "bridge")
        stack.callback(_quietly, "ip", "link", "del", _bridge())
        _run("ip", "link", "set", _bridge(), "up")
        for rank in range(ranks):
            _run("ip", "netns", "add", _namespace(rank))
            stack.callback(_quietly, "ip", "netns", "del", _namespace(rank))
            # with a namespace its interfaces go too, but not at once
            stack.callback(_quietly, "ip", "link", "del", f"{_bridge()}-{rank}")
            _connect(rank, rate, delay)
        yield


def cut(rank: int, is_cut: bool = True) -> None:
    """Pull the plug of a rank's network, or put it back: nothing gets through, and nobody is told."""
    _run("ip", "link", "set", f"{_bridge()}-{rank}", *(("nomaster",) if is_cut else ("master", _bridge())))


def _remove_abandoned() -> None:
    """Remove networks whose maker was killed before it could."""
    for name in _names("netns", "list"):
        if name.startswith(NAMESPACE) and not _lives(name.removeprefix(NAMESPACE).split("-")[0]):
            _quietly("ip", "netns", "del", name)
    for name in _names("-o", "link", "show", "type", "bridge"):
        if name.startswith(BRIDGE) and not _lives(name.removeprefix(BRIDGE)):
            _quietly("ip", "link", "del", name)


def _names(*what: str) -> list[str]:
    """Names that `ip` lists: the first word of a line, or the second behind a number."""
    try:
        lines = subprocess.run(["ip", *what], capture_output=True, text=True).stdout.splitlines()
    except FileNotFoundError:
        return []
    words = [line.split() for line in lines]
    return [line[1].rstrip(":") if line[0].rstrip(":").isdigit() else line[0] for line in words if line]


def _lives(pid: str) -> bool:
    return not pid.isdigit() or psutil.pid_exists(int(pid))


def _connect(rank: int, rate: str, delay: str) -> None:
    """A pair of interfaces, one in the rank's network and one on the bridge; what each sends is limited."""
    inside, outside = prefix(rank), f"{_bridge()}-{rank}"
    shape = "tbf", "rate", rate, "burst", BURST, "latency", QUEUE
    _run("ip", "link", "add", outside, "type", "veth", "peer", "name", INTERFACE, "netns", _namespace(rank))
    _run("ip", "link", "set", outside, "master", _bridge(), "up")
    _run(*inside, "ip", "address", "add", f"{address(rank)}/24", "dev", INTERFACE)
    _run(*inside, "ip", "link", "set", INTERFACE, "up")
    _run(*inside, "ip", "link", "set", "lo", "up")
    if delay:
        _run(*inside, "tc", "qdisc", "add", "dev", INTERFACE, "root", "handle", "1:", "netem", "delay", delay)
    if rate:
        _run(*inside, "tc", "qdisc", "add", "dev", INTERFACE, *(("parent", "1:") if delay else ("root",)), *shape)
        _run("tc", "qdisc", "add", "dev", outside, "root", *shape)


def _bridge() -> str:
    return f"{BRIDGE}{os.getpid()}"  # names of interfaces have at most 15 letters


def _namespace(rank: int) -> str:
    return f"{NAMESPACE}{os.getpid()}-{rank}"


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not installed; on Debian or Ubuntu: apt-get install iproute2") from None
    if done.returncode:
        raise UserError(f"`{' '.join(command)}` failed, which networks for ranks need: {done.stderr.strip()}")


def _quietly(*command: str) -> None:
    subprocess.run(command, capture_output=True)
