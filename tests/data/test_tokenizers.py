"""Tokenizers: exact round trips, ends of documents, and every refusal."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from occult_train.data import tokenizer as module
from occult_train.data.sentencepiece_training import train_sentencepiece
from occult_train.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer
from occult_train.errors import DataError

WriteHuggingFace = Callable[..., Path]
TEXT = [
    "def first(values):\n    if not values:\n        return None\n\treturn values[0]  # tab\r\n",
    "\n\nThe naïve façade — 漢字 and 😀 — cost 1234 €.\n\n\n" * 3,
    *(f"line {i}: {'word ' * (i % 7)}end\n" for i in range(200)),
]
AWKWARD = [
    "",
    " ",
    "   leading, and  runs   of spaces   ",
    "\n",
    "\t\t\n \r\n\x0b\x0c",
    "\x00",
    "a\x00\x00b",
    "▁",
    "▁▁ ▁ a▁",
    " ▁\n▁ ",
    "<s></s><unk><0x0A>",
    "\ufeffBOM",
    "\ufffd ⁇ \u2047",
    "e\u0301 é \u212b",
    "\u2028\u2029\u0085\u00a0\u3000\u200b",
    "😀👩‍👩‍👧🏽",
    "".join(map(chr, range(0x180))),
    "\U0010ffff\ue000",
]


@pytest.fixture(scope="module")
def trained() -> SentencePieceTokenizer:
    return train_sentencepiece(TEXT, 420)


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_comes_back(trained: SentencePieceTokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert all(0 <= i < trained.vocab_size for i in ids)
    assert trained.eod_id not in ids


alphabet = st.one_of(
    st.characters(exclude_categories=["Cs"]),
    st.sampled_from(" \t\n\r\0▁<s>/0x1a\u00a0\ufffd\ufeff"),
    st.sampled_from(["def ", "    ", "\n\n", "word", "</s>", "<0x41>", "▁▁"]),
)


@settings(max_examples=400, deadline=None)
@given(pieces=st.lists(alphabet, max_size=40))
def test_any_text_comes_back(trained: SentencePieceTokenizer, pieces: list[str]) -> None:
    text = "".join(pieces)
    assert trained.decode(trained.encode(text)) == text


def test_training_gives_the_stated_pieces(trained: SentencePieceTokenizer, tmp_path: Path) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(trained.save(tmp_path)))
    assert [model.id_to_piece(i) for i in (0, 1, 2, 3, 258)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert (trained.eod_id, trained.vocab_size) == (2, 420)
    pieces = [model.id_to_piece(i) for i in range(259, 420)]
    assert any(set(piece) == {"▁"} and len(piece) > 1 for piece in pieces), "runs of spaces are pieces"
    assert any("\n" in piece for piece in pieces), "line ends are pieces"
    assert not any(len(piece) > 1 and any(c.isdigit() for c in piece) for piece in pieces), "digits stand alone"


def test_training_is_deterministic_and_shows_nothing(
    trained: SentencePieceTokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train_sentencepiece(iter(TEXT), 420).fingerprint() == trained.fingerprint()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "texts, vocab_size, message",
    [
        (TEXT, 259, "--vocab-size 259 is too small; the least is 260"),
        (["aaa bbb"], 5000, r"--vocab-size 5000 is more than this text can fill; the most is \d+$"),
        (["".join(map(chr, range(0x4E00, 0x5000)))], 400, "--vocab-size 400 is too small for the characters"),
        ([], 400, "no text to train"),
        (["", "\0", "▁"], 400, "no text to train"),
    ],
)
def test_impossible_training(texts: list[str], vocab_size: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_sentencepiece(texts, vocab_size)


def test_what_the_texts_raise_comes_through(tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        yield TEXT[0]
        raise DataError("line 7 is bad")

    with pytest.raises(DataError, match=r"^line 7 is bad$"):
        train_sentencepiece(texts(), 270)


def test_a_long_text_is_encoded_in_segments_and_comes_back(
    trained: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SEGMENT", 50)
    text = "x" * 120 + "\n" + "▁ short\n" * 30 + "y" * 99
    assert max(map(len, module._segments(text))) <= 50
    assert "".join(module._segments(text)) == text
    assert trained.decode(trained.encode(text)) == text


def test_save_and_load_keep_everything(trained: SentencePieceTokenizer, tmp_path: Path) -> None:
    path = trained.save(tmp_path)
    assert path == tmp_path / "tokenizer.model"
    assert list(tmp_path.iterdir()) == [path]
    for source in (path, str(path), tmp_path):
        loaded = load_tokenizer(source)
        assert isinstance(loaded, SentencePieceTokenizer)
        assert loaded.encode(TEXT[0]) == trained.encode(TEXT[0])
        assert loaded.fingerprint() == trained.fingerprint() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_tokenizer(path, eod="<s>").eod_id == 1
    with pytest.raises(DataError, match=r"tokenizer\.model has no piece '<nope>'"):
        load_tokenizer(path, eod="<nope>")


def test_a_model_that_normalises_is_used_as_it_is(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_prefix=str(tmp_path / "foreign"), vocab_size=420, model_type="bpe",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "foreign.model"))
    loaded = load_tokenizer(tmp_path / "foreign.model")
    assert loaded.encode("a ▁ b") == model.encode("a ▁ b")


def test_a_model_without_an_end_of_sequence_needs_one_named(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_prefix=str(tmp_path / "endless"), vocab_size=420, model_type="bpe",
        byte_fallback=True, eos_id=-1, user_defined_symbols=["<end>"], minloglevel=2,
    )  # fmt: skip
    with pytest.raises(DataError, match="no end-of-sequence piece"):
        load_tokenizer(tmp_path / "endless.model")
    named = load_tokenizer(tmp_path / "endless.model", eod="<end>")
    assert named.eod_id > 1
    (tmp_path / "to").mkdir()
    assert load_tokenizer(named.save(tmp_path / "to")).eod_id == named.eod_id, "saved, it need not be named again"


def test_a_piece_of_the_model_that_is_named_beside_it_ends_documents(
    trained: SentencePieceTokenizer, tmp_path: Path
) -> None:
    path = trained.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.model"]
    for eos, expected in (({"content": "<s>"}, 1), ("<|im_end|>", 2), (None, 2)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        assert load_tokenizer(path).eod_id == expected


# ---------------------------------------------------------------- Hugging Face


@pytest.mark.parametrize(
    "special, config, eod",
    [
        (["<pad>", "<|endoftext|>"], None, "<|endoftext|>"),
        (["</s>"], {}, "</s>"),
        (["<x>", "<|endoftext|>"], {"eos_token": "<x>"}, "<x>"),
        (["<x>", "<|endoftext|>"], {"eos_token": {"content": "<x>", "lstrip": False}}, "<x>"),
        (["<|endoftext|>"], {"eos_token": None}, "<|endoftext|>"),
    ],
)
def test_the_end_of_a_document_is_found(
    tmp_path: Path, write_hugging_face: WriteHuggingFace, special: list[str], config: dict[str, object] | None, eod: str
) -> None:
    path = write_hugging_face(tmp_path, special, config)
    loaded = load_tokenizer(path)
    assert loaded.eod_id == special.index(eod)
    assert load_tokenizer(tmp_path, eod=special[0]).eod_id == 0


MIXTRAL = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
DEEPSEEK = {"add_bos_token": True, "bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}


@pytest.mark.parametrize(
    "config, template, begin",
    [
        (MIXTRAL, "<s> $A", (1,)),
        ({"eos_token": "</s>"}, "<s> $A", (1,)),  # Llama 3: the file alone says so
        (DEEPSEEK, None, (1,)),
        ({"add_bos_token": False, "bos_token": None, "eos_token": "</s>"}, None, ()),  # OLMoE, Qwen
        ({"add_bos_token": False, "bos_token": "<s>", "eos_token": "</s>"}, "<s> $A", ()),
        ({"eos_token": "</s>"}, "$A </s>", ()),
        ({"eos_token": "</s>"}, "<s> <pad> $A </s>", (1, 0)),
    ],
)
def test_texts_begin_as_the_family_s_do(
    config: dict[str, object],
    template: str | None,
    begin: tuple[int, ...],
    tmp_path: Path,
    write_hugging_face: WriteHuggingFace,
) -> None:
    path = write_hugging_face(tmp_path, ["<pad>", "<s>", "</s>"], config)
    if template is not None:
        made = tokenizers.Tokenizer.from_file(str(path))
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[("<pad>", 0), ("<s>", 1), ("</s>", 2)]
        )
        made.save(str(path))
    loaded = load_tokenizer(tmp_path)
    assert loaded.begin == begin
    assert not set(loaded.encode("word")) & {0, 1, 2}, "begin comes apart from the text"
    (tmp_path / "to").mkdir()
    loaded.save(tmp_path / "to")
    assert load_tokenizer(tmp_path / "to").begin == begin
    if template == "<s> $A" and begin:
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        assert theirs("two words")["input_ids"] == [*begin, *loaded.encode("two words")]


def test_a_begin_that_is_no_token_is_refused(tmp_path: Path, write_hugging_face: WriteHuggingFace) -> None:
    path = write_hugging_face(tmp_path, ["</s>"], MIXTRAL)
    with pytest.raises(DataError, match=r"has no token '<s>', with which tokenizer_config.json lets texts begin"):
        load_tokenizer(path)


def test_texts_of_sentencepiece_models_begin_as_the_file_beside_them_says(
    trained: SentencePieceTokenizer, tmp_path: Path
) -> None:
    assert trained.begin == ()
    path = trained.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(MIXTRAL))
    loaded = load_tokenizer(path)
    assert (loaded.begin, loaded.encode("word")) == ((1,), trained.encode("word"))
    (tmp_path / "to").mkdir()
    assert load_tokenizer(loaded.save(tmp_path / "to")).begin == (1,)


def test_special_tokens_within_a_text_are_text(tmp_path: Path, write_hugging_face: WriteHuggingFace) -> None:
    loaded = load_tokenizer(write_hugging_face(tmp_path, ["<|endoftext|>"]))
    for text in (*AWKWARD, "stop <|endoftext|> here"):
        ids = loaded.encode(text)
        assert loaded.eod_id not in ids
        assert loaded.decode(ids) == text
    assert loaded.decode([loaded.eod_id]) == "<|endoftext|>"
    assert loaded.vocab_size == 300


def test_a_saved_hugging_face_tokenizer_is_whole(tmp_path: Path, write_hugging_face: WriteHuggingFace) -> None:
    path = write_hugging_face(tmp_path / "from", ["<x>"], {"model_max_length": 77})
    loaded = load_tokenizer(path, eod="<x>")
    (tmp_path / "to").mkdir()
    assert loaded.save(tmp_path / "to").read_bytes() == path.read_bytes()
    again = load_tokenizer(tmp_path / "to")
    assert isinstance(again, HuggingFaceTokenizer)
    assert (again.eod_id, again.fingerprint()) == (loaded.eod_id, loaded.fingerprint())
    assert json.loads((tmp_path / "to/tokenizer_config.json").read_text())["model_max_length"] == 77


def test_refusals_name_the_file(tmp_path: Path, write_hugging_face: WriteHuggingFace) -> None:
    nameless = write_hugging_face(tmp_path / "nameless", ["<x>"])
    with pytest.raises(DataError, match=r"tokenizer\.json: neither tokenizer_config\.json .* name it \(--eod\)"):
        load_tokenizer(nameless)
    with pytest.raises(DataError, match=r"has no token '<y>', which is to end documents"):
        load_tokenizer(nameless, eod="<y>")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad\.json is not a tokenizer\.json"):
        load_tokenizer(tmp_path / "bad.json")
    (tmp_path / "bad.model").write_bytes(b"\xff\x00not a model")
    with pytest.raises(DataError, match=r"bad\.model is not a sentencepiece model"):
        load_tokenizer(tmp_path / "bad.model")
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(tmp_path / "none.model")
    with pytest.raises(DataError, match=r"holds neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)
    (nameless.parent / "tokenizer_config.json").write_text("{oops")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not valid JSON"):
        load_tokenizer(nameless)
