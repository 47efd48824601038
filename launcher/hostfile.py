"""The hostfile (`HOST slots=N` a line) and the slots of it that a launch uses, checked before DeepSpeed sees them.

DeepSpeed answers a mistake here with a traceback, or not at all: it takes `slots=4x` for 4, and starts on this machine
what was meant for the only host left by a filter.
"""

import re
import socket
from pathlib import Path

from occult_train.errors import UserError

DEFAULT_HOSTFILE = "/job/hostfile"
"""DeepSpeed's own default, used if it exists."""
LINE = re.compile(r"(?P<host>[^\s#]+)\s+slots=(?P<slots>\d+)(\s+max[-_]slots=\d+)?\s*(#.*)?")
NODE = re.compile(r"(?P<host>[^\s:@]+)(:(?P<slots>\d+(,\d+)*))?")

Slots = dict[str, list[int]]
"""Slot numbers in use, by host, in the hostfile's order."""


def read(path: str) -> Slots:
    """All hosts of a file with all their slots.

    Raises:
        UserError: it is missing, empty, or has a bad line; the message names file, line and text.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"hostfile {path} cannot be read: {reason}") from None
    hosts: Slots = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        host, slots = _parse_line(text, f"{path}:{number}")
        if host in hosts:
            raise UserError(f"{path}:{number}: {text!r} lists host {host} a second time")
        hosts[host] = list(range(slots))
    if not hosts:
        raise UserError(f"hostfile {path} lists no hosts; a line looks like: node1 slots=8")
    return hosts


def _parse_line(text: str, where: str) -> tuple[str, int]:
    match = LINE.fullmatch(text)
    if match is None:
        raise UserError(f"{where}: {text!r} is not of the form HOST slots=N, e.g. node1 slots=8")
    if int(match["slots"]) == 0:
        raise UserError(f"{where}: {text!r} gives host {match['host']} no slots")
    return match["host"], int(match["slots"])


def select(hosts: Slots, include: str = "", exclude: str = "", num_nodes: int = 0, num_gpus: int = 0) -> Slots:
    """The slots that remain after DeepSpeed's filters.

    Args:
        hosts: as `read` returns them.
        include: `HOST[:SLOT,...][@HOST...]`, the only slots to use. Without slots it means all of the host's.
        exclude: the same, slots not to use.
        num_nodes: keep the first hosts only; 0 keeps all.
        num_gpus: keep the first slots of each host only; 0 keeps all.

    Raises:
        UserError: filters clash, name what does not exist, or leave nothing.
    """
    if include and exclude:
        raise UserError(f"--include={include} and --exclude={exclude} cannot both be given")
    if (include or exclude) and (num_nodes or num_gpus):
        raise UserError("--num-nodes and --num-gpus cannot be combined with --include or --exclude")
    if include:
        wanted = _parse_filter(include, hosts, "--include")
        return {host: wanted[host] for host in hosts if host in wanted}
    if exclude:
        unwanted = _parse_filter(exclude, hosts, "--exclude")
        left = {host: [s for s in slots if s not in unwanted.get(host, [])] for host, slots in hosts.items()}
        if not any(left.values()):
            raise UserError(f"--exclude={exclude} leaves no slots")
        return {host: slots for host, slots in left.items() if slots}
    return _first(hosts, num_nodes, num_gpus)


def _first(hosts: Slots, num_nodes: int, num_gpus: int) -> Slots:
    if num_nodes > len(hosts):
        raise UserError(f"--num-nodes={num_nodes} but there are {len(hosts)} hosts")
    kept = dict(list(hosts.items())[: num_nodes or None])
    for host, slots in kept.items():
        if num_gpus > len(slots):
            raise UserError(f"--num-gpus={num_gpus} but host {host} has {len(slots)} slots")
    return {host: slots[: num_gpus or None] for host, slots in kept.items()}


def _parse_filter(text: str, hosts: Slots, option: str) -> Slots:
    chosen: Slots = {}
    for node in text.split("@"):
        match = NODE.fullmatch(node)
        if match is None:
            raise UserError(f"{option}={text}: {node!r} is not of the form HOST or HOST:SLOT,SLOT")
        host = match["host"]
        if host not in hosts:
            raise UserError(f"{option}={text}: there is no host {host} among {', '.join(hosts)}")
        slots = [int(s) for s in match["slots"].split(",")] if match["slots"] else hosts[host]
        if missing := [s for s in slots if s not in hosts[host]]:
            raise UserError(f"{option}={text}: host {host} has no slot {missing[0]}, it has {len(hosts[host])}")
        chosen[host] = sorted({*chosen.get(host, []), *slots})
    return chosen


def is_this_machine(host: str) -> bool:
    """Whether a host name or address means the machine that this runs on."""
    if host in ("localhost", socket.gethostname(), socket.getfqdn()):
        return True
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True
