"""Opening corpora, and the datasets that the data settings stand for."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from occult_train.config import DataConfig
from occult_train.data.corpus import check_vocab, open_corpus
from occult_train.data.loader import build_datasets, open_corpora, resolve_vocab
from occult_train.data.sentencepiece_training import train_sentencepiece
from occult_train.data.tokenizer import SentencePieceTokenizer
from occult_train.errors import DataError
from occult_train.tools.prepare import prepare

Numbered = Callable[..., Path]
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return train_sentencepiece([" ".join(WORDS)], 290)


@pytest.fixture
def prepared(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> Callable[..., Path]:
    """`prepared(name, word)` is a prepared folder of 40 documents that say `word`."""

    def make(name: str = "corpus", word: str = "alpha") -> Path:
        lines = (json.dumps({"text": f"{word} {i} " * 20}) for i in range(40))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        model = tokenizer.save(tmp_path)
        source, output = str(tmp_path / f"{name}.jsonl"), tmp_path / name
        prepare([source], output, tokenizer=str(model), valid_fraction=0.3, workers=1)
        return output

    return make


def edit(folder: Path, **changes: object) -> None:
    path = folder / "corpus.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_prepared_folder_opens(prepared: Callable[..., Path], tokenizer: SentencePieceTokenizer) -> None:
    folder = prepared()
    corpus = open_corpus(str(folder))
    assert corpus.tokenizer == folder / "tokenizer.model"
    assert corpus.valid is not None
    assert (len(corpus.train) + len(corpus.valid), corpus.vocab_size) == (40, 290)
    text = tokenizer.decode(corpus.valid.document(0).tolist())
    assert text.startswith("alpha ")
    assert corpus.valid.document(0)[-1] == tokenizer.eod_id
    assert open_corpus(folder, tokenizer=folder).train.tokens == corpus.train.tokens


def test_a_bare_pair_opens(numbered: Numbered, prepared: Callable[..., Path]) -> None:
    prefix = numbered([3, 4])
    for path in (prefix, f"{prefix}.bin", f"{prefix}.idx"):
        corpus = open_corpus(path)
        assert (corpus.train.tokens, corpus.valid, corpus.tokenizer, corpus.vocab_size) == (7, None, None, None)
    folder = prepared()
    given = open_corpus(prefix, tokenizer=folder)
    assert (given.tokenizer, given.vocab_size) == (folder / "tokenizer.model", 290)


def test_what_cannot_be_opened_is_named(
    tmp_path: Path, numbered: Numbered, prepared: Callable[..., Path], tokenizer: SentencePieceTokenizer
) -> None:
    def refused(message: str, path: object, **options: str) -> None:
        with pytest.raises(DataError, match=message) as caught:
            open_corpus(str(path), **options)
        assert "\n" not in str(caught.value)

    folder = prepared()
    (tmp_path / "empty").mkdir()
    refused("data.path is empty; name a folder made by `occult prepare`", "")
    refused(r"data\.path=.*/nowhere does not exist, neither as a folder nor as nowhere\.bin", tmp_path / "nowhere")
    refused(r"=.*/empty has no corpus\.json: not finished or not a corpus; run occult prepare", tmp_path / "empty")
    refused(r"data\.valid_path=.*/empty has no", tmp_path / "empty", setting="data.valid_path")
    prefix = numbered([3])
    refused(r"data\.tokenizer=nope does not exist", prefix, tokenizer="nope")
    refused(r"data\.tokenizer=.*/empty holds no tokenizer", prefix, tokenizer=str(tmp_path / "empty"))
    Path(f"{prefix}.idx").unlink()
    refused(r"numbered\.idx does not exist", prefix)

    other = tmp_path / "other.model"
    other.write_bytes(train_sentencepiece(["something else entirely"], 275).save(tmp_path).read_bytes())
    refused(r"wrong tokenizer for the corpus data\.path=.*other\.model has SHA-256", folder, tokenizer=str(other))
    saved = (folder / "corpus.json").read_text()
    (folder / "corpus.json").write_text("{oops")
    refused(r"corpus\.json cannot be read", folder)
    (folder / "corpus.json").write_text('{"train": {}}')
    refused(r"corpus\.json lacks vocab_size, tokenizer, tokenizer_sha256, valid", folder)
    (folder / "corpus.json").write_text("[]")
    refused(r"corpus\.json lacks", folder)
    (folder / "corpus.json").write_text(saved)
    edit(folder, train={"tokens": 5})
    refused(r"train\.bin has \d+ tokens, corpus\.json beside it says 5", folder)
    (folder / "corpus.json").write_text(saved)
    (folder / "tokenizer.model").write_bytes(other.read_bytes())
    refused("wrong tokenizer for the corpus", folder)
    (folder / "tokenizer.model").unlink()
    refused(r"has lost its tokenizer tokenizer\.model", folder)


def test_vocabularies_must_fit(numbered: Numbered, prepared: Callable[..., Path]) -> None:
    folder = prepared()
    corpus = open_corpus(folder)
    check_vocab(corpus, 290)
    with pytest.raises(DataError, match=r"model\.vocab_size=289 is smaller than the 290 ids of the tokenizer of "):
        check_vocab(corpus, 289)
    check_vocab(open_corpus(numbered([3])), 1)


def test_the_vocabulary_is_resolved(numbered: Numbered, prepared: Callable[..., Path]) -> None:
    folder, pair = str(prepared()), str(numbered([3]))
    assert resolve_vocab(DataConfig(path=folder), 0) == 320
    assert resolve_vocab(DataConfig(path=folder), 1000) == 1000
    assert resolve_vocab(DataConfig(path=pair, tokenizer=folder), 0) == 320
    assert resolve_vocab(DataConfig(path=pair), 77) == 77
    with pytest.raises(DataError, match=r"numbered comes without a tokenizer; set data\.tokenizer or model"):
        resolve_vocab(DataConfig(path=pair), 0)
    with pytest.raises(DataError, match=r"model\.vocab_size=100 is smaller"):
        resolve_vocab(DataConfig(path=folder), 100)


def test_datasets_of_a_folder(prepared: Callable[..., Path]) -> None:
    train, valid = build_datasets(DataConfig(path=str(prepared()), sequence_length=16, mask_documents=True), 1)
    assert train[10**6]["input_ids"].shape == (16,)
    assert train[0].keys() == valid[0].keys() == {"input_ids", "labels", "document_ids"}
    assert len(valid) == sum(1 for _ in valid)
    assert len(valid) > 5


def test_held_out_text_can_be_elsewhere(numbered: Numbered, prepared: Callable[..., Path]) -> None:
    pair, other, folder = str(numbered([30])), str(numbered([20], "other")), str(prepared())
    train, valid = build_datasets(DataConfig(path=pair, sequence_length=4), 1)
    assert len(valid) == 0
    train, valid = build_datasets(DataConfig(path=pair, valid_path=other, sequence_length=4), 1)
    assert [sample["input_ids"][0].item() for sample in valid] == [0, 4, 8, 12]
    assert train[0]["input_ids"].max() < 30
    own = build_datasets(DataConfig(path=folder, sequence_length=4), 1)[1]
    assert len(build_datasets(DataConfig(path=pair, valid_path=folder, sequence_length=4), 1)[1]) == len(own)


def test_a_blend_takes_turns_by_weight_and_in_held_out_text(
    prepared: Callable[..., Path], tokenizer: SentencePieceTokenizer
) -> None:
    one, two = str(prepared("one", "alpha")), str(prepared("two", "kappa"))
    blend = {two: 3.0, one: 1.0}
    train, valid = build_datasets(DataConfig(blend=blend, sequence_length=16), 1)
    again, _ = build_datasets(DataConfig(blend=dict(reversed(blend.items())), sequence_length=16), 1)

    def words(dataset: object, count: int) -> list[str]:
        texts = [tokenizer.decode(dataset[i]["input_ids"].tolist()) for i in range(count)]  # type: ignore[index]
        assert not any("alpha" in text and "kappa" in text for text in texts)
        return ["alpha" if "alpha" in text else "kappa" for text in texts]

    assert words(train, 100).count("kappa") == 75
    assert words(train, 100) == words(again, 100)
    assert words(valid, 6) == ["alpha", "kappa"] * 3


def test_bad_datasets_are_named(
    tmp_path: Path, numbered: Numbered, prepared: Callable[..., Path], tokenizer: SentencePieceTokenizer
) -> None:
    folder, pair = str(prepared()), str(numbered([300]))
    with pytest.raises(DataError, match=r"data\.path is empty"):
        build_datasets(DataConfig(), 1)
    with pytest.raises(DataError, match=r"data\.blend has the weight 0"):
        build_datasets(DataConfig(blend={folder: 0.0}, sequence_length=4), 1)
    with pytest.raises(DataError, match=r"data\.blend=.*nowhere does not exist"):
        build_datasets(DataConfig(blend={str(tmp_path / "nowhere"): 1.0}), 1)
    with pytest.raises(DataError, match=r"train\.bin has \d+ tokens, fewer than the 100001 of one sample"):
        build_datasets(DataConfig(path=folder, sequence_length=100_000), 1)
    short = str(numbered([10], "short"))
    with pytest.raises(DataError, match=r"held-out text: .*short\.bin has 10 tokens, .*--valid-fraction\), or set"):
        build_datasets(DataConfig(path=pair, valid_path=short, sequence_length=20), 1)
    with pytest.raises(
        DataError, match=r"model\.vocab_size=280 is smaller than the 290 ids of the tokenizer of .*/corpus"
    ):
        build_datasets(DataConfig(path=pair, valid_path=folder, sequence_length=4), 1, vocab_size=280)
    train, _ = build_datasets(DataConfig(path=pair, sequence_length=20), 1, vocab_size=50)
    with pytest.raises(DataError, match=r"numbered\.bin holds the token id \d+, beyond model\.vocab_size=50"):
        [train[i] for i in range(14)]
    with pytest.raises(DataError, match=r"model\.vocab_size=50 is smaller than the 290 ids"):
        build_datasets(DataConfig(path=folder, sequence_length=4), 1, vocab_size=50)

    other_tokenizer = train_sentencepiece(["something else entirely"], 275)
    (tmp_path / "another").mkdir()
    model = other_tokenizer.save(tmp_path / "another")
    prepare([str(tmp_path / "corpus.jsonl")], tmp_path / "made", tokenizer=str(model), workers=1)
    with pytest.raises(DataError, match=r"data\.blend=.*/corpus and data\.blend=.*/made were made with diff"):
        open_corpora(DataConfig(blend={folder: 1.0, str(tmp_path / "made"): 1.0}))
    with pytest.raises(DataError, match=r"data\.path=.*/corpus and data\.valid_path=.*/made were made with diff"):
        build_datasets(DataConfig(path=folder, valid_path=str(tmp_path / "made"), sequence_length=4), 1)
