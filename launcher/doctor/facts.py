"""What a host has, as JSON. Its source is sent to the hosts and run there by `python -`, so it needs nothing of ours.

    python - [FOLDER [OUTPUT]] < facts.py

FOLDER is where commands run, OUTPUT what they write to. Two lines come out: the facts, and the times at which it began
and ended, in seconds since 1970.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "deepspeed", "transformers", "safetensors", "numpy", "mpi4py")
OURS = "occult_train"
SECONDS = 10
"""For a program that is asked."""


def facts(folder: str, output: str) -> dict[str, Any]:
    """All of them; see `occult_train.launcher.doctor.host.Facts`."""
    there = os.path.isdir(folder)
    if there:
        os.chdir(folder)
        sys.path.insert(0, folder)  # as `python -m` does
    memory = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text()))
    return {
        "name": socket.gethostname(),
        "folder": there,
        "versions": {"python": platform.python_version(), OURS: ours(), **{name: version(name) for name in PACKAGES}},
        "cores": len(os.sched_getaffinity(0)),
        "memory": int(memory["MemTotal"]) << 10,
        "memory_free": int(memory["MemAvailable"]) << 10,
        "disk_free": free(Path(output)),
        "shared_memory_free": free(Path("/dev/shm")),
        "gpus": gpus(said("nvidia-smi", f"--query-gpu={GPU}", "--format=csv,noheader,nounits")),
        "gpu_links": gpu_links(said("nvidia-smi", "topo", "-m")),
        "networks": networks(Path("/sys/class")),
    }


def version(name: str) -> str:
    """Of an installed package; empty where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def ours() -> str:
    """Of occult_train with a digest of its sources, which a checkout may have changed."""
    spec = importlib.util.find_spec(OURS)
    if spec is None or spec.origin is None:
        return ""
    digest, root = hashlib.sha256(), Path(spec.origin).parent
    found = [Path(top) / name for top, _, names in os.walk(root, followlinks=True) for name in names]
    for path in sorted(path for path in found if path.suffix == ".py"):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{version(OURS) or '?'} ({digest.hexdigest()[:8]})"


def free(path: Path) -> int:
    """Bytes that may still be written at a path that need not exist yet; -1 where nobody can tell."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return -1


def said(*command: str) -> str:
    """What a program says; empty where it is missing, fails or does not end."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


GPU = "name,memory.total,memory.free,driver_version"


def gpus(text: str) -> list[dict[str, Any]]:
    """Of nvidia-smi's table with a line a GPU and the columns of `GPU`, in MiB."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.count(",") == 3]
    return [
        {"name": name, "memory": int(total) << 20, "memory_free": int(left) << 20, "driver": driver}
        for name, total, left, driver in rows
        if total.isdecimal() and left.isdecimal()
    ]


def gpu_links(text: str) -> list[str]:
    """Kinds of links between GPUs (NV18, PIX, SYS ...) in `nvidia-smi topo -m`, each once."""
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line).split() for line in text.splitlines()]
    rows = [line for line in lines if line and re.fullmatch(r"GPU\d+", line[0]) and "X" in line]
    return sorted({cell for row in rows for cell in row[1 : len(rows) + 1]} - {"X"})


def networks(root: Path) -> dict[str, str]:
    """Speed of each network interface that is up and of each InfiniBand port, as the kernel tells it."""
    found = {}
    for path in sorted(root.glob("net/*/speed")):
        try:
            speed = int(path.read_text())
        except (OSError, ValueError):  # an interface that is down, or has none
            continue
        if speed > 0:
            found[path.parent.name] = f"{speed} Mb/s"
    for path in sorted(root.glob("infiniband/*/ports/*/rate")):
        found[f"{path.parts[-4]}:{path.parts[-2]}"] = path.read_text().strip()
    return found


if __name__ == "__main__":
    began = time.time()
    where = sys.argv[1] if len(sys.argv) > 1 else os.getcwd()
    print(json.dumps(facts(where, sys.argv[2] if len(sys.argv) > 2 else ".")))
    print(json.dumps([began, time.time()]))
