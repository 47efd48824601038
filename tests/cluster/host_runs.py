"""Commands typed on a host."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from occult_train.tools.bench.hosts import Host

BIN = Path(sys.executable).parent
HERE = Path(__file__).parent
OCCULT = [sys.executable, "-m", "occult_train.launcher.cli"]
TELLING = [sys.executable, str(HERE / "telling_occult.py")]
"""`occult` whose ranks say where they are and end."""
FAULTY = [sys.executable, str(HERE / "faulty_occult.py")]
"""`occult` whose ranks meet with the fault of `fault.json`."""
CONFIG = """
model: {hidden_size: 32, intermediate_size: 16, num_hidden_layers: 2, num_attention_heads: 4,
        num_experts: 8, num_experts_per_tok: 3, max_position_embeddings: 64}
data: {path: corpus, sequence_length: 32}
train: {global_batch_size: 8, micro_batch_size: 2, precision: fp32, steps: 3}
parallel: {expert: 4}
eval: {interval: 0, sequences: 7}
checkpoint: {interval: 0}
monitor: {interval: 1}
"""
SECONDS = 240


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    seconds: float = 0.0
    """Since a fault."""


def environment(**more: str) -> dict[str, str]:
    """This one's, without what would tell ranks apart, and with the modules beside the tests."""
    given = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": _paths(), **more}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"):
        given.pop(name, None)
    return given


def _paths() -> str:
    return os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH", "")])])


def typed(host: Host, words: list[str], folder: Path, seconds: float = SECONDS, **variables: str) -> Ended:
    """Run a command on a host to its end."""
    done = subprocess.run(
        host.command(*words, folder=folder),
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )
    return Ended(done.returncode, done.stdout)


def with_fault(
    host: Host,
    words: list[str],
    folder: Path,
    fault: dict[str, object],
    bound: float,
    outside: Callable[[], None] = lambda: None,
) -> Ended:
    """Run a command on a host to its end, which must come within a bound after the fault.

    Args:
        words: of which the run's folder is `run`.
        fault: rank, step and kind, as `faulty_rank` takes it.
        outside: what is done from outside once the rank has come to the step.
    """
    run = folder / "run"
    run.mkdir(exist_ok=True)
    (run / "fault.json").write_text(json.dumps(fault))
    with (folder / "log").open("w") as log:
        command = host.command(*words, folder=folder)
        process = subprocess.Popen(command, env=environment(), stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + SECONDS
        while not (run / "reached").exists():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.05)
        start = time.monotonic()
        outside()
        code = process.wait(timeout=bound)
        return Ended(code, (folder / "log").read_text(), time.monotonic() - start)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"still running {bound} s after the fault:\n{(folder / 'log').read_text()}") from None
    finally:
        process.kill()
        process.wait()


def left_on(made: list[Host]) -> list[str]:
    """Command lines of processes that still run on hosts after a few seconds."""
    deadline = time.monotonic() + 10
    while any(host.processes() for host in made) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [" ".join(process.cmdline()) for host in made for process in host.processes()]
