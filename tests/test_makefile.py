"""`make` names what a fresh machine lacks, before it sets anything up."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
APT = "on Debian or Ubuntu: sudo apt-get install -y make git g++ python3-venv python3-dev"
PYTHON = """#!/bin/sh
case "$*" in
    -V) echo Python {version} ;;
    *version_info*) {supported} ;;
    *ensurepip*) {venv} ;;
    *Python.h*) {headers} ;;
esac
"""


def python(folder: Path, version: str = "3.12.4", **answers: str) -> Path:
    """A stand-in for an interpreter that answers the questions of `make` as told: true or false."""
    path = folder / "python-of-a-user"
    told = {"supported": "true", "venv": "true", "headers": "true", **answers}
    path.write_text(PYTHON.format(version=version, **told))
    path.chmod(0o755)
    return path


def check(tmp_path: Path, interpreter: Path | str, without: tuple[str, ...] = ()) -> tuple[int, list[str]]:
    """Exit code and output of `make check-tools` on a machine without some programs."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in {"git", "g++", "sh", "cut"} - set(without):
        found = shutil.which(name)
        assert found is not None, f"the test needs {name}"
        (programs / name).symlink_to(found)
    words = [shutil.which("make") or "make", "--no-print-directory", "check-tools", f"PYTHON={interpreter}"]
    done = subprocess.run(words, cwd=ROOT, env={"PATH": str(programs)}, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines()


def test_nothing_is_said_where_nothing_is_missing(tmp_path: Path) -> None:
    assert check(tmp_path, python(tmp_path)) == (0, [])


@pytest.mark.parametrize("missing", [("g++",), ("git",), ("git", "g++")])
def test_missing_programs_are_named_with_the_command_that_brings_them(tmp_path: Path, missing: tuple[str, ...]) -> None:
    assert check(tmp_path, python(tmp_path), missing) == (2, [f"missing: {' '.join(missing)}", APT])


@pytest.mark.parametrize(
    "answers, named",
    [
        ({"supported": "false", "version": "3.10.9"}, "python 3.11 to 3.13 (found 3.10.9)"),
        ({"supported": "false", "version": "3.14.0"}, "python 3.11 to 3.13 (found 3.14.0)"),
        ({"venv": "false"}, "python3-venv"),
        ({"headers": "false"}, "python3-dev"),
        ({"venv": "false", "headers": "false"}, "python3-venv python3-dev"),
    ],
)
def test_an_interpreter_that_will_not_do_is_named(tmp_path: Path, answers: dict[str, str], named: str) -> None:
    assert check(tmp_path, python(tmp_path, **answers)) == (2, [f"missing: {named}", APT])


def test_a_missing_interpreter_is_named(tmp_path: Path) -> None:
    assert check(tmp_path, "python3.99") == (2, ["missing: python3.99", APT])
