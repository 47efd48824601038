"""Micro-batches: the same global batches whatever the number of ranks, and the same data after a stop."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from occult_train.data.indexed import IndexedReader
from occult_train.data.loader import Batches
from occult_train.data.samples import GPTDataset


class Counting:
    """Sample i holds nothing but i."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([index, index]), "labels": torch.tensor([index, -index])}


def of_rank(micro: int, rank: int, world: int, consumed: int = 0) -> Batches:
    return Batches(Counting(), consumed_samples=consumed, micro_batch_size=micro, rank=rank, world_size=world)


def test_worked_by_hand() -> None:
    batches = of_rank(micro=2, rank=1, world=3, consumed=12)
    batch = next(batches)
    assert batch["input_ids"].tolist() == [[14, 14], [15, 15]]
    assert batch["labels"].tolist() == [[14, -14], [15, -15]]
    assert batches.consumed_samples == 18
    assert next(iter(batches))["input_ids"][:, 0].tolist() == [20, 21]


@settings(max_examples=60, deadline=None)
@given(micro=st.integers(1, 4), world=st.integers(1, 6), accumulation=st.integers(1, 4), steps=st.integers(1, 3))
def test_a_global_batch_is_a_run_of_samples_whatever_the_ranks(
    micro: int, world: int, accumulation: int, steps: int
) -> None:
    size = micro * world * accumulation
    ranks = [of_rank(micro, rank, world, consumed=5 * size) for rank in range(world)]
    for step in range(steps):
        seen = []
        for a in range(accumulation):
            for rank, batches in enumerate(ranks):
                rows = next(batches)["input_ids"][:, 0].tolist()
                first = (5 + step) * size + (a * world + rank) * micro
                assert rows == list(range(first, first + micro))
                seen += rows
        assert sorted(seen) == list(range((5 + step) * size, (6 + step) * size))


def test_continues_where_it_stopped(numbered: Callable[..., Path]) -> None:
    dataset = GPTDataset(IndexedReader(numbered([30] * 4)), 8, 5)

    def start(consumed: int) -> Batches:
        return Batches(dataset, consumed_samples=consumed, micro_batch_size=2, rank=1, world_size=2)

    never_stopped = start(0)
    for _ in range(4):
        next(never_stopped)
    resumed = start(never_stopped.consumed_samples)
    for _ in range(6):
        before, after = next(never_stopped), next(resumed)
        assert before.keys() == after.keys() == {"input_ids", "labels"}
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert before["input_ids"].shape == (2, 8)


def test_rows_do_not_share_memory(numbered: Callable[..., Path]) -> None:
    sample = GPTDataset(IndexedReader(numbered([9])), 8, 0)[0]
    inputs = sample["input_ids"].clone()
    sample["labels"][:] = -100
    assert torch.equal(sample["input_ids"], inputs)


@pytest.mark.parametrize(
    "bad",
    [
        {"consumed_samples": -1},
        {"micro_batch_size": 0},
        {"rank": 2},
        {"rank": -1},
    ],
)
def test_impossible_arguments(bad: dict[str, int]) -> None:
    arguments = {"consumed_samples": 0, "micro_batch_size": 1, "rank": 0, "world_size": 2} | bad
    with pytest.raises(ValueError, match="impossible batches"):
        Batches(Counting(), **arguments)
