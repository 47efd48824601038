"""Networks of their own for ranks of one machine, joined by links of a set rate: namespaces, a bridge, tc. For root."""

import contextlib
import os
import subprocess
from collections.abc import Iterator

from occult_train.errors import UserError

SUBNET = "10.213.7"
"""First three numbers of the ranks' addresses; rank r has r + 1 behind them."""
INTERFACE = "eth0"
"""Of each rank, in its own network."""
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
def limited(ranks: int, rate: str) -> Iterator[None]:
    """Networks for ranks while the context lasts. Each sends at most `rate` and receives at most `rate`.

    Args:
        rate: as `tc` takes it, e.g. 100mbit.

    Raises:
        UserError: iproute2 is not installed, or this user may not make networks; the message says what failed.
    """
    with contextlib.ExitStack() as stack:
        _run("ip", "link", "add", _bridge(), "type", "bridge")
        stack.callback(_quietly, "ip", "link", "del", _bridge())
        _run("ip", "link", "set", _bridge(), "up")
        for rank in range(ranks):
            _run("ip", "netns", "add", _namespace(rank))
            stack.callback(_quietly, "ip", "netns", "del", _namespace(rank))
            _connect(rank, rate)
        yield


def _connect(rank: int, rate: str) -> None:
    """A pair of interfaces, one in the rank's network and one on the bridge; what each sends is limited."""
    inside, outside = prefix(rank), f"{_bridge()}-{rank}"
    shape = "root", "tbf", "rate", rate, "burst", BURST, "latency", QUEUE
    _run("ip", "link", "add", outside, "type", "veth", "peer", "name", INTERFACE, "netns", _namespace(rank))
    _run("ip", "link", "set", outside, "master", _bridge(), "up")
    _run(*inside, "ip", "address", "add", f"{address(rank)}/24", "dev", INTERFACE)
    _run(*inside, "ip", "link", "set", INTERFACE, "up")
    _run(*inside, "ip", "link", "set", "lo", "up")
    _run(*inside, "tc", "qdisc", "add", "dev", INTERFACE, *shape)
    _run("tc", "qdisc", "add", "dev", outside, *shape)


def _bridge() -> str:
    return f"ob{os.getpid()}"  # names of interfaces have at most 15 letters


def _namespace(rank: int) -> str:
    return f"occult-{os.getpid()}-{rank}"


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not installed; on Debian or Ubuntu: apt-get install iproute2") from None
    if done.returncode:
        raise UserError(f"`{' '.join(command)}` failed, which networks for ranks need: {done.stderr.strip()}")


def _quietly(*command: str) -> None:
    subprocess.run(command, capture_output=True)
