"""Prompts and responses: kept whole, packed without a gap in what is learnt, and every malformed line named."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from occult_train.config import DataConfig
from occult_train.data.indexed import IndexedReader
from occult_train.data.loader import build_datasets
from occult_train.data.packing import pack
from occult_train.data.samples import GPTDataset, HeldOut
from occult_train.data.tokenizer import load_tokenizer
from occult_train.errors import DataError
from occult_train.tools.prepare import prepare

WritePair = Callable[..., Path]
relaxed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LINES = [{"prompt": f"Add {i} and {i * 7}.", "response": f" It is {i * 8}, {'really ' * (i % 5)}!"} for i in range(60)]


def write(path: Path, lines: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def make(source: Path, output: Path, **options: Any) -> dict[str, Any]:
    return prepare([str(source)], output, instructions=True, vocab_size=300, workers=1, part_bytes=900, **options)


def examples(write_pair: WritePair, lengths: Sequence[tuple[int, int]], name: str = "examples") -> IndexedReader:
    """A corpus of prompts and responses of these lengths whose tokens are 0, 1, 2, ... throughout."""
    at, documents = 0, []
    for prompt, response in lengths:
        documents.append([range(at, at + prompt), range(at + prompt, at + prompt + response)])
        at += prompt + response
    return IndexedReader(write_pair(documents, name, "int32"), examples=True)


# ---------------------------------------------------------------- packing


def test_worked_by_hand(write_pair: WritePair) -> None:
    """Room for 7 tokens: 4 + 3 fill a piece; 6; 9 loses two of its end, and the prompt of 7 leaves nothing to learn."""
    reader = examples(write_pair, [(2, 2), (7, 1), (5, 4), (2, 1), (0, 6)])
    data = HeldOut([reader], 6, mask_documents=True)
    x = -100
    found = [[sample[name].tolist() for name in ("input_ids", "labels", "document_ids")] for sample in data]
    assert found == [
        [[12, 13, 14, 15, 16, 17], [x, x, x, x, 17, 18], [0, 0, 0, 0, 0, 0]],
        [[24, 25, 26, 27, 28, 29], [25, 26, 27, 28, 29, x], [0, 0, 0, 0, 0, 0]],
        [[0, 1, 2, 3, 21, 22], [x, 2, 3, x, x, 23], [0, 0, 0, 0, 1, 1]],
    ]
    (remark,) = data.remarks
    assert remark.endswith("1 of 5 examples end behind data.sequence_length and are cut there, 1 are left out, whose "
                           "prompts alone are as long")  # fmt: skip
    (short,) = HeldOut([examples(write_pair, [(2, 2)], "short")], 6, mask_documents=True)
    assert short["input_ids"].tolist() == [0, 1, 2, 3, 3, 3]
    assert short["labels"].tolist() == [x, 2, 3, x, x, x]
    assert short["document_ids"].tolist() == [0, 0, 0, 0, 1, 1]
    assert "document_ids" not in HeldOut([reader], 6)[0]


lengths = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=12)


@relaxed
@given(drawn=lengths, room=st.integers(3, 12), seed=st.integers(0, 99), epoch=st.integers(0, 2))
def test_an_epoch_learns_every_response_once_and_no_prompt(
    write_pair: WritePair, drawn: list[tuple[int, int]], room: int, seed: int, epoch: int
) -> None:
    reader = examples(write_pair, drawn)
    kept = [(p, min(p + r, room)) for p, r in drawn if max(p, 1) < min(p + r, room)]
    if not kept:
        with pytest.raises(DataError, match=f"has no example whose prompt is shorter than the {room} tokens"):
            GPTDataset(reader, room - 1, seed)
        return
    data = GPTDataset(reader, room - 1, seed, mask_documents=True)
    first = epoch * data.samples_per_epoch
    learnt: Counter[int] = Counter()
    for i in range(data.samples_per_epoch):
        sample = {name: tensor.tolist() for name, tensor in data[first + i].items()}
        for token, label, document in zip(*sample.values(), strict=True):
            if label != -100:
                learnt[label] += 1
                assert label == token + 1, "the token before it in its own example"
                begin = int(reader.offsets[np.searchsorted(reader.offsets, label, side="right") - 1])
                assert sample["input_ids"].count(begin) == 1, "with the whole of its example before it"
                seen = [t for t, d in zip(sample["input_ids"], sample["document_ids"], strict=True) if d == document]
                assert seen == list(range(begin, begin + len(seen))), "and nothing of another"
    expected: Counter[int] = Counter()
    for (prompt, response), begin in zip(drawn, reader.offsets[:-1].tolist(), strict=True):
        if max(prompt, 1) < min(prompt + response, room):
            expected.update(range(begin + max(prompt, 1), begin + min(prompt + response, room)))
    assert learnt == expected
    assert data.samples_per_epoch == len({*pack(sorted((size for _, size in kept), reverse=True), room)})


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_pieces_are_the_fullest_that_fit(sizes: list[int]) -> None:
    """Against the rule in slow words."""
    sizes.sort(reverse=True)
    room, left, loads = 20, [], []
    for size in sizes:
        fitting = [piece for piece, rest in enumerate(left) if rest >= size]
        tightest = min((left[piece] for piece in fitting), default=room)
        loads.append(tightest)
        if not fitting:
            left.append(room)
        left[next(p for p, rest in enumerate(left) if rest == tightest)] -= size
    pieces = pack(sizes, room)
    rest = dict.fromkeys(pieces, room)
    for size, piece, before in zip(sizes, pieces, loads, strict=True):
        assert rest[piece] == before
        rest[piece] -= size
    assert sorted(rest.values()) == sorted(left)
    assert sorted(rest) == list(range(len(left)))


def test_epochs_are_shuffled_and_a_sample_is_a_function_of_its_index(write_pair: WritePair) -> None:
    reader = examples(write_pair, [(1, 2)] * 40)
    data, again = GPTDataset(reader, 8, 7), GPTDataset(reader, 8, 7)
    assert data.samples_per_epoch == 14
    epochs = [[data[14 * e + i]["input_ids"].tolist() for i in range(14)] for e in (0, 1)]
    assert epochs[0] != epochs[1]
    companions = [{frozenset(token // 3 for token in piece) for piece in epoch} for epoch in epochs]
    assert companions[0] != companions[1]
    assert [again[i]["input_ids"].tolist() for i in reversed(range(14))] == epochs[0][::-1]


# ---------------------------------------------------------------- prepare


def test_what_prepare_makes_is_what_the_lines_say(tmp_path: Path) -> None:
    made = make(write(tmp_path / "source.jsonl", LINES), tmp_path / "corpus", valid_fraction=0.2)
    tokenizer = load_tokenizer(tmp_path / "corpus")
    found, responses = [], Counter[str]()
    for side in ("train", "valid"):
        reader = IndexedReader(tmp_path / "corpus" / side, examples=True)
        assert reader.prompts is not None
        for number, prompt in enumerate(reader.prompts.tolist()):
            ids = reader.document(number).tolist()
            assert ids[-1] == tokenizer.eod_id
            found.append({"prompt": tokenizer.decode(ids[:prompt]), "response": tokenizer.decode(ids[prompt:-1])})
            responses[side] += len(ids) - prompt
        assert made[side]["tokens"] == reader.tokens
        assert made[side]["bytes"] == sum(len("".join(line.values())) for line in found[-len(reader) :])
    assert sorted(found, key=str) == sorted(LINES, key=str)
    assert made["response_tokens"] == responses["train"]
    assert 5 < made["valid"]["documents"] < 25
    train, valid = build_datasets(DataConfig(path=str(tmp_path / "corpus"), sequence_length=64), 1)
    assert (train.has_examples, train.remarks, len(valid) > 0) == (True, [], True)
    # an older reader, that knows of no prompts, still sees the documents
    assert len(IndexedReader(tmp_path / "corpus/train")) == made["train"]["documents"]


def test_prompts_begin_as_the_tokenizer_says(tmp_path: Path, write_hugging_face: Callable[..., Path]) -> None:
    """With a token that is the prompt's, so that no loss is on it."""
    config = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = write_hugging_face(tmp_path / "model", ["<s>", "</s>"], config)
    make(write(tmp_path / "source.jsonl", LINES), tmp_path / "corpus", tokenizer=str(tokenizer))
    words, reader = load_tokenizer(tmp_path / "corpus"), IndexedReader(tmp_path / "corpus/train", examples=True)
    assert reader.prompts is not None
    prompts = {line["prompt"] for line in LINES}
    for number, prompt in enumerate(reader.prompts.tolist()):
        ids = reader.document(number).tolist()
        assert (ids[0], ids[-1], ids.count(0), ids.count(1)) == (0, 1, 1, 1)
        assert words.decode(ids[1:prompt]) in prompts


def test_answers_to_one_question_are_on_one_side(tmp_path: Path) -> None:
    lines = [{"q": f"Question {i // 3}?", "a": f"answer {i}"} for i in range(60)]
    source = write(tmp_path / "source.jsonl", lines)
    make(source, tmp_path / "corpus", valid_fraction=0.3, prompt_key="q", response_key="a")
    tokenizer, asked = load_tokenizer(tmp_path / "corpus"), []
    for side in ("train", "valid"):
        reader = IndexedReader(tmp_path / "corpus" / side, examples=True)
        assert reader.prompts is not None
        asked.append({tokenizer.decode(reader.document(i)[:p].tolist()) for i, p in enumerate(reader.prompts.tolist())})
    assert asked[0] | asked[1] == {line["q"] for line in lines}
    assert not asked[0] & asked[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"prompt": "a", "completion": "b"}',
            r"no key 'response' \(--response-key\); its keys are 'prompt', 'completi",
        ),
        ('{"text": "a"}', r"no key 'prompt' \(--prompt-key\); its keys are 'text'$"),
        ('{"prompt": "a", "response": null}', r"'response' holds NoneType, not text$"),
        ('{"prompt": ["a"], "response": "b"}', r"'prompt' holds list, not text$"),
        ('["a", "b"]', r"not an object with a 'prompt' and a 'response' but list$"),
        ('{"prompt": "a", "response": ', r"not valid JSON: "),
    ],
)
@pytest.mark.parametrize("trained", [True, False], ids=["given tokenizer", "tokenizer to train"])
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str, trained: bool) -> None:
    source = write(tmp_path / "source.jsonl", LINES)
    make(source, tmp_path / "made")
    source.write_text(source.read_text() + f"\n{line}\n")
    tokenizer = str(tmp_path / "made/tokenizer.model") if trained else None
    with pytest.raises(DataError, match=rf"^{source}:62: {message}"):
        make(source, tmp_path / "corpus", tokenizer=tokenizer)


def test_blank_responses_are_left_out_and_counted(tmp_path: Path) -> None:
    lines = [*LINES, {"prompt": "a", "response": " \n"}, {"prompt": "", "response": "prompts may be blank"}]
    made = make(write(tmp_path / "source.jsonl", lines), tmp_path / "corpus")
    assert made["empty_documents"] == 1
    assert made["train"]["documents"] + made["valid"]["documents"] == 61


def test_what_has_no_prompts_is_refused(tmp_path: Path, write_pair: WritePair) -> None:
    (tmp_path / "plain.txt").write_text("text")
    with pytest.raises(DataError, match=r"source .*/plain\.txt is not \.jsonl or \.ndjson: --instructions takes a pro"):
        make(tmp_path / "plain.txt", tmp_path / "corpus")
    with pytest.raises(DataError, match="--instructions reads prompts and responses, which --stdlib does not have"):
        make(write(tmp_path / "source.jsonl", LINES), tmp_path / "corpus", stdlib=True)
    with pytest.raises(DataError, match=r"pair\.idx: its documents are not of two sequences, a prompt and a response"):
        IndexedReader(write_pair([[[1, 2]], [[3]]]), examples=True)


def test_text_and_examples_blend(tmp_path: Path) -> None:
    """Both corpora's labels in the blend's order; all of plain text, responses of examples."""
    source = write(tmp_path / "source.jsonl", LINES)
    make(source, tmp_path / "examples")
    model = str(tmp_path / "examples/tokenizer.model")
    write(tmp_path / "text.jsonl", [{"text": str(line)} for line in LINES])
    prepare([str(tmp_path / "text.jsonl")], tmp_path / "text", tokenizer=model, workers=1)
    blend = {str(tmp_path / "examples"): 0.5, str(tmp_path / "text"): 0.5}
    train, valid = build_datasets(DataConfig(blend=blend, sequence_length=32), 1)
    assert train.has_examples
    counted = torch.stack([train[i]["labels"] != -100 for i in range(8)]).float().mean(dim=1)
    assert sorted(counted.tolist())[4:] == [1.0] * 4
    assert 0 < sorted(counted.tolist())[0] < sorted(counted.tolist())[3] < 1
    assert len(valid) >= 2
