"""From what was typed to the `deepspeed` command: which ranks on which hosts, and the flags that this takes."""

import ctypes
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from occult_train.config import Config
from occult_train.distributed import free_port
from occult_train.errors import UserError
from occult_train.launcher import hostfile, passed

PROGRAMS = {
    "pdsh": "pdsh",
    "openmpi": "ompi_info",
    "mpich": "mpirun",
    "impi": "mpirun",
    "mvapich": "mpiname",
    "slurm": "sinfo",
}
"""What DeepSpeed looks for on PATH, by launcher."""
WITHOUT_FILTERS = ("openmpi", "mpich", "impi", "mvapich")
EQUAL_SLOTS = ("mpich", "impi", "mvapich")
MADE_FOR_HYDRA = {"mpich": "impi"}
"""DeepSpeed's runner for MPICH starts files alone, no modules, and forgets their exit codes; its runner for Intel's MPI
writes the same command line and does neither."""
ENVIRONMENT_FILE = ".deepspeed_env"
SSH_SECONDS = 20


@dataclass(frozen=True)
class Options:
    """Options of `occult train` about where and how to start ranks; empty and 0 mean not given."""

    hostfile: str = ""
    include: str = ""
    exclude: str = ""
    num_gpus: int = 0
    num_nodes: int = 0
    master_addr: str = ""
    master_port: int = 0
    launcher: str = "pdsh"
    force_multi: bool = False
    no_ssh_check: bool = False
    deepspeed_args: str = ""
    verbose: bool = False


@dataclass(frozen=True)
class Plan:
    """A launch that has been checked."""

    flags: list[str]
    """Of `deepspeed`, up to --module."""
    slots: hostfile.Slots
    gpus: bool
    """Whether this machine has GPUs."""
    multi_host: bool
    """Whether other machines take part, or may."""
    announcement: str
    hostfile: str = ""
    """Text of the one to launch with, for launchers that know no filters; empty where the user's own does."""

    @property
    def ranks(self) -> int:
        """Ranks over all hosts."""
        return sum(len(slots) for slots in self.slots.values())


def make(config: Config, options: Options) -> Plan:
    """Check the options against the config and the machines.

    Raises:
        UserError: something given cannot work; nothing has been started.
    """
    plan = spread(options, config.parallel.expert)
    config.validate_ranks(plan.ranks)
    return plan


def spread(options: Options, expert: int) -> Plan:
    """As `make`, of ranks whose settings are not known but for parallel.expert."""
    extra = passed.flags(options.deepspeed_args)
    gpus = count_gpus()
    path = hostfile_of(options)
    quiet = [] if options.verbose else ["--log_level=critical"]  # its one error is that a rank's exit code is not 0
    if path:
        plan = _plan_hosts(path, options, gpus, extra)
    else:
        plan = _plan_this_machine(expert, options, gpus)
    return replace(plan, flags=[*plan.flags, *quiet, *extra])


def hostfile_of(options: Options) -> str:
    """Its path; empty for this machine alone."""
    return options.hostfile or (hostfile.DEFAULT_HOSTFILE if os.path.exists(hostfile.DEFAULT_HOSTFILE) else "")


def only(options: Options, slots: hostfile.Slots) -> Options:
    """The same on these slots of the hostfile alone."""
    include = "@".join(f"{host}:{','.join(map(str, numbers))}" for host, numbers in slots.items())
    return replace(options, include=include, exclude="", num_nodes=0, num_gpus=0)


def count_gpus() -> int:
    """CUDA devices that ranks on this machine would see. Asks the driver, since importing torch takes seconds."""
    if version("torch").endswith("+cpu"):
        return 0
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def _plan_this_machine(expert: int, options: Options, gpus: int) -> Plan:
    """One host without a hostfile: all its GPUs, or on CPU as many ranks as expert parallelism needs."""
    filtered = bool(options.include or options.exclude)
    if options.num_nodes > 1 or options.force_multi:
        raise UserError("several nodes need --hostfile")
    if not gpus:
        if filtered:
            raise UserError("--include and --exclude need GPUs or --hostfile; on CPU say --num-gpus for ranks")
        ranks = options.num_gpus or expert
        why = "--num-gpus" if options.num_gpus else "parallel.expert"
        slots = {"localhost": list(range(ranks))}
        flags = [f"--num_gpus={ranks}", f"--master_port={options.master_port or free_port()}"]
        return Plan(flags, slots, False, False, f"starting {_ranks(ranks)} on CPU ({why}={ranks})")
    visible = _visible_devices(gpus)
    slots = hostfile.select({"localhost": visible}, options.include, options.exclude, 0, options.num_gpus)
    devices = ",".join(map(str, slots["localhost"]))
    flags = [f"--include=localhost:{devices}", f"--master_port={options.master_port or free_port()}"]
    return Plan(flags, slots, True, False, f"starting {_ranks(len(slots['localhost']))} on GPU {devices}")


def _visible_devices(gpus: int) -> list[int]:
    """Device numbers as DeepSpeed wants them, which overwrites CUDA_VISIBLE_DEVICES with its choice."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return list(range(gpus))
    try:
        return [int(device) for device in text.split(",")][:gpus]
    except ValueError:
        raise UserError(f"CUDA_VISIBLE_DEVICES={text}: DeepSpeed's launcher takes device numbers only") from None


def _plan_hosts(path: str, options: Options, gpus: int, extra: list[str]) -> Plan:
    hosts = hostfile.read(path)
    slots = hostfile.select(hosts, options.include, options.exclude, options.num_nodes, options.num_gpus)
    first = next(iter(slots))
    alone = len(slots) == 1 and hostfile.is_this_machine(first) and not options.force_multi
    filtered = not alone and options.launcher.lower() in WITHOUT_FILTERS and any(_filters(options))
    flags = [] if filtered else [f"--hostfile={path}", *_filters(options)]
    if alone:
        if gpus and max(slots[first]) >= gpus:
            raise UserError(f"hostfile {path}: host {first} has {len(hosts[first])} slots but {gpus} GPUs")
        port = options.master_port or free_port()
        flags += ["--no_ssh_check", f"--master_addr={options.master_addr or '127.0.0.1'}", f"--master_port={port}"]
    else:
        flags += _multi_host_flags(slots, options, extra)
    ranks = sum(map(len, slots.values()))
    text = "".join(f"{host} slots={len(numbers)}\n" for host, numbers in slots.items()) if filtered else ""
    return Plan(flags, slots, gpus > 0, not alone, f"starting {_ranks(ranks)} on {', '.join(slots)}", text)


def _filters(options: Options) -> list[str]:
    given = {
        "include": options.include,
        "exclude": options.exclude,
        "num_nodes": options.num_nodes,
        "num_gpus": options.num_gpus,
    }
    return [f"--{name}={value}" for name, value in given.items() if value]


def _multi_host_flags(slots: hostfile.Slots, options: Options, extra: list[str]) -> list[str]:
    """Flags for DeepSpeed's multi-node launchers. `--force_multi` keeps it from starting a lone remote host here."""
    first = next(iter(slots))
    flags = [f"--master_port={options.master_port}"] if options.master_port else []
    if "--no_ssh" in extra:
        return [*flags, f"--master_addr={options.master_addr or first}"]
    launcher = options.launcher.lower()
    if launcher not in PROGRAMS:
        raise UserError(f"--launcher={options.launcher} is not one of {', '.join(PROGRAMS)}")
    if shutil.which(PROGRAMS[launcher]) is None:
        raise UserError(f"--launcher={launcher} needs {PROGRAMS[launcher]}, which is not on PATH")
    for host, numbers in slots.items() if launcher in WITHOUT_FILTERS else ():
        if numbers != list(range(len(numbers))):
            raise UserError(
                f"--launcher={launcher} starts ranks on the first slots of a host, and {_filters(options)[0]} leaves "
                f"{host} slots {', '.join(map(str, numbers))}; use --launcher=pdsh"
            )
    if launcher in EQUAL_SLOTS and len({*map(len, slots.values())}) > 1:
        counts = ", ".join(f"{host} {len(numbers)}" for host, numbers in slots.items())
        raise UserError(f"--launcher={launcher} needs hosts of equal slots, they have: {counts}")
    _check_environment_files()
    if launcher != "pdsh":
        address = options.master_addr or first  # MPI tells the ranks another
    else:
        if not options.no_ssh_check:
            _check_reachable(list(slots))
        address = options.master_addr or _address_of(first)
    launcher = MADE_FOR_HYDRA.get(launcher, launcher)
    return [*flags, "--force_multi", "--no_ssh_check", f"--launcher={launcher}", f"--master_addr={address}"]


def _check_environment_files() -> None:
    """Of the files whose variables DeepSpeed sets on all hosts; a line that it cannot read ends it with a traceback."""
    name = os.environ.get("DS_ENV_FILE", ENVIRONMENT_FILE)
    for path in (Path.home() / name, Path(name)):
        for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], start=1):
            if not re.fullmatch(r"\s*[A-Za-z_]\w*=.*", line):
                raise UserError(f"{path}:{number}: {line!r} is not of the form NAME=value")


def _check_reachable(hosts: list[str]) -> None:
    """DeepSpeed checks the first host alone; the ranks of the others would wait for one that never comes."""
    remote = [host for host in hosts if not hostfile.is_this_machine(host)]
    with ThreadPoolExecutor(max_workers=32) as pool:
        list(pool.map(lambda host: _ssh(host, "true"), remote))


def unreachable(hosts: list[str]) -> list[str]:
    """Those of the hosts that do not answer ssh."""

    def fails(host: str) -> bool:
        if hostfile.is_this_machine(host):
            return False
        try:
            _ssh(host, "true")
        except UserError:
            return True
        return False

    with ThreadPoolExecutor(max_workers=32) as pool:
        return [host for host, failed in zip(hosts, pool.map(fails, hosts), strict=True) if failed]


def _address_of(host: str) -> str:
    """The first address that a host gives itself, as DeepSpeed finds it."""
    command = "hostname -I"
    if hostfile.is_this_machine(host):
        output = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False).stdout
    else:
        output = _ssh(host, command)
    if not output.split():
        raise UserError(f"cannot tell the address of host {host}; give --master-addr")
    return output.split()[0]


def _ssh(host: str, command: str) -> str:
    """Run a command on a host without a password.

    Raises:
        UserError: ssh is missing, or the host cannot be reached.
    """
    words = ["ssh", "-o", "PasswordAuthentication=no", "-o", "BatchMode=yes", host, command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SSH_SECONDS, check=True)
    except FileNotFoundError:
        raise UserError(f"host {host} needs ssh, which is not on PATH") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"host {host} did not answer ssh within {SSH_SECONDS} s") from None
    except subprocess.CalledProcessError as error:
        reason = " ".join((error.stderr or "").split()) or f"ssh exited with {error.returncode}"
        raise UserError(f"host {host} cannot be reached by ssh without a password: {reason}") from None
    return done.stdout


def _ranks(count: int) -> str:
    return f"{count} rank" + ("s" if count != 1 else "")


def deepspeed_command() -> list[str]:
    """The `deepspeed` command of the Python that runs this, wherever its script lies.

    Raises:
        UserError: DeepSpeed is not installed there.
    """
    if find_spec("deepspeed") is None:
        raise UserError(f"DeepSpeed is not installed for {sys.executable}")
    return [sys.executable, "-m", "deepspeed.launcher.runner"]
