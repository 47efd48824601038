"""`occult demo`: prepare, train, export, generate and report on a small model, each step a command to copy."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from occult_train.errors import UserError

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"
PROMPT = "def read_"


def command(
    folder: Annotated[Path, typer.Option(help="Where the corpus and the run go.")] = Path("runs"),
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings for `occult train`, e.g. train.steps=50.")
    ] = None,
) -> None:
    """Train the demo model on the Python standard library and show what came of it. Run again, it continues."""
    if not CONFIG.is_file():
        raise UserError(f"{CONFIG} does not exist; `occult demo` runs from a checkout of the repository")
    corpus, run = folder / "corpus", folder / "demo"
    settings = [f"output={run}", f"data.path={corpus}", *(overrides or [])]
    _occult("prepare", "--stdlib", "--output", str(corpus), "--vocab-size", "4096", "--valid-fraction", "0.03")
    _occult("train", os.path.relpath(CONFIG), *settings)
    _occult("export", str(run), "--output", str(run / "hf"), "--verify")
    text = _occult("generate", str(run), "--prompt", PROMPT, "--length", "120", capture=True)
    (run / "sample.txt").write_text(text)
    print(text)
    _occult("report", str(run))


def _occult(*arguments: str, capture: bool = False) -> str:
    """Run one command of ours, shown first; end with its exit code if it fails."""
    print(f"\n$ occult {shlex.join(arguments)}", flush=True)
    program = [sys.executable, "-m", "occult_train.launcher.cli", *arguments]
    child = subprocess.Popen(program, text=True, stdout=subprocess.PIPE if capture else None)
    # Ctrl-C reaches the child too; it saves, and its exit code ends this
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        text, _ = child.communicate()
    finally:
        signal.signal(signal.SIGINT, before)
    if child.returncode:
        raise typer.Exit(child.returncode)
    return text or ""
