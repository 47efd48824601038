"""Hosts made of namespaces, and something for them to train."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from host_runs import CONFIG

from occult_train.tools.bench import hosts
from occult_train.tools.prepare import prepare


@pytest.fixture(scope="session")
def allowed() -> None:
    """Skip where hosts cannot be made, and say what is missing."""
    if missing := hosts.missing():
        pytest.skip(f"no test cluster: {missing}")


@pytest.fixture
def two(allowed: None) -> Iterator[list[hosts.Host]]:
    """Two hosts for one test, which may lose them or leave them as they should not be."""
    with hosts.cluster(2) as made:
        yield made


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus of generated sentences."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "seven", "dogs", "run", "home"]
    for i in range(40):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(words, 300)) + f"\nfile {i}\n")
    prepare([str(folder)], folder / "corpus", vocab_size=300, tokenizer=None, workers=1, valid_fraction=0.2)
    return folder / "corpus"


@pytest.fixture
def folder(tmp_path: Path, text: Path) -> Path:
    """Where commands are typed: a config, a corpus and a hostfile of two hosts of two slots."""
    (tmp_path / "a.yaml").write_text(CONFIG)
    (tmp_path / "corpus").symlink_to(text)
    (tmp_path / "hosts").write_text("node0 slots=2\nnode1 slots=2\n")
    return tmp_path


@pytest.fixture
def one_rank_each(folder: Path) -> Path:
    """The same with hosts of one slot."""
    (folder / "hosts").write_text("node0 slots=1\nnode1 slots=1\n")
    return folder
