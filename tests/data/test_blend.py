"""Blends: proportions, completeness and independence of the way to a sample."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from occult_train.data import blend
from occult_train.data.blend import BlendedDataset, BlendSchedule
from occult_train.data.indexed import IndexedReader
from occult_train.data.samples import GPTDataset
from occult_train.errors import DataError

weight_lists = st.lists(st.floats(0.001, 1000), min_size=1, max_size=7)


def reference(weights: list[float], count: int) -> list[tuple[int, int]]:
    """The first samples, by always taking the corpus whose next sample is due first."""
    shares = [weight / sum(weights) for weight in weights]
    given = [0] * len(weights)
    order = []
    for _ in range(count):
        due = [(k + 0.5) / share for k, share in zip(given, shares, strict=True)]
        corpus = due.index(min(due))
        order.append((corpus, given[corpus]))
        given[corpus] += 1
    return order


@pytest.mark.parametrize("weights", [[1], [1, 1], [3, 1], [0.5, 0.3, 0.2], [7, 1, 1, 1], [5, 5, 2, 100]])
def test_order_is_that_of_the_slow_reference(weights: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blend, "CHUNK", 37)
    schedule = BlendSchedule(weights)
    assert [schedule[i] for i in range(500)] == reference(weights, 500)


@settings(max_examples=60, deadline=None)
@given(weights=weight_lists)
def test_counts_stay_close_to_the_weights_and_no_sample_is_skipped(weights: list[float]) -> None:
    schedule = BlendSchedule(weights)
    counts = np.zeros(len(weights))
    shares = np.array(weights) / sum(weights)
    for index in range(300):
        corpus, sample = schedule[index]
        assert sample == counts[corpus]
        counts[corpus] += 1
        assert np.abs(counts - shares * (index + 1)).max() <= len(weights)


@settings(max_examples=60, deadline=None)
@given(weights=weight_lists, start=st.integers(0, 10**13))
def test_far_samples_follow_each_other_too(weights: list[float], start: int) -> None:
    schedule = BlendSchedule(weights)
    shares = np.array(weights) / sum(weights)
    last: dict[int, int] = {}
    for index in range(start, start + 50):
        corpus, sample = schedule[index]
        assert sample == last.get(corpus, sample - 1) + 1
        assert abs(sample - shares[corpus] * index) <= len(weights) + 1e-12 * index
        last[corpus] = sample


@settings(max_examples=30, deadline=None)
@given(weights=weight_lists, indices=st.lists(st.integers(0, 10**9), min_size=1, max_size=30))
def test_a_sample_does_not_depend_on_what_was_asked_before(weights: list[float], indices: list[int]) -> None:
    schedule = BlendSchedule(weights)
    assert [schedule[i] for i in indices] == [BlendSchedule(weights)[i] for i in indices]
    assert len(schedule._chunks) <= blend.CHUNKS_KEPT


def test_chunks_join(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = BlendSchedule([3, 2, 0.1])
    whole = [schedule[i] for i in range(1000)]
    monkeypatch.setattr(blend, "CHUNK", 16)
    schedule = BlendSchedule([3, 2, 0.1])
    assert [schedule[i] for i in range(1000)] == whole
    with pytest.raises(IndexError):
        schedule[-1]


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_impossible_weights_are_refused(weight: float) -> None:
    with pytest.raises(DataError, match=f"data.blend has the weight {weight}; weights must be positive"):
        BlendSchedule([1, weight])
    with pytest.raises(DataError, match="names no corpus"):
        BlendSchedule([])


def test_weights_are_normalised() -> None:
    assert BlendSchedule([1, 3]).weights.tolist() == [0.25, 0.75]


def test_samples_come_from_the_corpora(numbered: Callable[..., Path]) -> None:
    one = GPTDataset(IndexedReader(numbered([50], "one")), 4, 1)
    two = GPTDataset(IndexedReader(numbered([30, 20], "two")), 4, 1)
    dataset = BlendedDataset([one, two], [1, 2])
    for index, (corpus, sample) in enumerate(reference([1, 2], 40)):
        expected = (one, two)[corpus][sample]
        assert all((dataset[index][name] == expected[name]).all() for name in expected)
