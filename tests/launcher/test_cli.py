"""The `occult` command up to the moment where ranks would start."""

import subprocess
import sys
from pathlib import Path

import pytest
from launching import BIN, CONFIG

from occult_train.config import load


def _occult(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "a.yaml").write_text(CONFIG)
    return subprocess.run([str(BIN / "occult"), *words], cwd=folder, capture_output=True, text=True, timeout=60)


def test_help_lists_every_command_without_importing_torch(tmp_path: Path) -> None:
    code = "import sys; from occult_train.launcher import cli; sys.argv = ['occult', '--help']\n"
    code += "try: cli.main()\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'deepspeed', 'numpy', 'omegaconf') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]"
    for name in ("train", "demo", "prepare", "export", "generate", "report", "bench"):
        assert f"\n  {name} " in done.stdout


def test_print_config_prints_what_load_reads_back(tmp_path: Path) -> None:
    done = _occult(tmp_path, "train", "a.yaml", "train.steps=7", "--print-config")
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "resolved.yaml").write_text(done.stdout)
    assert load([str(tmp_path / "resolved.yaml")]).train.steps == 7
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["b.yaml"], "config file b.yaml does not exist"),
        (["a.yaml", "train.step=3"], "unknown setting train.step; did you mean train.steps?"),
        (["a.yaml", "--num-gpus", "3"], "3 ranks are not divisible by parallel.expert=2"),
        (
            ["a.yaml", "--hostfile", "hosts"],
            "hosts:1: 'node1 slot=4' is not of the form HOST slots=N, e.g. node1 slots=8",
        ),
        (["a.yaml", "output=a.yaml/x"], "output=a.yaml/x cannot be written: Not a directory"),
    ],
)
def test_a_users_mistake_is_one_line(tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "hosts").write_text("node1 slot=4\n")
    done = _occult(tmp_path, "train", *words)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {message}\n")


@pytest.mark.parametrize("words", [["trian"], ["train"], ["train", "a.yaml", "--num-gpu", "x"]])
def test_a_mistyped_command_is_one_line(tmp_path: Path, words: list[str]) -> None:
    done = _occult(tmp_path, *words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "--help`" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_bare_command_shows_help(tmp_path: Path) -> None:
    done = _occult(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: occult" in done.stdout


def test_a_missing_tool_breaks_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from occult_train.launcher import cli

    monkeypatch.setitem(cli.TOOLS, "absent", "Not there.")
    runner = CliRunner()
    assert "Not there." in runner.invoke(cli.app, ["--help"]).output
    result = runner.invoke(cli.app, ["absent"])
    assert result.exit_code == 2
    assert "`occult absent` needs occult_train.tools.absent, which is not installed" in result.output


def test_a_tool_runs_with_its_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    from typer.testing import CliRunner

    from occult_train.launcher import cli

    def command(name: str, times: int = 1) -> int:
        """Greet."""
        print(f"hello {name} " * times)
        return 3

    module = types.ModuleType("occult_train.tools.greet")
    monkeypatch.setattr(module, "command", command, raising=False)
    monkeypatch.setitem(sys.modules, "occult_train.tools.greet", module)
    monkeypatch.setitem(cli.TOOLS, "greet", "Greet.")
    result = CliRunner().invoke(cli.app, ["greet", "you", "--times", "2"])
    assert "hello you hello you" in result.output
    assert result.exit_code == 3
