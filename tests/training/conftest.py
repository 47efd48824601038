"""A corpus to train on."""

import numpy as np
import pytest

from occult_train.tools.prepare import prepare


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A corpus of generated sentences."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "seven", "dogs", "run", "home"]
    for i in range(40):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(words, 300)) + f"\nfile {i}\n")
    prepare([str(folder)], folder / "corpus", vocab_size=300, tokenizer=None, workers=1, valid_fraction=0.2)
    return str(folder / "corpus")
