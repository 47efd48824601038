"""Training of a lossless sentencepiece tokenizer."""

import io
import re
from collections.abc import Iterable, Iterator

import sentencepiece

from occult_train.data.tokenizer import SPACE_MARK, SentencePieceTokenizer
from occult_train.errors import DataError

UNK_ID, BOS_ID, EOD_ID = 0, 1, 2
"""<unk> is never produced (bytes take its place), <s> is unused in corpora, </s> ends a document."""
SMALLEST_VOCAB = 3 + 256 + 1
"""The special pieces, one piece a byte, and one more."""
SENTENCE = 4000
"""Characters that are given to the trainer at a time, cut after line ends where possible."""


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Train a BPE model from which any text comes back exactly; see SentencePieceTokenizer.

    Text is taken as it is (identity normalisation, spaces neither dropped nor added). Runs of spaces and line ends can
    be pieces, digits stand alone, and characters without a piece are written as bytes. The same texts in the same order
    give the same model.

    Args:
        texts: at least as varied as vocab_size asks for.
        vocab_size: pieces of the model, among them <unk>=0, <s>=1, </s>=2 and the 256 bytes from 3 on.

    Raises:
        DataError: vocab_size is too small, or larger than the texts can fill.
        Exception: whatever `texts` raises.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise DataError(f"--vocab-size {vocab_size} is too small; the least is {SMALLEST_VOCAB}")
    model = io.BytesIO()
    raised: list[Exception] = []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_remember(_sentences(texts), raised),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOD_ID,
            pad_id=-1,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            max_sentence_length=8 * SENTENCE,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise (raised[0] if raised else DataError(_explain(str(error), vocab_size))) from None
    return SentencePieceTokenizer(model.getvalue(), "the trained tokenizer")


def _remember(texts: Iterator[str], raised: list[Exception]) -> Iterator[str]:
    """The texts. What they raise is kept, since sentencepiece makes it a RuntimeError of another text."""
    try:
        yield from texts
    except Exception as error:
        raised.append(error)
        raise


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Runs of whole lines of up to SENTENCE characters. The two characters that the trainer refuses are left out."""
    for text in texts:
        text = text.replace(SPACE_MARK, "").replace("\0", "")
        start = 0
        while start < len(text):
            stop = len(text)
            if stop - start > SENTENCE:
                stop = text.rfind("\n", start, start + SENTENCE) + 1 or start + SENTENCE
            yield text[start:stop]
            start = stop


def _explain(message: str, vocab_size: int) -> str:
    limit = re.search(r"<= (\d+)", message)
    if limit:
        return f"--vocab-size {vocab_size} is more than this text can fill; the most is {limit[1]}"
    if "sentences_.empty()" in message:
        return "there is no text to train a tokenizer on"
    if "required_chars" in message or "Vocabulary size is smaller" in message:
        return f"--vocab-size {vocab_size} is too small for the characters of this text"
    return f"training the tokenizer failed: {' '.join(message.split())}"
