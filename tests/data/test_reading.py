"""Files to documents: what is found, how files are cut, what is mended and refused."""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from occult_train.data import reading
from occult_train.data.reading import Key, ReadCounts, documents, sample_texts, spans
from occult_train.data.sources import SourceFile, find_files, stdlib_files
from occult_train.errors import DataError

TEXT = (Key("text", "--text-key"),)


def source(path: Path) -> SourceFile:
    return SourceFile(str(path), path.stat().st_size, 0)


def read(path: Path, size: int = 1 << 20, key: str = "text", min_bytes: int = 1) -> tuple[list[str], ReadCounts]:
    counts = ReadCounts()
    cut = spans([source(path)], size)
    return [text for span in cut for text in documents(span, key, counts, min_bytes)], counts


def names(*sources: Path, **options: object) -> list[str]:
    return [Path(f.path).name for f in find_files([str(s) for s in sources], **options).files]  # type: ignore[arg-type]


def test_folders_are_searched_for_text(tmp_path: Path) -> None:
    for name in ("b.txt", "a.MD", "sub/c.py", "sub/d.jsonl", "e.bin", "f.json", ".hidden.txt", ".git/g.txt",
                 "__pycache__/h.py", "node_modules/i.js", "out/j.txt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "nul.txt").write_bytes(b"a\0b")
    found = find_files([str(tmp_path), str(tmp_path / "e.bin"), str(tmp_path / "b.txt")], without=tmp_path / "out")
    assert [Path(f.path).name for f in found.files] == ["a.MD", "b.txt", "e.bin", "c.py", "d.jsonl"]
    assert found.binary == 1
    assert found.files[0].size == 4


def test_bad_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"source .*/nothing does not exist"):
        find_files([str(tmp_path / "nothing")])
    with pytest.raises(DataError, match="holds no text file"):
        find_files([str(tmp_path)])
    (tmp_path / "model.pt").write_bytes(b"PK\0\0")
    with pytest.raises(DataError, match=r"model\.pt is not a text file"):
        find_files([str(tmp_path / "model.pt")])
    (tmp_path / "named.txt").write_bytes(b"PK\0\0")
    with pytest.raises(DataError, match=r"source folder .* holds no text: its 1 files are binary"):
        find_files([str(tmp_path)])


def test_the_standard_library_is_enough_text_and_not_its_tests(tmp_path: Path) -> None:
    files = find_files([], stdlib=True).files
    assert sum(f.size for f in files) > 8e6
    assert not [f.path for f in files if {"test", "tests", "site-packages"} & set(Path(f.path).parts)]
    for name in (
        "a.py",
        "pkg/b.py",
        "test/c.py",
        "dist-packages/d.py",
        "__pycache__/e.py",
        "lib2to3/tests/f.py",
        "g.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("pass")
    assert [p.name for p in stdlib_files(tmp_path)] == ["a.py", "b.py"]
    with pytest.raises(DataError, match="no Python source"):
        stdlib_files(tmp_path / "nowhere")


@pytest.mark.skipif(not os.path.exists("/usr/lib/python3.11/ast.py"), reason="no Debian Python 3.11")
def test_debian_has_enough_text_too() -> None:
    assert sum(p.stat().st_size for p in stdlib_files(Path("/usr/lib/python3.11"))) > 8e6


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(min_size=1).filter(lambda t: not t.isspace()), max_size=8), size=st.integers(3, 60))
def test_json_lines_cut_anywhere_give_each_document_once(tmp_path: Path, texts: list[str], size: int) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}, ensure_ascii=len(t) % 2 == 0) for t in texts), newline="\n")
    assert read(path, size) == (texts, ReadCounts())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="ab\n é\r", max_size=60), size=st.integers(1, 20))
def test_plain_text_cut_anywhere_is_whole(tmp_path: Path, text: str, size: int) -> None:
    path = tmp_path / "d.txt"
    path.write_bytes(text.encode())
    got, counts = read(path, size)
    assert counts.bad_utf8 == 0
    assert "".join("".join(got).split()) == "".join(text.split())
    assert all(piece in text for piece in got)
    if len(text.encode()) <= size:
        assert got == ([text] if text.strip() else [])


def test_empty_and_short_documents_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": ""}\n\n{"text": " \\n"}\n{"text": "four"}\n{"text": "fives"}\n')
    assert read(path) == (["four", "fives"], ReadCounts(empty=2))
    assert read(path, min_bytes=5) == (["fives"], ReadCounts(empty=3))
    (tmp_path / "e.txt").write_bytes(b"")
    assert read(tmp_path / "e.txt") == ([], ReadCounts(empty=1))


def test_bad_utf8_is_mended_and_counted(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_bytes(b"caf\xe9 \xff\n")
    assert read(tmp_path / "d.txt") == (["caf� �\n"], ReadCounts(bad_utf8=1))
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": "\\ud800 lone"}\n{"text": "\\ud83d\\ude00"}\n')
    assert read(tmp_path / "d.jsonl") == (["caf�", "� lone", "😀"], ReadCounts(bad_utf8=2))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbftext")
    (tmp_path / "d.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "line"}\r\n')
    assert read(tmp_path / "d.txt")[0] == ["text"]
    assert read(tmp_path / "d.jsonl")[0] == ["line"]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{oops", "not valid JSON: Expecting property name"),
        ("[" * 100_000, "not valid JSON"),
        ('["text"]', "not an object with a 'text' but list"),
        ('{"body": "x", "id": 3}', r"no key 'text' \(--text-key\); its keys are 'body', 'id'"),
        ("{}", r"no key 'text' \(--text-key\); its keys are none"),
        ('{"text": 7}', "'text' holds int, not text"),
        ('{"text": null}', "'text' holds NoneType, not text"),
    ],
)
@pytest.mark.parametrize("size", [1 << 20, 10])
def test_a_bad_json_line_is_named_by_file_and_line(tmp_path: Path, line: str, message: str, size: int) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n' + line + '\n{"text": "c"}\n')
    with pytest.raises(DataError, match=r"d\.jsonl:4: " + message):
        read(path, size)


def test_other_keys_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"body": "x"}\n')
    assert read(tmp_path / "d.jsonl", key="body")[0] == ["x"]


def test_a_sample_is_all_of_a_small_text_and_a_seeded_choice_of_a_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "SAMPLE_BLOCK", 100)
    files = []
    for number in range(10):
        path = tmp_path / f"{number}.txt"
        path.write_text("".join(f"{number} {line}\n" for line in range(200)))
        files.append(source(path))
    everything = list(sample_texts(files, 10**9, TEXT, 1))
    assert "".join(everything) == "".join(Path(f.path).read_text() for f in files)
    some = list(sample_texts(files, 3000, TEXT, 1))
    assert some == list(sample_texts(files, 3000, TEXT, 1))
    assert some != list(sample_texts(files, 3000, TEXT, 2))
    assert 2000 < sum(map(len, some)) <= 3000
    lines = Counter(line for text in some for line in text.splitlines()[:-1])
    assert set(lines.values()) == {1}, "no line is drawn twice"
    assert len({line.split()[0] for line in lines}) > 5, "it is drawn from all files"
    assert list(sample_texts([], 100, TEXT, 1)) == []


def test_light_to_import() -> None:
    """Worker processes import it: torch there would cost seconds and hundreds of MB each."""
    import subprocess

    code = "import sys, occult_train.tools.prepare; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
