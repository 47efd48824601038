"""Random faults, one after the other, until as many as asked for have been met; the same command goes on later.

    make soak N=20                                   # or: python tests/cluster/soak.py 20 --folder runs/soak

Each trial draws a fault, its rank and step, and what is trained how from its number, trains with `--restarts`, and
types the same command again if that has ended for good. It fails unless the job ends within a bound, says once which
rank of which host failed at which step of what, leaves no process, and comes to the checkpoints, all of them, and to
the losses of the run to which nothing happens, bit for bit. Outcomes are lines of log.jsonl; folders of failed trials
are kept.

Processes are forked off this one, which has imported what they need: they are DeepSpeed's own launchers and our ranks,
but start in no time.
"""

import collections
import ctypes
import importlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import numpy as np
import psutil
import typer
from host_runs import CONFIG

from occult_train.checkpoint.store import open_checkpoint
from occult_train.errors import CheckpointError

STEPS, INTERVAL = 8, 2
BOUND = 240.0
"""Seconds for a command and all its restarts. A rank that is stopped costs 8 until it is missed and 30 until
DeepSpeed's launcher kills what does not heed SIGTERM; the rest is a busy machine's."""
SETTINGS = [
    *("a.yaml", "output=run", "data.path=../corpus", f"train.steps={STEPS}", f"checkpoint.interval={INTERVAL}"),
    *("checkpoint.keep=0", "parallel.expert=2", "parallel.lost_after=8", "parallel.stuck_after=60"),
    "deepspeed.zero_optimization.stage3_param_persistence_threshold=40",
]
KILLED = r"process \d+ ended without a report: killed, or out of memory\?"
SILENT = r"no sign of life for \d+ s.*|process \d+ is gone: killed, or out of memory\?"
SAID = {
    "kill": rf"occult: rank {{rank}} on host {{host}} at step \d+: ({KILLED}|{SILENT})",
    "kill_writing": rf"occult: rank {{rank}} on host {{host}} at step \d+: ({KILLED}|{SILENT})",
    "stop": rf"occult: rank {{rank}} on host {{host}} at step \d+: ({SILENT})",
    "fail": r"occult: rank {rank} on host {host} at step {step} failed: ValueError: expert 5 is on fire",
    "memory": r"occult: rank {rank} on host {host} at step {step} failed: MemoryError",
    "nan": r"occult: rank \d on host {host} at step {next} failed: .*the loss is nan at step {next}; .*",
    "disk": r"error: a checkpoint cannot be written to run/checkpoints: rank {rank}: No space left on device; "
    r"it has [\d,]+ bytes, [\d,]+ are free; (the last complete checkpoint is run/.*|there is no earlier checkpoint)",
}
"""The one line about each fault."""
IMPORTED = [
    *("deepspeed.launcher.runner", "deepspeed.launcher.launch", "deepspeed.runtime.zero.stage3"),
    *("torch._dynamo", "torch._inductor.compile_fx", "torch.onnx", "torch.utils.tensorboard"),
    *("occult_train.launcher.train", "occult_train.train", "occult_train.trainer"),
]
POPEN = subprocess.Popen
FOR_GOOD = ("nan", "disk")
"""Faults after which `--restarts` does not start again."""


@dataclass(frozen=True)
class Trial:
    """What is drawn."""

    seed: int
    kind: str
    rank: int
    step: int
    after: int
    """Of a fault while a checkpoint is written: pieces that are written before."""
    ranks: int
    stage: int
    background: bool

    @staticmethod
    def draw(seed: int) -> "Trial":
        """The same for the same seed."""
        rng = random.Random(seed)
        ranks = rng.choice((2, 2, 4))
        kind, rank, step = rng.choice(list(SAID)), rng.randrange(ranks), rng.randint(1, STEPS - 1)
        return Trial(seed, kind, rank, step, rng.randint(0, 40), ranks, rng.randint(0, 3), rng.random() < 0.75)

    def settings(self) -> list[str]:
        """Of `occult train`."""
        return [*SETTINGS, f"zero.stage={self.stage}", f"checkpoint.background={str(self.background).lower()}"]


# ---------------------------------------------------------------- processes without imports


class Forked:
    """What DeepSpeed and `occult` use of `subprocess.Popen`, for `python -m MODULE`: a fork of this process runs it."""

    def __init__(self, args: Sequence[str], env: dict[str, str], start_new_session: bool = False) -> None:
        self.args, self.returncode = args, None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(list(args), env, start_new_session)

    def poll(self) -> int | None:
        """The exit code once there is one."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        """As of Popen."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """As of Popen."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """As of Popen."""
        self.send_signal(signal.SIGKILL)


def _start(args: Any, **options: Any) -> Any:
    """In place of `subprocess.Popen`."""
    if isinstance(args, list) and args[0] == sys.executable and "-m" in args and options.get("stdout") is None:
        return Forked(args, options["env"], options.get("start_new_session", False))
    return POPEN(args, **options)


def _become(words: list[str], environment: dict[str, str], new_session: bool) -> NoReturn:
    """Run a command of Python in this process, which has just been forked."""
    code: Any = 1
    try:
        if new_session:
            os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
        os.environ.clear()
        os.environ.update(environment)
        at = words.index("-m")
        sys.argv = words[at + 1 :]
        runpy.run_module(words[at + 1], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def typed(folder: Path, settings: list[str], ranks: int, log: Path) -> int | None:
    """`occult train --num-gpus RANKS --restarts 2 SETTINGS` in a folder, into a log: its exit code, or None if it did
    not end within the bound."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.chdir(folder)
            with log.open("ab") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            code = _train(settings, ranks)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + BOUND
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    return None


def _train(settings: list[str], ranks: int) -> int:
    from occult_train.launcher.plan import Options
    from occult_train.launcher.train import launch

    subprocess.Popen = _start  # type: ignore[assignment, misc]
    return launch(settings, Options(num_gpus=ranks), restarts=2, module="faulty_rank")


def _import_all() -> None:
    """What launchers and ranks need, so that forks have it."""
    for name in IMPORTED:
        importlib.import_module(name)


def left_behind() -> list[str]:
    """Processes that still run a few seconds after their command, and are ended now."""
    deadline = time.monotonic() + 10
    while (left := _descendants()) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=10)
    return [str(process.pid) for process in left]


def _descendants() -> list[psutil.Process]:
    """Of this process, which inherits orphans. The dead are buried."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
            elif process.ppid() == os.getpid():
                os.waitpid(process.pid, os.WNOHANG)
        except (psutil.Error, ChildProcessError):
            continue
    return found


# ---------------------------------------------------------------- one trial


def losses(run: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "tokens_per_second")} for line in lines]


def checkpoints(run: Path) -> dict[str, dict[str, str]]:
    """Checksums of all tensors of all complete checkpoints, each of which is read. Raises CheckpointError."""
    found = {}
    for folder in sorted((run / "checkpoints").glob("step-*")):
        if folder.suffix:
            continue
        opened = open_checkpoint(folder)
        for name in opened.entries:
            opened.read(name)
        found[folder.name] = {name: entry.sha256 for name, entry in opened.entries.items()}
    return found


def calm(root: Path, trial: Trial) -> Path:
    """The run to which nothing happens; made once."""
    name = root / f"calm-{trial.ranks}-{trial.stage}"
    if not (name / "done").exists():
        shutil.rmtree(name, ignore_errors=True)
        name.mkdir(parents=True)
        (name / "a.yaml").write_text(CONFIG)
        settings = [*SETTINGS, f"zero.stage={trial.stage}", "checkpoint.background=false"]
        code = typed(name, settings, trial.ranks, name / "log")
        if code:
            raise SystemExit(f"error: {name}/log: the undisturbed run ended with {code}")
        (name / "done").touch()
    return name / "run"


def run(root: Path, trial: Trial) -> list[str]:
    """What was not as it should be."""
    expected = calm(root, trial)
    folder = root / f"trial-{trial.seed}"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "run").mkdir(parents=True)
    (folder / "a.yaml").write_text(CONFIG)
    (folder / "run" / "fault.json").write_text(json.dumps(asdict(trial)))
    log, wrong = folder / "log", []
    code = typed(folder, trial.settings(), trial.ranks, log)
    if left := left_behind():
        wrong.append(f"processes left: {left}" if code is not None else f"not ended within {BOUND:.0f} s")
    if not (folder / "run" / "reached").exists():
        wrong.append("the fault did not happen")
    if (code != 0) != (trial.kind in FOR_GOOD):
        wrong.append(f"exit code {code}")
    wrong += _not_said(log.read_text(errors="replace"), trial)
    if code:
        code = typed(folder, trial.settings(), trial.ranks, log)
        if left := left_behind():
            wrong.append(f"processes left of the second command: {left}")
        if code:
            wrong.append(f"exit code {code} of the second command")
    wrong += _lost(log.read_text(errors="replace"))
    try:
        if checkpoints(folder / "run") != checkpoints(expected):
            wrong.append("other checkpoints than the undisturbed run")
        if losses(folder / "run") != losses(expected):
            wrong.append("other losses than the undisturbed run")
    except (CheckpointError, OSError) as error:
        wrong.append(str(error))
    if not wrong:
        shutil.rmtree(folder)
    return wrong


def _not_said(text: str, trial: Trial) -> list[str]:
    values = {"rank": trial.rank, "step": trial.step, "next": trial.step + 1, "host": re.escape(socket.gethostname())}
    wanted = re.sub(r"\{(rank|step|next|host)\}", lambda match: str(values[match[1]]), SAID[trial.kind])
    said = [line for line in text.splitlines() if re.match(r"error: |occult: (?!full report|starting again)", line)]
    if len(said) != 1:
        return [f"said {len(said)} times: {said}"]
    return [] if re.fullmatch(wanted, said[0]) else [f"said: {said[0]}"]


def _lost(text: str) -> list[str]:
    """Whether a run was begun or continued before the checkpoint that it had saved last."""
    saved = 0
    for line in text.splitlines():
        if found := re.match(r"step (\d+): saved", line):
            saved = int(found[1])
        begun = re.match(r"continuing run/checkpoints/step-\d+ at step (\d+)|step 1: loss", line)
        if begun and int(begun[1] or 0) < saved:
            return [f"step {saved} was saved, and then: {line}"]
    return []


def main(
    count: Annotated[int, typer.Argument(min=1, help="Trials to add to those of the log.")],
    folder: Annotated[Path, typer.Option(help="Of the log, and of what failed trials leave.")] = Path("runs/soak"),
    first: Annotated[int, typer.Option(help="Seed of a new log's first trial; those after it count on.")] = 0,
    only: Annotated[int, typer.Option(help="Repeat the trial of this seed alone, without the log.")] = -1,
) -> None:
    """Run trials, and print what came of all so far."""
    root = folder.resolve()
    root.mkdir(parents=True, exist_ok=True)
    _import_all()
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans become this process's
    _make_corpus(root)
    if only >= 0:
        print(Trial.draw(only), run(root, Trial.draw(only)) or "passed")
        return
    log = root / "log.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for _ in range(count):
        trial = Trial.draw(done[-1]["seed"] + 1 if done else first)
        calm(root, trial)
        began = time.monotonic()
        wrong = run(root, trial)
        done.append({**asdict(trial), "wrong": wrong, "seconds": round(time.monotonic() - began, 1)})
        with log.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        print(json.dumps(done[-1]), flush=True)
    for kind in SAID:
        those = [line for line in done if line["kind"] == kind]
        failed = [line["seed"] for line in those if line["wrong"]]
        print(f"{kind:>12}: {len(those)} trials, failed: {failed or 'none'}")
    counts = collections.Counter(bool(line["wrong"]) for line in done)
    print(f"{counts[False]} of {len(done)} passed")
    raise typer.Exit(int(counts[True] > 0))


def _make_corpus(root: Path) -> None:
    if (root / "corpus").exists():
        return
    from occult_train.tools.prepare import prepare

    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "seven", "dogs", "run", "home"]
    (root / "text").mkdir(exist_ok=True)
    for i in range(40):
        (root / "text" / f"{i}.txt").write_text(" ".join(rng.choice(words, 300)) + f"\nfile {i}\n")
    # in a process of its own: tokenizers start threads, which forks do not survive
    pid = os.fork()
    if pid == 0:
        prepare([str(root / "text")], root / "corpus", vocab_size=300, tokenizer=None, workers=1, valid_fraction=0.2)
        os._exit(0)
    os.waitpid(pid, 0)


if __name__ == "__main__":
    typer.run(main)
