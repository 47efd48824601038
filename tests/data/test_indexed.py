"""The .bin/.idx format against bytes written by hand."""

import contextlib
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from occult_train.data.indexed import IndexedReader, IndexedWriter, token_dtype
from occult_train.errors import DataError

WritePair = Callable[..., Path]
HEADER_BYTES = 9 + 8 + 1 + 8 + 8


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32", "int64"])
def test_reads_what_megatron_writes_with_several_sequences_in_a_document(write_pair: WritePair, dtype: str) -> None:
    prefix = write_pair([[[5, 6], [7]], [[]], [[8, 9, 10]], [], [[11], [12], [13]]], dtype=dtype)
    reader = IndexedReader(prefix)
    assert reader.dtype == np.dtype(dtype)
    assert (len(reader), reader.sequences, reader.tokens) == (5, 7, 9)
    assert [reader.document(d).tolist() for d in range(5)] == [[5, 6, 7], [], [8, 9, 10], [], [11, 12, 13]]
    assert reader.offsets.tolist() == [0, 3, 3, 6, 6, 9]
    assert reader.read(1, 5).tolist() == [6, 7, 8, 9]
    with pytest.raises(IndexError):
        reader.document(5)


def test_a_prefix_may_be_typed_with_its_ending_and_hold_dots(write_pair: WritePair) -> None:
    prefix = write_pair([[[1, 2]]], name="v1.0_text_document")
    for typed in (prefix, f"{prefix}.bin", f"{prefix}.idx"):
        assert IndexedReader(typed).tokens == 2


def test_an_empty_corpus_is_read(write_pair: WritePair) -> None:
    reader = IndexedReader(write_pair([]))
    assert (len(reader), reader.tokens) == (0, 0)


def test_writes_the_bytes_of_the_format(write_pair: WritePair, tmp_path: Path) -> None:
    documents = [[3, 1, 65000], [], [7]]
    by_hand = write_pair([[d] for d in documents])
    with IndexedWriter(tmp_path / "written", np.dtype(np.uint16)) as writer:
        for document in documents:
            writer.add(document)
    for ending in ("bin", "idx"):
        assert Path(f"{tmp_path}/written.{ending}").read_bytes() == Path(f"{by_hand}.{ending}").read_bytes()


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=5), max_size=8),
    cut=st.integers(0, 8),
)
def test_reads_back_what_was_written_one_by_one_or_many(tmp_path: Path, documents: list[list[int]], cut: int) -> None:
    with IndexedWriter(tmp_path / "corpus", token_dtype(100_000)) as writer:
        for document in documents[:cut]:
            writer.add(document)
        rest = documents[cut:]
        flat = np.array([token for document in rest for token in document], np.int64)
        writer.add_many(flat, np.array([len(document) for document in rest], np.int64))
    reader = IndexedReader(tmp_path / "corpus")
    assert [reader.document(d).tolist() for d in range(len(reader))] == documents


def test_ids_are_stored_in_two_bytes_where_they_fit() -> None:
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32


def test_nothing_appears_under_its_name_before_the_end(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "corpus", np.dtype(np.uint16))
    writer.add([1, 2])
    assert not (tmp_path / "corpus.bin").exists()
    writer.close()
    assert list(tmp_path.iterdir()) == []
    with contextlib.suppress(KeyError), IndexedWriter(tmp_path / "corpus", np.dtype(np.uint16)) as writer:
        writer.add([1])
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_the_writer_refuses_ids_that_do_not_fit(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "corpus", np.dtype(np.uint16))
    with pytest.raises(ValueError, match="-1 to 3 do not lie between 0 and 65535"):
        writer.add([3, -1])
    with pytest.raises(ValueError, match="70000"):
        writer.add([70000])
    with pytest.raises(ValueError, match="add up to 3, there are 2"):
        writer.add_many(np.array([1, 2]), np.array([3]))
    writer.close()
    with pytest.raises(ValueError, match="float32"):
        IndexedWriter(tmp_path / "corpus", np.dtype(np.float32))


def _patch(path: Path, at: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(content)] = content
    path.write_bytes(bytes(data))


Damage = Callable[[Path, Path], None]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no bin": (lambda b, i: b.unlink(), r"pair\.bin does not exist"),
    "no idx": (lambda b, i: i.unlink(), r"pair\.idx does not exist"),
    "other file": (lambda b, i: i.write_bytes(b"PK\x03\x04zip"), r"pair\.idx is not a Megatron index"),
    "empty idx": (lambda b, i: i.write_bytes(b""), r"pair\.idx is not a Megatron index"),
    "legacy": (lambda b, i: i.write_bytes(b"TNTIDX\x00\x00" + bytes(30)), "legacy format"),
    "short header": (lambda b, i: i.write_bytes(i.read_bytes()[:20]), "cut off: 20 bytes, the header alone has 34"),
    "version": (lambda b, i: _patch(i, 9, struct.pack("<Q", 2)), "version 2"),
    "dtype 0": (lambda b, i: _patch(i, 17, b"\x00"), "unknown dtype code 0"),
    "dtype 9": (lambda b, i: _patch(i, 17, b"\x09"), "unknown dtype code 9"),
    "dtype 255": (lambda b, i: _patch(i, 17, b"\xff"), "unknown dtype code 255"),
    "floats": (lambda b, i: _patch(i, 17, b"\x07"), "float32, which cannot be token ids"),
    "wrong dtype": (lambda b, i: _patch(i, 17, b"\x04"), "points at byte 6, the sequences before it end at 12"),
    "cut idx": (lambda b, i: i.write_bytes(i.read_bytes()[:-1]), "has 73 bytes; .* need 74"),
    "long idx": (lambda b, i: i.write_bytes(i.read_bytes() + b"\x00"), "has 75 bytes; .* need 74"),
    "absurd count": (lambda b, i: _patch(i, 18, struct.pack("<Q", 2**60)), "has 74 bytes; 1152921504606846976 seq"),
    "cut bin": (lambda b, i: b.write_bytes(b.read_bytes()[:-2]), r"bin has 8 bytes, its index pair\.idx describes 10"),
    "long bin": (lambda b, i: b.write_bytes(b.read_bytes() + b"\x00"), "has 11 bytes, its index .* describes 10"),
    "negative length": (lambda b, i: _patch(i, HEADER_BYTES + 4, struct.pack("<i", -2)), "has the negative length -2"),
    "pointer": (lambda b, i: _patch(i, HEADER_BYTES + 8 + 8, struct.pack("<q", 2)), "sequence 1 points at byte 2"),
    "table start": (lambda b, i: _patch(i, 74 - 16, struct.pack("<q", 1)), "document table does not rise from 0 to 2"),
    "table end": (lambda b, i: _patch(i, 74 - 8, struct.pack("<q", 3)), "document table does not rise from 0 to 2"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(write_pair: WritePair, damage: str) -> None:
    prefix = write_pair([[[1, 2, 3], [4, 5]]])
    harm, message = DAMAGES[damage]
    harm(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"))
    with pytest.raises(DataError, match=message) as caught:
        IndexedReader(prefix)
    assert "\n" not in str(caught.value)


def test_a_falling_document_table_is_named(write_pair: WritePair) -> None:
    prefix = write_pair([[[1]], [[2]], [[3]]])
    index = Path(f"{prefix}.idx")
    _patch(index, len(index.read_bytes()) - 24, struct.pack("<qq", 2, 1))
    with pytest.raises(DataError, match=re.escape(f"{index}: the document table does not rise from 0 to 3")):
        IndexedReader(prefix)
