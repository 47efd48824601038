"""For tests: a function run on several ranks of this machine, and marks for tests that need GPUs."""

import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

from occult_train import distributed

requires_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; this machine has none")


def requires_gpus(n: int) -> pytest.MarkDecorator:
    """Skip a test on machines with fewer than `n` CUDA GPUs."""
    found = torch.cuda.device_count()
    return pytest.mark.skipif(found < n, reason=f"needs {n} CUDA GPUs; this machine has {found}")


class RankError(RuntimeError):
    """A rank of `run_distributed` failed, died or did not end in time. The message holds the rank's traceback."""


def run_distributed(
    fn: Callable[..., Any], ranks: int, *args: Any, timeout: float = 120.0, backend: str = "gloo"
) -> list[Any]:
    """Run `fn(rank, *args)` on `ranks` processes joined by torch.distributed, and return what each returned.

    The ranks are set up by `deepspeed.init_distributed` with RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* set and one
    torch thread each. With gloo they see no GPU on any machine, and are forked off a server that has torch and
    DeepSpeed imported, which saves seconds a call; with nccl each is spawned, since CUDA does not survive a fork.

    Args:
        fn: a module-level function (it is pickled, like `args` and the results).
        ranks: how many processes.
        timeout: seconds after which everything is killed.
        backend: gloo or nccl (rank r then uses GPU r).

    Raises:
        RankError: the first rank to fail, with its traceback. The other ranks are killed.
    """
    folder = Path(tempfile.mkdtemp(prefix="occult-ranks-"))
    port = distributed.free_port()
    processes: list[BaseProcess] = []
    try:
        with _environment(backend):
            for rank in range(ranks):
                given = (folder, port, rank, ranks, backend, dict(os.environ), fn, args)
                processes.append(_context(backend).Process(target=_child, args=given, daemon=True))
                processes[-1].start()
        _join(processes, folder, timeout)
        return [pickle.loads(_result(folder, rank).read_bytes()) for rank in range(ranks)]
    finally:
        _kill(processes)
        shutil.rmtree(folder, ignore_errors=True)


_PRELOAD = [
    "occult_train.testing",
    "occult_train.engine",
    "deepspeed.runtime.zero.stage3",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.onnx",
]
"""What engines import at their first start, ten seconds of it for ZeRO-3; ranks are forked off with it."""


def _context(backend: str) -> Any:
    if backend != "gloo" or sys.platform != "linux":
        return torch.multiprocessing.get_context("spawn")
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


@contextmanager
def _environment(backend: str) -> Iterator[None]:
    """The environment in which processes start: with gloo, one without GPUs."""
    before = dict(os.environ)
    if backend == "gloo":
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _join(processes: Sequence[BaseProcess], folder: Path, timeout: float) -> None:
    """Wait until all processes have ended well; raise RankError as soon as one has not, or time is up."""
    deadline = time.monotonic() + timeout
    running = dict(enumerate(processes))
    while running:
        ready = wait([p.sentinel for p in running.values()], timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(running)} of {len(processes)} did not end within {timeout:.0f} s")
        for rank, process in list(running.items()):
            if process.sentinel in ready:
                process.join()
                del running[rank]
                if process.exitcode != 0:
                    _raise_first(folder, rank, process.exitcode)


def _raise_first(folder: Path, rank: int, code: int | None) -> None:
    report = folder / "error"
    if not report.exists():
        raise RankError(f"rank {rank} ended with exit code {code} and no traceback")
    deadline = time.monotonic() + 2
    while not (text := report.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    raise RankError(text)


def _kill(processes: Sequence[BaseProcess]) -> None:
    started = [process for process in processes if process.pid is not None]
    for process in started:
        if process.is_alive():
            process.kill()
    for process in started:
        process.join(timeout=10)
        process.close()


def _result(folder: Path, rank: int) -> Path:
    return folder / f"result-{rank}"


def _child(
    folder: Path,
    port: int,
    rank: int,
    ranks: int,
    backend: str,
    environment: dict[str, str],
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """The life of one rank. It leaves through `os._exit`: a collective broken by a peer must not hold it up."""
    code = 0
    try:
        os.environ.clear()
        os.environ.update(environment)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_SIZE=str(ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.set_num_threads(1)
        distributed.initialize(backend, f"file://{folder / 'store'}", timedelta(minutes=10))
        _result(folder, rank).write_bytes(pickle.dumps(fn(rank, *args)))
    except BaseException:
        code = 1
        _report(folder / "error", f"rank {rank} of {ranks} failed:\n{traceback.format_exc()}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _report(path: Path, text: str) -> None:
    """Write the report unless another rank has failed before."""
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        pass
