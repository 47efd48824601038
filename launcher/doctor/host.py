"""Asking hosts what they have, all at once, each within seconds."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from occult_train.errors import UserError
from occult_train.launcher import hostfile
from occult_train.launcher.doctor import facts

CONNECT_SECONDS = 5
ASK_SECONDS = 15
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "PasswordAuthentication=no", "-o", f"ConnectTimeout={CONNECT_SECONDS}")


@dataclass(frozen=True)
class Facts:
    """What a host says of itself. Sizes in bytes."""

    name: str
    folder: bool
    """Whether the folder is there in which the command was typed."""
    versions: dict[str, str]
    """Of Python and packages; empty where one is not installed."""
    cores: int
    memory: int
    memory_free: int
    disk_free: int
    """Where the run writes; -1 where nobody can tell, as of shared memory."""
    shared_memory_free: int
    gpus: list[dict[str, Any]]
    """name, memory, memory_free and driver of each."""
    gpu_links: list[str]
    networks: dict[str, str]


@dataclass(frozen=True)
class Host:
    """A host that was asked."""

    name: str
    """As in the hostfile."""
    slots: list[int] = field(default_factory=list)
    facts: Facts | None = None
    trouble: str = ""
    """Why there are no facts."""
    seconds: float = 0.0
    """From the question to the answer."""
    clock: tuple[float, float] = (0.0, 0.0)
    """Between which the host's clock is ahead of this machine's, in seconds."""


def ask(slots: hostfile.Slots, output: str) -> list[Host]:
    """Ask hosts, in their order; this machine without ssh.

    Args:
        slots: of the hosts.
        output: where a run would write.
    """
    source = Path(facts.__file__).read_text()
    with ThreadPoolExecutor(max_workers=64) as pool:
        return list(pool.map(lambda host: _ask(host, slots[host], source, output), slots))


def _ask(host: str, numbers: list[int], source: str, output: str) -> Host:
    began = time.time()
    words = [sys.executable, "-", os.getcwd(), output]
    if not hostfile.is_this_machine(host):
        path = os.environ.get("PYTHONPATH")
        words = [*SSH, host, shlex.join(["env", *([f"PYTHONPATH={path}"] if path else []), *words])]
    try:
        text = _output(words, source)
        ended = time.time()
        first, second = text.splitlines()[-2:]
        found, times = Facts(**json.loads(first)), json.loads(second)
    except UserError as error:
        return Host(host, numbers, trouble=str(error), seconds=time.time() - began)
    except (ValueError, TypeError):
        return Host(host, numbers, trouble=f"its answer cannot be read: {text.strip()[-200:]!r}")
    return Host(host, numbers, found, "", ended - began, clock_ahead((began, ended), times))


def _output(words: Sequence[str], source: str) -> str:
    """What Python says on the host.

    Raises:
        UserError: the host did not answer, or Python failed there.
    """
    try:
        done = subprocess.run(words, input=source, capture_output=True, text=True, timeout=ASK_SECONDS)
    except FileNotFoundError:
        raise UserError(f"{words[0]} is not on PATH") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"no answer within {ASK_SECONDS} s") from None
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if done.returncode == 255:
        raise UserError(f"ssh: {last.removeprefix('ssh: ')}")
    if done.returncode:
        raise UserError(f"{sys.executable} there: {last}")
    return done.stdout


def clock_ahead(here: tuple[float, float], there: Sequence[float]) -> tuple[float, float]:
    """Bounds of how far a clock is ahead of this machine's, in seconds.

    Args:
        here: when the question was asked and the answer read, by this machine's clock.
        there: two times between them, by the other's.
    """
    (asked, answered), (began, ended) = here, there
    return ended - answered, began - asked
