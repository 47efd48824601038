"""Tokenizers: sentencepiece models, and the `tokenizer.json` of Hugging Face's tokenizers library."""

import hashlib
import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from occult_train.errors import DataError

SPACE_MARK = "\u2581"
"""What sentencepiece writes for a space, and so cannot tell from one."""
SEGMENT = 1 << 16
"""Characters given to sentencepiece at a time: its memory grows with the text, at some hundred bytes a character."""
CONFIG = "tokenizer_config.json"
USUAL_EODS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")


class Tokenizer(Protocol):
    """Text to token ids and back."""

    vocab_size: int
    """Ids are 0 to vocab_size - 1."""
    eod_id: int
    """The id that ends a document in a corpus."""
    begin: tuple[int, ...]
    """Ids that a model of this tokenizer expects before a text: a token for its beginning (BOS), or none."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, special tokens neither added nor read from it: "</s>" in the text is four characters."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""

    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's file, in hex. A corpus remembers it."""

    def save(self, folder: Path) -> Path:
        """Write the tokenizer into an existing folder under its usual name, and return the file's path."""


class SentencePieceTokenizer:
    """A sentencepiece model.

    With a model trained by `train_sentencepiece`, `decode(encode(text)) == text` for any text of Unicode scalar values
    (a str without lone surrogates). U+2581, sentencepiece's own mark for a space, is written as its three UTF-8 bytes,
    and NUL as one byte, for both of which byte fallback has pieces. Models that normalise text, or add a space before
    it, do so here too.

    The end of a document is `eod` if given, else the eos_token of a tokenizer_config.json beside the model if that is
    one of its pieces, else the model's own end-of-sequence piece. A text begins with a token of its own only if that
    tokenizer_config.json says so (add_bos_token).

    Raises:
        DataError: the bytes are no model, or it has no end-of-sequence piece and `eod` names none.
    """

    def __init__(self, model: bytes, path: str | Path, eod: str | None = None) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError):
            raise DataError(f"{path} is not a sentencepiece model") from None
        self._bytes = model
        self.vocab_size: int = self._model.vocab_size()
        self._eod = eod or self._usual_eod(Path(path))
        self.eod_id: int = self._model.eos_id() if self._eod is None else self._find(self._eod, path)
        if self.eod_id < 0:
            raise DataError(f"{path} has no end-of-sequence piece; name the piece that ends documents (--eod)")
        self._bos = _declared_bos(_read_config(Path(path).with_name(CONFIG)))
        self.begin: tuple[int, ...] = (self._find(self._bos, path),) if self._bos else ()
        mark = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        exact = all(map(self._model.is_byte, mark)) and self._model.normalize("a  ") == f"a{2 * SPACE_MARK}"
        self._mark: list[int] | None = mark if exact else None

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Segments of a very long text are encoded apart, cut after line ends where there are any."""
        ids: list[int] = []
        for segment in _segments(text):
            if self._mark is None or SPACE_MARK not in segment:
                ids += self._model.encode(segment)
                continue
            for number, between in enumerate(segment.split(SPACE_MARK)):
                ids += (self._mark if number else []) + self._model.encode(between)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control pieces such as </s> are left out."""
        return self._model.decode([int(i) for i in ids])

    def fingerprint(self) -> str:
        """SHA-256 of the model file."""
        return hashlib.sha256(self._bytes).hexdigest()

    def save(self, folder: Path) -> Path:
        """Write `tokenizer.model`, and `tokenizer_config.json` with what of begin and end is not the model's own."""
        config: dict[str, Any] = {}
        if self._eod is not None and self.eod_id != self._model.eos_id():
            config["eos_token"] = self._eod
        if self._bos:
            config |= {"add_bos_token": True, "bos_token": self._bos}
        if config:
            _replace(folder / CONFIG, json.dumps(config, ensure_ascii=False).encode())
        path = folder / "tokenizer.model"
        _replace(path, self._bytes)
        return path

    def transformers_config(self) -> dict[str, Any] | None:
        """The tokenizer_config.json with which transformers gives the same ids, but for U+2581, which it takes for a
        space, and names of special tokens, which it reads as those. None for a model that normalises.

        Without one it guesses another class, which drops spaces and line ends.
        """
        if self._mark is None:
            return None
        return {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
            "add_prefix_space": False,
            "add_bos_token": bool(self._bos),
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "unk_token": self._model.id_to_piece(self._model.unk_id()),
            "bos_token": self._bos,
            "eos_token": self._model.id_to_piece(self.eod_id),
        }

    def _usual_eod(self, path: Path) -> str | None:
        named = _token(_read_config(path.with_name(CONFIG)), "eos_token")
        return named if named and self._has(named) else None

    def _has(self, piece: str) -> bool:
        return self._model.id_to_piece(self._model.piece_to_id(piece)) == piece

    def _find(self, piece: str, path: str | Path) -> int:
        if not self._has(piece):
            raise DataError(f"{path} has no piece {piece!r}")
        return self._model.piece_to_id(piece)


class HuggingFaceTokenizer:
    """A `tokenizer.json`. What round-trips is up to its own normaliser and decoder.

    The end of a document is `eod` if given, else the eos_token of the tokenizer_config.json beside it, else the first
    of <|endoftext|>, </s>, <eos> and <|end_of_text|> that is a special token of it. What a text begins with is the
    bos_token if that file says add_bos_token (DeepSeek's does, its tokenizer.json does not), nothing if
    it says the contrary, else what the tokenizer.json itself puts there (Mixtral's, Llama's).

    Raises:
        DataError: the file is no tokenizer, or nothing says which token ends a document.
    """

    def __init__(self, path: Path, eod: str | None = None) -> None:
        self._bytes = _read(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(self._bytes)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path} is not a tokenizer.json: {' '.join(str(error).split())}") from None
        self._tokenizer.encode_special_tokens = True  # read "<|endoftext|>" within a text as text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._config_path = path.with_name(CONFIG)
        self._config = _read_config(self._config_path)
        self._eod = eod or self._usual_eod(path)
        found = self._tokenizer.token_to_id(self._eod)
        if found is None:
            raise DataError(f"{path} has no token {self._eod!r}, which is to end documents")
        self.eod_id: int = found
        self.begin: tuple[int, ...] = self._beginning(path)

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def fingerprint(self) -> str:
        """SHA-256 of tokenizer.json."""
        return hashlib.sha256(self._bytes).hexdigest()

    def save(self, folder: Path) -> Path:
        """Write `tokenizer.json`, and `tokenizer_config.json` with the end-of-document token as eos_token."""
        config = {**self._config, "eos_token": self._eod}
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        _replace(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False).encode())
        path = folder / "tokenizer.json"
        _replace(path, self._bytes)
        return path

    def _beginning(self, path: Path) -> tuple[int, ...]:
        if not isinstance(self._config.get("add_bos_token"), bool):
            whole = self._tokenizer.encode("a", add_special_tokens=True)
            special = takewhile(lambda pair: pair[1], zip(whole.ids, whole.special_tokens_mask, strict=True))
            return tuple(token for token, _ in special)
        bos = _declared_bos(self._config)
        found = None if bos is None else self._tokenizer.token_to_id(bos)
        if bos is not None and found is None:
            raise DataError(f"{path} has no token {bos!r}, with which {self._config_path.name} lets texts begin")
        return () if found is None else (found,)

    def _usual_eod(self, path: Path) -> str:
        named = _token(self._config, "eos_token")
        if named:
            return named
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        for token in USUAL_EODS:
            if token in special:
                return token
        raise DataError(
            f"{path}: neither {self._config_path.name} beside it nor a token named {', '.join(USUAL_EODS)} says which "
            "token ends a document; name it (--eod)"
        )


def load_tokenizer(path: str | Path, eod: str | None = None) -> Tokenizer:
    """Read a tokenizer from a `.model` or `.json` file, or from a corpus or Hugging Face folder that holds one.

    Args:
        path: the file or folder; in a folder, tokenizer.json comes before tokenizer.model.
        eod: the token that ends a document, where the files do not say it; a corpus folder remembers it.

    Raises:
        DataError: there is no tokenizer, it cannot be read, or its end-of-document token is unknown.
    """
    path = Path(path)
    if path.is_dir():
        found = find_tokenizer(path)
        if found is None:
            raise DataError(f"tokenizer folder {path} holds neither tokenizer.json nor tokenizer.model")
        eod = eod or _read_config(path / "corpus.json").get("eod")
        path = found
    if not path.is_file():
        raise DataError(f"tokenizer {path} does not exist")
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, eod)
    return SentencePieceTokenizer(_read(path), path, eod)


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer file of a folder, if it has one."""
    return next((p for p in (folder / "tokenizer.json", folder / "tokenizer.model") if p.is_file()), None)


def _segments(text: str) -> list[str]:
    """The text cut in runs of at most SEGMENT characters, after a line end where the run has one."""
    segments, start = [], 0
    while len(text) - start > SEGMENT:
        stop = text.rfind("\n", start, start + SEGMENT) + 1 or start + SEGMENT
        segments.append(text[start:stop])
        start = stop
    return [*segments, text[start:]]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"tokenizer {path} cannot be read: {error.strerror}") from None


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(_read(path))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    return config if isinstance(config, dict) else {}


def _declared_bos(config: dict[str, Any]) -> str | None:
    """The bos_token of a tokenizer_config.json that says that texts begin with it."""
    return _token(config, "bos_token") if config.get("add_bos_token") is True else None


def _token(config: dict[str, Any], name: str) -> str | None:
    """A token that a tokenizer_config.json names, by a text or an object that holds it."""
    named = config.get(name)
    if isinstance(named, dict):
        named = named.get("content")
    return named if isinstance(named, str) else None


def _replace(path: Path, content: bytes) -> None:
    partial = Path(f"{path}.partial")
    partial.write_bytes(content)
    partial.replace(path)
