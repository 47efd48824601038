"""Whole runs as users start them: every way of starting gives the same run, and what goes wrong is said in one line."""

import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import records

from occult_train.distributed import free_port

BIN = Path(sys.executable).parent
OCCULT = [sys.executable, "-m", "occult_train.launcher.cli"]
RANK = [sys.executable, "-m", "occult_train.train"]
pytestmark = pytest.mark.slow


def run(folder: Path, words: list[str], code: int = 0) -> list[str]:
    """Run a command, check its exit code, and return what it printed, without announcements and steps."""
    done = subprocess.run(
        words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False
    )
    assert done.returncode == code, done.stdout
    return [
        line
        for line in done.stdout.splitlines()
        if not re.match(r"starting |experts: |step \d+: (loss|held-out)", line)
    ]


def test_every_way_of_starting_gives_the_same_run(mess: Path) -> None:
    (mess / "four").write_text("localhost slots=4\n")
    by_hand = [str(BIN / "deepspeed"), "--hostfile", "four", "--no_ssh_check", "--master_addr", "127.0.0.1"]
    starts = {
        "one-host": [*OCCULT, "train"],
        "hostfile": [*OCCULT, "train", "--hostfile", "four", "--exclude", "localhost:0,2"],
        "hand": [*by_hand, "--include", "localhost:1,3", "--master_port", str(free_port()), "--module", RANK[-1]],
        "mpirun": [str(BIN / "mpirun"), "-n", "2", *RANK],
    }
    logs = {}
    for name, words in starts.items():
        run(mess, [*words, "a.yaml", f"output=started-{name}", "train.steps=3"])
        logs[name] = records(mess / f"started-{name}")
        assert [record["step"] for record in logs[name]] == [1, 2, 3, 3]
    assert all(log == logs["one-host"] for log in logs.values())


@pytest.mark.parametrize("launcher", ["mpirun", "deepspeed"])
def test_a_mistake_is_said_once_whoever_starts_the_ranks(mess: Path, launcher: str) -> None:
    words = [str(BIN / "mpirun"), "-n", "2", *RANK]
    if launcher == "deepspeed":
        words = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), "--module", RANK[-1]]
    for mistake in ("train.step=3", "data.path=nowhere"):
        lines = run(mess, [*words, "a.yaml", "output=unmade", mistake], code=2)
        assert len([line for line in lines if line.startswith("error: ")]) == 1
        assert "Traceback" not in "\n".join(lines)


def test_a_port_in_use_is_one_line(mess: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        lines = run(mess, [*OCCULT, "train", "a.yaml", "output=unmade", "--master-port", port], code=2)
    assert lines == [f"error: port {port} is in use; choose another with --master-port"]


def test_a_damaged_checkpoint_ends_all_ranks_in_one_line(mess: Path) -> None:
    lines = run(mess, [*OCCULT, "train", "a.yaml", "output=damaged", "train.steps=2"], code=2)
    assert len(lines) == 1
    assert lines[0].startswith("error: checkpoint damaged/checkpoints/step-00000001: ")
    assert not (mess / "damaged" / "errors").exists()


# ---------------------------------------------------------------- disks


def on_a_disk(folder: Path, options: str, words: list[str]) -> list[str]:
    """The command in a mount namespace in which `folder` is a disk of its own, with nobody else seeing it."""
    folder.mkdir(exist_ok=True)
    script = f'mount -t tmpfs -o {options} tmpfs "{folder}" && exec "$@"'
    return ["unshare", "-rm", "sh", "-c", script, "sh", *words]


requires_mounts = pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode != 0,
    reason="needs a mount namespace (unshare -rm), which this machine does not allow",
)


@requires_mounts
@pytest.mark.parametrize("size, steps", [("8k", 1), ("96k", 300), ("300k", 3)], ids=["start", "log", "save"])
def test_a_full_disk_is_one_line(mess: Path, size: str, steps: int) -> None:
    words = [*OCCULT, "train", "a.yaml", f"output={mess}/disk/run", f"train.steps={steps}"]
    lines = run(mess, on_a_disk(mess / "disk", f"size={size}", words), code=2)
    where = f"output={mess}/disk/run cannot be written: No space left on device"
    saving = f"a checkpoint cannot be written to {mess}/disk/run/checkpoints: rank [01]: No space left on device; "
    saving += r"it has ([\d,]+) bytes, ([\d,]+) are free; there is no earlier checkpoint"
    assert len(lines) == 1, lines
    found = re.fullmatch(f"error: {saving if size == '300k' else re.escape(where)}", lines[0])
    assert found is not None, lines
    if size == "300k":
        needed, free = (int(number.replace(",", "")) for number in found.groups())
        assert needed > free > 0


@requires_mounts
def test_a_read_only_run_folder_is_one_line(mess: Path) -> None:
    words = [*OCCULT, "train", "a.yaml", f"output={mess}/locked/run"]
    lines = run(mess, on_a_disk(mess / "locked", "ro", words), code=2)
    assert lines == [f"error: output={mess}/locked/run cannot be written: Read-only file system"]


@requires_mounts
@pytest.mark.parametrize("words", ["export run --output", "prepare text --vocab-size 300 --output"])
def test_a_full_disk_is_one_line_of_other_tools_too(mess: Path, words: str) -> None:
    lines = run(mess, on_a_disk(mess / "disk", "size=16k", [*OCCULT, *words.split(), f"{mess}/disk/new"]), code=2)
    assert re.fullmatch(f"error: --output={mess}/disk/new cannot be written: .*No space left on device.*", lines[-1])
    assert "Traceback" not in "\n".join(lines)
