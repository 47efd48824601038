"""Make a file of mixed text and code: `python -m occult_train.tools.bench.mixed_text OUTPUT.jsonl.xz [--code FILE]`.

A freely available mixture that needs no hub: prose, dictionaries, manuals and the King James Bible from Debian's
packages (fetched with apt-get), and the Python files of this interpreter's standard library. About 115 MB of text,
30 million tokens, of which a third is code; 25 MB compressed. Models trained on it have experts that differ.
"""

import argparse
import gzip
import json
import lzma
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path

PACKAGES = ("anarchism", "bible-kjv", "bible-kjv-text", "dict-gcide", "perl-doc", "wordnet-base")
CHUNK = 16_000
"""Characters of a document cut from a longer text."""


class _Words(HTMLParser):
    """Collects the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        """Scripts and styles are no text."""
        self._hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        """See `handle_starttag`."""
        self._hidden -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        """Keep it."""
        if not self._hidden:
            self.parts.append(data)


def page_text(page: str) -> str:
    """A page of HTML without markup."""
    words = _Words()
    words.feed(page)
    return "".join(words.parts)


def chunks(pieces: Iterable[str], size: int = CHUNK) -> Iterator[str]:
    """Join pieces to documents of at least `size` characters, but for the last."""
    held, length = [], 0
    for piece in pieces:
        held.append(piece)
        length += len(piece)
        if length >= size:
            yield "".join(held)
            held, length = [], 0
    if held:
        yield "".join(held)


def glosses(lines: Iterable[str]) -> Iterator[str]:
    """Of WordNet's data files (man 5 wndb): the words of each synset and what they mean."""
    for line in lines:
        head, bar, gloss = line.partition("|")
        if bar and not line.startswith("  "):
            fields = head.split()
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            yield f"{', '.join(words).replace('_', ' ')}: {gloss.strip()}\n"


def prose(root: Path) -> Iterator[str]:
    """All documents of the unpacked packages."""
    for page in sorted(root.glob("usr/share/doc/anarchism/**/*.html")):
        yield page_text(page.read_text(errors="replace"))
    for manual in sorted(root.glob("usr/share/perl/*/pod/*.pod")):
        yield manual.read_text(errors="replace")
    for name in ("noun", "verb", "adj", "adv"):
        with (root / "usr/share/wordnet" / f"data.{name}").open() as lines:
            yield from chunks(glosses(lines))
    dictionary = gzip.decompress((root / "usr/share/dictd/gcide.dict.dz").read_bytes()).decode(errors="replace")
    yield from chunks(dictionary.splitlines(keepends=True))
    verses = [str(root / "usr/bin/bible"), "-p", str(root / "usr/lib"), "gen1:1-rev22:21"]
    bible = subprocess.run(verses, check=True, capture_output=True, text=True).stdout
    yield from chunks(bible.splitlines(keepends=True))


def code() -> Iterator[str]:
    """Those of the standard library."""
    for source in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in source.parts:
            yield source.read_text(errors="replace")


def fetch(folder: Path) -> Path:
    """Download and unpack the packages; returns the root of their files."""
    subprocess.run(["apt-get", "download", "-q", *PACKAGES], cwd=folder, check=True)
    for package in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(package), str(folder / "root")], check=True)
    return folder / "root"


def main() -> None:
    """Write the file, and say how much went in."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--code", type=Path, help="Code into a file of its own.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        texts = prose(fetch(Path(folder)))
        write(given.output, texts if given.code else chain(texts, code()))
    if given.code:
        write(given.code, code())


def write(output: Path, documents: Iterable[str]) -> None:
    """One document a line; says how much went in."""
    output.parent.mkdir(parents=True, exist_ok=True)
    count, size = 0, 0
    with lzma.open(output, "wt", preset=6) as file:
        for document in documents:
            file.write(json.dumps({"text": document}) + "\n")
            count, size = count + 1, size + len(document)
    print(f"{output}: {count:,} documents, {size / 1e6:.1f} million characters, {output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
