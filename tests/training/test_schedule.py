"""The learning rate of each step, worked out by hand."""

import pytest

from occult_train.config import Config
from occult_train.engine import learning_rate


def rates(name: str, *, steps: int, warmup: int, floor: float = 0.0) -> list[float]:
    """Of every step of a run with a peak of 1."""
    config = Config()
    config.optimizer.lr, config.train.steps = 1.0, steps
    config.scheduler.name, config.scheduler.warmup_steps, config.scheduler.min_lr_ratio = name, warmup, floor
    return [learning_rate(config, step) for step in range(steps)]


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_warm_up_rises_to_the_peak(name: str) -> None:
    """The first step already learns, the last of the warm-up has the whole rate, and so has the next."""
    assert rates(name, steps=8, warmup=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_decay_reaches_the_floor_at_train_steps(name: str, expected: list[float]) -> None:
    """Four steps of decay after two of warm-up: 0, 1/4, 1/2 and 3/4 of the way are done."""
    assert rates(name, steps=6, warmup=2) == pytest.approx(expected, rel=1e-12)
    lifted = [e if i < 2 else 0.2 + 0.8 * e for i, e in enumerate(expected)]
    assert rates(name, steps=6, warmup=2, floor=0.2) == pytest.approx(lifted, rel=1e-12)


def test_without_warm_up_the_first_step_has_the_whole_rate() -> None:
    assert rates("linear", steps=4, warmup=0) == [1.0, 0.75, 0.5, 0.25]


def test_a_run_that_is_all_warm_up() -> None:
    assert rates("cosine", steps=3, warmup=6) == pytest.approx([1 / 6, 2 / 6, 3 / 6], rel=1e-12)
