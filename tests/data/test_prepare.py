"""`occult prepare`: what it writes, that it goes on where it was stopped, and every refusal."""

import errno
import fcntl
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from occult_train.data import parts as parts_module
from occult_train.data.indexed import IndexedReader, IndexedWriter
from occult_train.data.tokenizer import load_tokenizer
from occult_train.errors import DataError
from occult_train.tools.prepare import command, prepare

DOCUMENTS = [f"Document {i} says: {'la ' * (i % 9)}and{chr(10) * (i % 3)} ends.\n" for i in range(120)]
MADE = {"train.bin", "train.idx", "valid.bin", "valid.idx", "tokenizer.model", "corpus.json"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "source.jsonl", DOCUMENTS)


def write_lines(path: Path, documents: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def make(source: Path, output: Path, **options: Any) -> dict[str, Any]:
    return prepare([str(source)], output, **({"vocab_size": 320, "workers": 1, "part_bytes": 1500} | options))


def texts(output: Path, side: str) -> list[str]:
    """The documents of a side, decoded, each checked to end in one end-of-document id."""
    tokenizer = load_tokenizer(output)
    reader = IndexedReader(output / side)
    found = []
    for number in range(len(reader)):
        ids = reader.document(number).tolist()
        assert ids.index(tokenizer.eod_id) == len(ids) - 1
        found.append(tokenizer.decode(ids[:-1]))
    return found


def content(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir()}


def test_every_document_is_on_one_side_and_whole(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "corpus"
    metadata = make(source, output, valid_fraction=0.2)
    assert set(content(output)) == MADE
    train, valid = texts(output, "train"), texts(output, "valid")
    assert sorted(train + valid) == sorted(DOCUMENTS)
    assert 10 < len(valid) < 40
    assert metadata == json.loads((output / "corpus.json").read_text())
    assert [metadata[side]["documents"] for side in ("train", "valid")] == [len(train), len(valid)]
    assert metadata["train"]["bytes"] == sum(len(text.encode()) for text in train)
    assert metadata["valid"]["tokens"] == IndexedReader(output / "valid").tokens
    assert metadata["tokenizer_sha256"] == hashlib.sha256((output / "tokenizer.model").read_bytes()).hexdigest()
    assert (metadata["vocab_size"], metadata["dtype"], metadata["eod_id"]) == (320, "uint16", 2)
    total_bytes = sum(len(text.encode()) for text in DOCUMENTS)
    total_tokens = metadata["train"]["tokens"] + metadata["valid"]["tokens"]
    assert metadata["bytes_per_token"] == pytest.approx(total_bytes / total_tokens)


def test_documents_begin_as_the_tokenizer_says(
    source: Path, tmp_path: Path, write_hugging_face: Callable[..., Path]
) -> None:
    """And another beginning makes another corpus."""
    config = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = write_hugging_face(tmp_path / "model", ["<s>", "</s>"], config)
    make(source, tmp_path / "corpus", tokenizer=str(tokenizer), valid_fraction=0.2)
    words, reader = load_tokenizer(tmp_path / "corpus"), IndexedReader(tmp_path / "corpus/train")
    documents = [reader.document(number).tolist() for number in range(len(reader))]
    assert all((ids[0], ids[-1], ids.count(0), ids.count(1)) == (0, 1, 1, 1) for ids in documents)
    assert {words.decode(ids[1:-1]) for ids in documents} < set(DOCUMENTS)
    (tokenizer.parent / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": False}))
    with pytest.raises(DataError, match="holds a corpus of other text or settings"):
        make(source, tmp_path / "corpus", tokenizer=str(tokenizer), valid_fraction=0.2)


def test_entropies_are_those_of_the_definition(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "corpus"
    entropies = make(source, output, valid_fraction=0.2)["unigram_entropy"]
    sides = {side: IndexedReader(output / side) for side in ("train", "valid")}
    train, valid = (Counter(reader.read(0, reader.tokens).tolist()) for reader in sides.values())
    tokens = sum(train.values())
    own = -sum(n / tokens * math.log(n / tokens) for n in train.values())
    under = -sum(n * math.log((train[i] + 1) / (tokens + 320)) for i, n in valid.items()) / sum(valid.values())
    assert entropies["train"] == pytest.approx(own, rel=1e-12)
    assert entropies["valid_under_train"] == pytest.approx(under, rel=1e-12)


def test_the_split_depends_on_the_texts_alone(source: Path, tmp_path: Path) -> None:
    make(source, tmp_path / "a", valid_fraction=0.2)
    held_out = set(texts(tmp_path / "a", "valid"))
    model = str(tmp_path / "a/tokenizer.model")
    turned = write_lines(tmp_path / "turned.jsonl", [*DOCUMENTS[::-2], "one more", *DOCUMENTS[::2]])
    make(turned, tmp_path / "b", valid_fraction=0.2, tokenizer=model, part_bytes=10**6)
    assert set(texts(tmp_path / "b", "valid")) - {"one more"} == held_out
    fewer = make(source, tmp_path / "c", valid_fraction=0.1, tokenizer=model)
    assert set(texts(tmp_path / "c", "valid")) < held_out
    assert fewer["valid"]["documents"] > 0


@pytest.mark.parametrize("fraction, sides", [(0.0, (2, 1)), (0.999999999, (1, 2))])
def test_either_side_has_a_document(tmp_path: Path, fraction: float, sides: tuple[int, int]) -> None:
    path = write_lines(tmp_path / "few.jsonl", ["some text", "more text", "other text"])
    made = make(path, tmp_path / "corpus", valid_fraction=fraction, vocab_size=270)
    assert (made["train"]["documents"], made["valid"]["documents"]) == sides


def test_workers_and_parts_do_not_change_the_corpus(source: Path, tmp_path: Path) -> None:
    make(source, tmp_path / "one", part_bytes=10**6)
    make(source, tmp_path / "two", workers=2)
    one, two = content(tmp_path / "one"), content(tmp_path / "two")
    assert {name: one[name] == two[name] for name in MADE} == dict.fromkeys(MADE, True)


def test_many_kinds_of_source(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_lines(folder / "sub/a.jsonl", ["first line", "", "second line"])
    (folder / "b.txt").write_bytes(b"a plain caf\xe9\r\ntext\n")
    (folder / "c.md").write_text(" \n")
    (folder / "d.py").write_bytes(b"\0binary")
    made = prepare([str(folder), str(folder / "b.txt")], tmp_path / "out", vocab_size=290, workers=1)
    assert sorted(texts(tmp_path / "out", "train") + texts(tmp_path / "out", "valid")) == [
        "a plain caf�\r\ntext\n",
        "first line",
        "second line",
    ]
    assert (made["empty_documents"], made["binary_files"], made["documents_with_bad_utf8"]) == (2, 1, 1)


def test_a_hugging_face_tokenizer_is_used_and_kept(
    source: Path, tmp_path: Path, write_hugging_face: Callable[..., Path]
) -> None:
    path = write_hugging_face(tmp_path / "hf", ["<end>"])
    with pytest.raises(DataError, match=r"name it \(--eod\)"):
        make(source, tmp_path / "corpus", tokenizer=str(path))
    made = make(source, tmp_path / "corpus", tokenizer=str(path), eod="<end>", workers=2)
    assert made["tokenizer"] == "tokenizer.json"
    assert set(content(tmp_path / "corpus")) == MADE - {"tokenizer.model"} | {"tokenizer.json", "tokenizer_config.json"}
    assert (tmp_path / "corpus/tokenizer.json").read_bytes() == path.read_bytes()
    assert sorted(texts(tmp_path / "corpus", "train") + texts(tmp_path / "corpus", "valid")) == sorted(DOCUMENTS)


# ---------------------------------------------------------------- stopped and run again


def test_finished_parts_are_used_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(source, tmp_path / "whole")
    made: list[str] = []
    original = parts_module.encode_part

    def limited(part: parts_module.Part, settings: parts_module.PartSettings) -> None:
        if len(made) == stop_at:
            raise KeyboardInterrupt
        made.append(part.name)
        original(part, settings)

    monkeypatch.setattr(parts_module, "encode_part", limited)
    stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        make(source, tmp_path / "corpus")
    assert not (tmp_path / "corpus/corpus.json").exists()
    (tmp_path / f"corpus/parts/{made[0]}.npz").unlink()  # as if it had been killed while writing
    stop_at = -1
    make(source, tmp_path / "corpus")
    assert Counter(made)[made[0]] == 2, "the broken part is made again"
    assert set(Counter(made).values()) == {1, 2}
    assert Counter(Counter(made).values())[2] == 1, "no other part is"
    assert content(tmp_path / "corpus") == content(tmp_path / "whole")


def test_killed_and_run_again(source: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle: workers end too, and the next run makes the corpus that was never stopped."""
    make(source, tmp_path / "whole", workers=2)
    output = tmp_path / "corpus"
    code = f"""
import time
from pathlib import Path
from occult_train.data import parts
from occult_train.tools.prepare import prepare
original = parts.IndexedWriter.finish
def slowly(self):
    time.sleep(0.3)
    original(self)
if __name__ == "__mp_main__":
    parts.IndexedWriter.finish = slowly
if __name__ == "__main__":
    prepare([{str(source)!r}], Path({str(output)!r}), vocab_size=320, workers=2, part_bytes=1500)
"""
    (tmp_path / "run.py").write_text(code)
    process = subprocess.Popen([sys.executable, str(tmp_path / "run.py")], start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(output.glob("parts/*.npz")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while alive(process.pid):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)
    finished = {path.name: path.stat().st_mtime_ns for path in output.glob("parts/*.npz")}
    planned = -(-source.stat().st_size // 1500)
    assert 0 < len(finished) < planned
    assert not (output / "corpus.json").exists()
    reused = []
    original = parts_module.encode_part
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_module, "encode_part", lambda part, s: reused.append(part.name) or original(part, s))
        make(source, output)
    assert len(reused) == planned - len(finished)
    assert content(output) == content(tmp_path / "whole")


def alive(group: int) -> list[str]:
    """Processes of a process group that are not zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


def test_the_same_again_is_there_already(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(source, tmp_path / "corpus")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus").iterdir()}
    capsys.readouterr()
    for overwrite in (False, True):
        assert make(source, tmp_path / "corpus", overwrite=overwrite) == first
        assert "corpus is there already: " in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus").iterdir()} == before


@pytest.mark.parametrize("change", ["text", "vocab_size", "valid_fraction", "text_key", "min_bytes", "tokenizer"])
def test_another_corpus_is_replaced_only_when_asked(source: Path, tmp_path: Path, change: str) -> None:
    output = tmp_path / "corpus"
    make(source, output)
    options: dict[str, Any] = {"vocab_size": 300, "valid_fraction": 0.3, "text_key": "text ", "min_bytes": 30}
    options = {change: options[change]} if change in options else {}
    if change == "text":
        write_lines(source, [*DOCUMENTS, "and one more"])
    if change == "text_key":
        source.write_text(source.read_text().replace('"text"', '"text "'))
    if change == "tokenizer":
        make(source, tmp_path / "other", vocab_size=310)
        options["tokenizer"] = str(tmp_path / "other/tokenizer.model")
    before = content(output)
    with pytest.raises(DataError, match=r"/corpus holds a corpus of other text or settings; --overwrite replaces it"):
        make(source, output, **options)
    assert content(output) == before
    make(source, output, overwrite=True, **options)
    make(source, tmp_path / "fresh", **options)
    assert content(output) == content(tmp_path / "fresh")
    assert content(output) != before


def test_a_damaged_corpus_is_not_there_already(source: Path, tmp_path: Path) -> None:
    make(source, tmp_path / "corpus")
    (tmp_path / "corpus/train.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"train\.bin has 0 bytes, .*; remove .*corpus\.json to make the corpus anew"):
        make(source, tmp_path / "corpus")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("documents", [[], ["only one"], ["same", "same"], ["", " ", "only one"]])
def test_fewer_than_two_documents(tmp_path: Path, documents: list[str]) -> None:
    path = write_lines(tmp_path / "few.jsonl", documents)
    model = make(write_lines(tmp_path / "s.jsonl", DOCUMENTS), tmp_path / "made")["tokenizer"]
    with pytest.raises(DataError, match=r"hold \d documents?, and at least 2 different ones are needed"):
        make(path, tmp_path / "corpus", tokenizer=str(tmp_path / "made" / model))
    assert not (tmp_path / "corpus/train.bin.partial").exists()


@pytest.mark.parametrize("workers, trained", [(1, True), (1, False), (2, True)])
def test_a_bad_line_is_named_from_wherever_it_is_met(source: Path, tmp_path: Path, workers: int, trained: bool) -> None:
    make(source, tmp_path / "made")
    source.write_text(source.read_text() + '{"text": 7}\n')
    model = str(tmp_path / "made/tokenizer.model") if trained else None
    with pytest.raises(DataError, match=r"source\.jsonl:121: 'text' holds int, not text"):
        make(source, tmp_path / "corpus", workers=workers, tokenizer=model)


def test_bad_settings(source: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"valid_fraction": 1.0}, "--valid-fraction 1.0 must be at least 0 and less than 1"),
        ({"valid_fraction": -0.1}, "--valid-fraction -0.1"),
        ({"vocab_size": 100}, "--vocab-size 100 is too small"),
        ({"vocab_size": 60_000}, r"--vocab-size 60000 is more than this text can fill; the most is \d+"),
        ({"tokenizer": "nope.model"}, r"tokenizer nope\.model does not exist"),
    ):
        with pytest.raises(DataError, match=message):
            make(source, tmp_path / "corpus", **options)
    with pytest.raises(DataError, match="no source given; name files or folders, or --stdlib"):
        prepare([], tmp_path / "corpus")


def test_a_full_disk_is_one_line(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: IndexedWriter, *_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(IndexedWriter, "add_many", full)
    with pytest.raises(DataError, match=r"^--output=.*/corpus cannot be written: No space left on device$"):
        make(source, tmp_path / "corpus")


def test_an_unwritable_output_is_one_line(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"^--output=.*/file/corpus cannot be written: Not a directory$"):
        make(source, tmp_path / "file/corpus")


def test_two_runs_do_not_write_at_once(source: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    with open(tmp_path / "corpus/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"another occult prepare is writing to .*/corpus"):
            make(source, tmp_path / "corpus")


def test_a_killed_worker_is_one_line(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "encode_part", _die)
    with pytest.raises(DataError, match="a worker was killed, perhaps for memory; run again with fewer --workers"):
        make(source, tmp_path / "corpus", workers=2)


def _die(part: object, settings: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ---------------------------------------------------------------- the command


def test_the_command(source: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command("prepare")(command)
    arguments = [str(source), "--output", str(tmp_path / "corpus"), "--vocab-size", "320", "--workers", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert set(content(tmp_path / "corpus")) == MADE
    assert "trained a tokenizer of 320 pieces" in result.stderr
    assert "120 documents" not in result.stderr
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0
    assert "is there already" in again.stderr
    wrong = CliRunner().invoke(app, [*arguments, "--min-bytes", "9"])
    assert isinstance(wrong.exception, DataError)
    assert CliRunner().invoke(app, [*arguments, "--workers", "0"]).exit_code == 2
