"""Fixtures that launch."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from launching import CONFIG, HERE, Command, Start


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start `words` with the run's settings and a behaviour of `fake_rank` added."""
    commands = []

    def begin(
        words: list[str], behaviour: str, environment: dict[str, str] | None = None, settings: Sequence[str] = ()
    ) -> Command:
        (tmp_path / "a.yaml").write_text(CONFIG)
        typed = [str(tmp_path / "a.yaml"), f"output={tmp_path}/run", f"data.path={behaviour}", *settings]
        commands.append(Command(tmp_path, [*words, *typed], environment))
        return commands[-1]

    yield begin
    for command in commands:
        command.kill()


@pytest.fixture
def occult() -> list[str]:
    """`occult train` with fake ranks."""
    return [sys.executable, str(HERE / "fake_occult.py"), "train"]
