"""Setting up torch.distributed through DeepSpeed, whoever started the ranks.

The deepspeed launcher and torchrun leave RANK, WORLD_SIZE and MASTER_* in the environment; mpirun leaves it to
DeepSpeed's MPI discovery (mpi4py); a plain `python -m` is a world of one rank.
"""

import errno
import os
import shutil
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from occult_train.errors import UserError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LOCAL_RANK_VARIABLES = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "PMI_RANK", "PMIX_RANK")
LOCAL_SIZE_VARIABLES = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "PMI_SIZE")
MPI_VARIABLES = ("PMI_SIZE", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
SHARED_MEMORY_OP = "deepspeed_shm_comm"
DEFAULT_PORT = 29500
BACKLOG = 2048
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""Says to torch that the store is there already."""


@dataclass(frozen=True)
class World:
    """This process among the ranks of the job."""

    rank: int
    size: int
    local_rank: int


def first_number(names: tuple[str, ...], default: int, environment: Mapping[str, str] | None = None) -> int:
    """The first of the named variables, of this process's environment or another, that holds a whole number."""
    values = ((os.environ if environment is None else environment).get(name, "") for name in names)
    return next((int(value) for value in values if value.isdigit()), default)


def first_on_host_lives() -> bool:
    """Whether rank 0 of this host, a child of the same launcher, still runs. A zombie has no environment left."""
    try:
        siblings = psutil.Process(os.getppid()).children()
    except psutil.Error:  # the launcher is gone
        return False
    return any(_local_rank(process) == 0 for process in siblings)


def _local_rank(process: psutil.Process) -> int:
    try:
        return first_number(LOCAL_RANK_VARIABLES, -1, process.environ())
    except psutil.Error:
        return -1


def prepare_environment() -> None:
    """Set what must stand in the environment before torch and DeepSpeed are imported.

    OMP_NUM_THREADS shares the cores out over the ranks of this host; `ninja` of this Python's environment is put on
    PATH, because DeepSpeed looks there when it builds an op.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // first_number(LOCAL_SIZE_VARIABLES, 1))))
    if shutil.which("ninja") is None:
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def free_port() -> int:
    """A TCP port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def initialize(
    backend: str | None = None, init_method: str | None = None, timeout: timedelta = timedelta(minutes=30)
) -> World:
    """Initialise torch.distributed through DeepSpeed and return this rank.

    Args:
        backend: nccl or gloo; None takes nccl where there is a CUDA device, else gloo.
        init_method: as of torch; None takes MASTER_ADDR and MASTER_PORT.
        timeout: how long a collective may take.

    Raises:
        UserError: several tasks were started without anything that connects them, or the port is taken.
    """
    import torch

    if not torch.cuda.is_available() and not torch.xpu.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    _become_single_rank_if_alone()
    _skip_shared_memory_op(deepspeed.ops.__compatible_ops__)
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    local_rank = first_number(LOCAL_RANK_VARIABLES[:1], -1)
    if backend == "nccl" and local_rank >= 0:
        torch.cuda.set_device(local_rank)
    if any(name in os.environ for name in MPI_VARIABLES) and "RANK" not in os.environ:
        deepspeed.comm.mpi_discovery(first_number(("MASTER_PORT",), DEFAULT_PORT), verbose=False)
    given = all(name in os.environ for name in RANK_VARIABLES)
    meeting: AbstractContextManager[None] = nullcontext()
    if given and init_method is None:
        if backend == "gloo":
            _bind_to_the_way_to(os.environ["MASTER_ADDR"])
        meeting = _store_at(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout)
    try:
        with meeting:
            deepspeed.init_distributed(
                dist_backend=backend,
                auto_mpi_discovery=True,
                distributed_port=first_number(("MASTER_PORT",), DEFAULT_PORT),
                timeout=timeout,
                init_method=init_method,
                rank=int(os.environ["RANK"]) if given else -1,
                world_size=int(os.environ["WORLD_SIZE"]) if given else -1,
                verbose=False,
            )
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(f"port {os.environ['MASTER_PORT']} is in use; choose another with --master-port") from None
    world = World(
        torch.distributed.get_rank(), torch.distributed.get_world_size(), first_number(LOCAL_RANK_VARIABLES[:1], 0)
    )
    if backend == "nccl" and local_rank < 0:
        torch.cuda.set_device(world.local_rank)
    return world


def set_deepspeed_log(verbose: bool) -> None:
    """Show DeepSpeed's own log, or hide torch's remarks on names that DeepSpeed uses."""
    from deepspeed.utils import set_log_level_from_string

    if verbose:
        set_log_level_from_string("info")
    else:
        warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)


def shutdown() -> None:
    """Leave the process group, so that no rank ends while a peer still talks to it."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    _stores.clear()


def _bind_to_the_way_to(address: str) -> None:
    """Let gloo listen on the network that leads to rank 0. It would take that of this host's name, which often is the
    loopback, where no other host finds it."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, DEFAULT_PORT))  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return  # no IPv4 address of that name: as gloo finds it
    names = [name for name, found in psutil.net_if_addrs().items() if own in (entry.address for entry in found)]
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])


_stores: list[Any] = []
"""Those that this process serves."""


@contextmanager
def _store_at(address: str, port: int, timeout: timedelta) -> Iterator[None]:
    """While ranks meet at a store: rank 0 serves it at that address alone, where torch would listen on every network
    of the host. Nothing is done under torchrun, whose agent serves it.

    Raises:
        UserError: the port is taken.
    """
    if os.environ["RANK"] != "0" or os.environ.get(AGENT_STORE) == "True":
        yield
        return
    place = _own_address(address)
    if not place:
        print(
            f"MASTER_ADDR={address} is no IPv4 address of this host for others, so rank 0 listens on all",
            file=sys.stderr,
        )
        yield
        return
    import torch

    server = torch.distributed.TCPStore(
        place,
        port,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=_listen(place, port).detach(),
    )
    _stores.append(server)
    os.environ[AGENT_STORE] = "True"  # torch connects alone
    try:
        yield
    finally:
        del os.environ[AGENT_STORE]


def _own_address(name: str) -> str:
    """The IPv4 address that a name means here, where this host has it and the other ranks' hosts may find it: a name
    may mean the loopback here alone, the loopback's number means it everywhere."""
    try:
        found = str(socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((found, 0))
    except OSError:
        return ""
    alone = first_number(LOCAL_SIZE_VARIABLES, 1) == int(os.environ["WORLD_SIZE"])
    return found if alone or found == name or not found.startswith("127.") else ""


def _listen(place: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((place, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise UserError(f"port {port} is in use; choose another with --master-port") from None
    return listener


def _become_single_rank_if_alone() -> None:
    """Write the variables of a world of one rank unless some launcher has started this process."""
    if any(name in os.environ for name in (*MPI_VARIABLES, "RANK", "WORLD_SIZE")):
        return
    if first_number(("SLURM_STEP_NUM_TASKS",), 1) > 1:
        raise UserError("srun started several tasks that cannot find each other; use srun --mpi=pmi2 or --mpi=pmix")
    single = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(single)
    os.environ.setdefault("MASTER_PORT", str(free_port()))


def _skip_shared_memory_op(compatible_ops: dict[str, bool]) -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce, which only its inference engine uses.

    `TorchBackend` of 0.19.8 builds it on every CPU machine (46 s with two cores, at the first start).
    """
    compatible_ops[SHARED_MEMORY_OP] = False
