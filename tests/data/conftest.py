"""Corpora written by hand, byte by byte, so that no test trusts the writer it tests; and a tokenizer.json."""

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}
WritePair = Callable[..., Path]


@pytest.fixture
def write_pair(tmp_path: Path) -> WritePair:
    """`write_pair(documents, name, dtype)` writes documents, each a list of sequences of ids, as Megatron does."""

    def write(documents: Sequence[Sequence[Sequence[int]]], name: str = "pair", dtype: str = "uint16") -> Path:
        prefix = tmp_path / name
        prefix.parent.mkdir(parents=True, exist_ok=True)
        sequences = [sequence for document in documents for sequence in document]
        size = np.dtype(dtype).itemsize
        index = b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, CODES[dtype])
        index += struct.pack("<QQ", len(sequences), len(documents) + 1)
        index += struct.pack(f"<{len(sequences)}i", *(len(s) for s in sequences))
        at = 0
        for sequence in sequences:
            index += struct.pack("<q", at)
            at += len(sequence) * size
        number = 0
        for document in documents:
            index += struct.pack("<q", number)
            number += len(document)
        index += struct.pack("<q", number)
        Path(f"{prefix}.idx").write_bytes(index)
        Path(f"{prefix}.bin").write_bytes(b"".join(np.array(s, dtype).tobytes() for s in sequences))
        return prefix

    return write


@pytest.fixture
def numbered(write_pair: WritePair) -> Callable[..., Path]:
    """`numbered([3, 0, 5])` is a corpus with documents of these lengths whose tokens are 0, 1, 2, ... throughout."""

    def write(lengths: Sequence[int], name: str = "numbered", dtype: str = "int32") -> Path:
        stops = np.cumsum(lengths).tolist()
        return write_pair([[range(b - n, b)] for n, b in zip(lengths, stops, strict=True)], name, dtype)

    return write


@pytest.fixture
def write_hugging_face() -> Callable[..., Path]:
    """`write_hugging_face(folder, special, config)` writes a byte-level BPE of 300 ids, the special tokens first."""

    def write(folder: Path, special: list[str], config: dict[str, object] | None = None) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=special,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator([f"line {i}: {'word ' * (i % 7)}that ends here\n" for i in range(200)], trainer)
        bpe.save(str(folder / "tokenizer.json"))
        if config is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder / "tokenizer.json"

    return write
