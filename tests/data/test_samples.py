"""Samples against a slow reference of the same specification, and by properties on numbered tokens."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from occult_train.data import samples
from occult_train.data.indexed import IndexedReader
from occult_train.data.samples import GPTDataset, HeldOut
from occult_train.errors import DataError

Numbered = Callable[..., Path]
relaxed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
corpora = st.tuples(
    st.lists(st.integers(0, 9), min_size=1, max_size=12),
    st.integers(1, 6),
    st.integers(-(2**40), 2**40),
).filter(lambda drawn: sum(drawn[0]) > drawn[1])


def shuffled(count: int, *key: int) -> list[int]:
    """The specified shuffle, slowly: positions in the order of their Philox words."""
    words = np.random.Philox(np.random.SeedSequence([k % 2**64 for k in key])).random_raw(count).tolist()
    return sorted(range(count), key=lambda position: (words[position], position))


def reference(lengths: list[int], length: int, seed: int, index: int) -> tuple[list[int], list[int], list[int]]:
    """Inputs, labels and document numbers of sample `index` of a numbered corpus, with lists alone."""
    pieces = (sum(lengths) - 1) // length
    epoch = index // pieces
    row = []
    for document in shuffled(len(lengths), seed, epoch, 0):
        begin = sum(lengths[:document])
        row += [(token, document) for token in range(begin, begin + lengths[document])]
    piece = shuffled(pieces, seed, epoch, 1)[index % pieces]
    cut = row[piece * length : piece * length + length + 1]
    seen: list[int] = []
    for _, document in cut:
        if document not in seen:
            seen.append(document)
    tokens = [token for token, _ in cut]
    return tokens[:-1], tokens[1:], [seen.index(document) for _, document in cut][:-1]


@relaxed
@given(drawn=corpora, indices=st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_samples_are_those_of_the_reference_in_any_order_of_asking(
    numbered: Numbered, drawn: tuple[list[int], int, int], indices: list[int]
) -> None:
    lengths, length, seed = drawn
    dataset = GPTDataset(IndexedReader(numbered(lengths)), length, seed, mask_documents=True)
    for index in indices:
        sample = dataset[index]
        inputs, labels, documents = reference(lengths, length, seed, index)
        assert sample["input_ids"].tolist() == inputs
        assert sample["labels"].tolist() == labels
        assert sample["document_ids"].tolist() == documents
        assert all(tensor.dtype == torch.int64 for tensor in sample.values())


@relaxed
@given(drawn=corpora, epoch=st.integers(0, 3))
def test_an_epoch_predicts_every_token_once_but_the_first_and_the_last_few(
    numbered: Numbered, drawn: tuple[list[int], int, int], epoch: int
) -> None:
    lengths, length, seed = drawn
    dataset = GPTDataset(IndexedReader(numbered(lengths)), length, seed)
    first = epoch * dataset.samples_per_epoch
    labels = torch.cat([dataset[first + i]["labels"] for i in range(dataset.samples_per_epoch)]).tolist()
    assert len(labels) == len(set(labels))
    assert sum(lengths) - 1 - len(labels) in range(length)


def test_worked_by_hand_without_shuffling(numbered: Numbered) -> None:
    held_out = HeldOut([IndexedReader(numbered([3, 0, 2, 6]))], 3, mask_documents=True)
    got = [[sample[name].tolist() for name in ("input_ids", "labels", "document_ids")] for sample in held_out]
    assert got == [
        [[0, 1, 2], [1, 2, 3], [0, 0, 0]],
        [[3, 4, 5], [4, 5, 6], [0, 0, 1]],
        [[6, 7, 8], [7, 8, 9], [0, 0, 0]],
    ]


def test_document_numbers_come_from_the_index_and_not_from_equal_tokens(write_pair: Callable[..., Path]) -> None:
    reader = IndexedReader(write_pair([[[7, 7], [7]], [[7]], [], [[7, 7, 7]]]))
    (sample,) = HeldOut([reader], 6, mask_documents=True)
    assert sample["document_ids"].tolist() == [0, 0, 0, 1, 2, 2]
    assert "document_ids" not in HeldOut([reader], 6)[0]


def test_held_out_corpora_take_turns(numbered: Numbered) -> None:
    long, short = IndexedReader(numbered([9], "long")), IndexedReader(numbered([5], "short"))
    held_out = HeldOut([short, long], 2)
    assert [sample["input_ids"].tolist() for sample in held_out] == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [6, 7]]
    assert len(held_out) == 6
    assert len(HeldOut([], 2)) == 0
    with pytest.raises(IndexError):
        held_out[6]


def test_epochs_and_seeds_differ(numbered: Numbered) -> None:
    reader = IndexedReader(numbered([50] * 20))
    order = {
        (seed, epoch): [GPTDataset(reader, 9, seed)[epoch * 111 + i]["input_ids"][0].item() for i in range(10)]
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert GPTDataset(reader, 9, 0).samples_per_epoch == 111
    assert len({tuple(starts) for starts in order.values()}) == 4


def test_the_order_is_the_same_for_ever(numbered: Numbered) -> None:
    """Values of this version: a change would silently give resumed runs other data."""
    dataset = GPTDataset(IndexedReader(numbered([4, 3, 5, 2, 6])), 3, 1234)
    assert [dataset[i]["input_ids"].tolist() for i in range(12)] == FOR_EVER


FOR_EVER = [
    [7, 8, 9],
    [4, 5, 6],
    [1, 2, 3],
    [15, 16, 17],
    [12, 13, 14],
    [10, 11, 0],
    [12, 13, 0],
    [14, 15, 16],
    [7, 8, 9],
    [17, 18, 19],
    [4, 5, 6],
    [1, 2, 3],
]


def test_few_epochs_are_kept_and_dropped_ones_come_back_the_same(
    numbered: Numbered, monkeypatch: pytest.MonkeyPatch
) -> None:
    shuffles = []
    original = samples.permutation
    monkeypatch.setattr(samples, "permutation", lambda n, *key: shuffles.append(key) or original(n, *key))
    dataset = GPTDataset(IndexedReader(numbered([40])), 4, 3)
    before = [dataset[i]["labels"].tolist() for i in range(27)]
    assert len(shuffles) == 6
    assert [dataset[i]["labels"].tolist() for i in range(27)] == before
    assert len(dataset._epochs) == samples.EPOCHS_KEPT


def test_many_documents_are_no_loop(tmp_path: Path) -> None:
    from occult_train.data.indexed import IndexedWriter

    lengths = np.arange(400_000) % 3
    with IndexedWriter(tmp_path / "many", np.dtype(np.uint16)) as writer:
        writer.add_many(np.zeros(int(lengths.sum()), np.uint16), lengths)
    dataset = GPTDataset(IndexedReader(tmp_path / "many"), 64, 0, mask_documents=True)
    sample = dataset[dataset.samples_per_epoch - 1]
    assert sample["document_ids"].shape == (64,)
    assert (np.diff(sample["document_ids"]) >= 0).all()


def test_a_short_corpus_is_refused_with_both_numbers(numbered: Numbered) -> None:
    reader = IndexedReader(numbered([3, 5]))
    assert GPTDataset(reader, 7, 0).samples_per_epoch == 1
    with pytest.raises(
        DataError, match=r"numbered\.bin has 8 tokens, fewer than the 9 of one sample \(data.sequence_len"
    ):
        GPTDataset(reader, 8, 0)
    with pytest.raises(DataError, match="8 tokens"):
        HeldOut([reader], 8)
    with pytest.raises(IndexError):
        GPTDataset(reader, 7, 0)[-1]


def test_ids_outside_of_the_vocabulary_are_refused(write_pair: Callable[..., Path]) -> None:
    reader = IndexedReader(write_pair([[[1, 2, 99]]]))
    assert GPTDataset(reader, 2, 0, vocab_size=100)[0]["labels"].tolist() == [2, 99]
    with pytest.raises(DataError, match=r"pair\.bin holds the token id 99, beyond model.vocab_size=99"):
        GPTDataset(reader, 2, 0, vocab_size=99)[0]
    negative = IndexedReader(write_pair([[[1, -2, 3]]], name="negative", dtype="int8"))
    with pytest.raises(DataError, match="negative token id -2"):
        GPTDataset(negative, 2, 0)[0]
