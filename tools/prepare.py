"""`occult prepare`: text files to a corpus that `occult train` reads.

The output folder gets train.bin/.idx, valid.bin/.idx, the tokenizer and, last, corpus.json. Until that one is there the
corpus is unfinished: work lies in `parts/`, and the same command goes on where it was stopped.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from occult_train.data.merge import merge_parts
from occult_train.data.metadata import FORMAT, describe_tokens, summary, write_metadata
from occult_train.data.output import existing, is_same, locked, remove_corpus
from occult_train.data.parts import PART_BYTES, Part, PartSettings, encode_parts, plan_parts
from occult_train.data.reading import Key, sample_texts, spans
from occult_train.data.sentencepiece_training import train_sentencepiece
from occult_train.data.sources import JSON_LINES, Found, find_files
from occult_train.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from occult_train.errors import DataError

SAMPLE_BYTES = 10_000_000
"""Text that a new tokenizer is trained on."""
SAMPLE_SEED = 1


@dataclass(frozen=True)
class Options:
    """What a corpus is made of, besides its files."""

    sources: list[str]
    vocab_size: int
    tokenizer: str | None
    eod: str | None
    text_key: str
    valid_fraction: float
    stdlib: bool
    min_bytes: int
    sample_bytes: int
    instructions: bool
    prompt_key: str
    response_key: str
    tokenizer_identity: str = field(default="", init=False)
    """Of a given tokenizer: its hash, the id that ends documents, and those that they begin with."""

    def __post_init__(self) -> None:
        if not self.sources and not self.stdlib:
            raise DataError("no source given; name files or folders, or --stdlib")
        if self.instructions and self.stdlib:
            raise DataError("--instructions reads prompts and responses, which --stdlib does not have")
        if not 0 <= self.valid_fraction < 1:
            raise DataError(f"--valid-fraction {self.valid_fraction} must be at least 0 and less than 1")
        if self.tokenizer:
            given = load_tokenizer(self.tokenizer, self.eod)
            identity = " ".join(map(str, (given.fingerprint(), given.eod_id, *given.begin)))
            object.__setattr__(self, "tokenizer_identity", identity)

    @property
    def keys(self) -> tuple[Key, ...]:
        """Where the text is in a JSON line."""
        if self.instructions:
            return Key(self.prompt_key, "--prompt-key"), Key(self.response_key, "--response-key")
        return (Key(self.text_key, "--text-key"),)

    def fingerprint(self, found: Found) -> str:
        """Of all that the corpus depends on."""
        depends: dict[str, Any] = asdict(self) | {"format": FORMAT, "files": [asdict(f) for f in found.files]}
        depends |= {"sources": "", "tokenizer": ""}  # the files themselves and the tokenizer's identity stand for them
        if self.tokenizer:
            depends |= {"vocab_size": 0, "sample_bytes": 0}
        for name in ("text_key",) if self.instructions else ("instructions", "prompt_key", "response_key"):
            del depends[name]
        return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def prepare(
    sources: list[str],
    output: Path,
    *,
    vocab_size: int = 8192,
    tokenizer: str | None = None,
    eod: str | None = None,
    text_key: str = "text",
    workers: int | None = None,
    valid_fraction: float = 0.01,
    stdlib: bool = False,
    min_bytes: int = 1,
    sample_bytes: int = SAMPLE_BYTES,
    instructions: bool = False,
    prompt_key: str = "prompt",
    response_key: str = "response",
    overwrite: bool = False,
    part_bytes: int = PART_BYTES,
) -> dict[str, Any]:
    """Tokenise text into the corpus folder `output`, and return the content of its corpus.json.

    Args:
        sources: plain text files (a document each; one longer than `part_bytes` becomes several), .jsonl files (a
            document a line), and folders of both.
        vocab_size: of the sentencepiece tokenizer to train, unless `tokenizer` is given.
        tokenizer: a .model or tokenizer.json file to use, or a folder with one.
        eod: the token that ends a document, where the tokenizer does not say it.
        text_key: where the text is in a JSON line.
        workers: processes; None takes one a usable core.
        valid_fraction: of the documents to hold out, chosen by a hash of their text; at least one is.
        stdlib: also the Python files of the running interpreter's standard library.
        min_bytes: documents with fewer bytes of text are left out.
        sample_bytes: of text to train the tokenizer on.
        instructions: the sources are .jsonl files whose lines are a prompt and a response, which are encoded apart
            with nothing between them; the loss is on the response and the id that ends it.
        prompt_key: where the prompt is in a JSON line.
        response_key: where the response is.
        overwrite: replace a complete corpus that was made of something else.
        part_bytes: of text in a part.

    Raises:
        DataError: bad sources, text, tokenizer or settings, another corpus in the folder, or no room on the disk.
    """
    options = Options(
        *(sources, vocab_size, tokenizer, eod, text_key, valid_fraction, stdlib, min_bytes, sample_bytes),
        *(instructions, prompt_key, response_key),
    )
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    found = find_files(sources, stdlib=stdlib, without=output)
    _check_lines(found, options)
    fingerprint = options.fingerprint(found)
    try:
        if not overwrite or is_same(output, fingerprint):
            metadata = existing(output, fingerprint)
            if metadata:
                console.print(f"{output} is there already: {summary(metadata)}")
                return metadata
        output.mkdir(parents=True, exist_ok=True)
        with locked(output):
            return _make(output, options, found, fingerprint, workers or usable_cores(), part_bytes, console)
    except OSError as error:
        if isinstance(error.filename, str) and not Path(error.filename).resolve().is_relative_to(output.resolve()):
            raise DataError(f"{error.filename}: {error.strerror or error}") from None
        raise DataError(f"--output={output} cannot be written: {error.strerror or error}") from None


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def _make(
    output: Path, options: Options, found: Found, fingerprint: str, workers: int, part_bytes: int, console: Console
) -> dict[str, Any]:
    """The steps of the work, each of which finds what an earlier run left."""
    parts_folder = output / "parts"
    parts_folder.mkdir(exist_ok=True)
    console.print(f"{len(found.files)} files, {_megabytes(sum(f.size for f in found.files))} of text")
    tokenizer, tokenizer_path = _tokenizer(parts_folder, options, found, fingerprint, console)
    settings = PartSettings(
        folder=str(parts_folder),
        tokenizer=str(tokenizer_path),
        tokenizer_sha256=tokenizer.fingerprint(),
        eod_id=tokenizer.eod_id,
        eod=options.eod,
        keys=options.keys,
        min_bytes=options.min_bytes,
        begin=tokenizer.begin,
    )
    parts = plan_parts(spans(found.files, part_bytes), settings, part_bytes)
    _follow(encode_parts(parts, settings, workers), parts, console)
    merged = merge_parts(
        parts,
        settings,
        output,
        vocab_size=tokenizer.vocab_size,
        fraction=options.valid_fraction,
        before_finish=lambda: remove_corpus(output),
    )
    saved = tokenizer.save(output)
    metadata = describe_tokens(merged, tokenizer) | {
        "tokenizer": saved.name,
        "eod": options.eod,
        "sources": [os.path.abspath(s) for s in options.sources] + ["--stdlib"] * options.stdlib,
        "files": len(found.files),
        "binary_files": found.binary,
        "fingerprint": fingerprint,
    }
    if options.instructions:
        metadata |= {"examples": True, "response_tokens": int(merged.train.unigrams.sum())}
    write_metadata(output, metadata)
    shutil.rmtree(parts_folder)
    console.print(f"{output}: {summary(metadata)}")
    return metadata


def _check_lines(found: Found, options: Options) -> None:
    """Plain text has no prompts and responses."""
    for file in found.files if options.instructions else ():
        if not file.is_json_lines:
            endings = " or ".join(JSON_LINES)
            raise DataError(f"source {file.path} is not {endings}: --instructions takes a prompt and a response a line")


def _tokenizer(
    folder: Path, options: Options, found: Found, fingerprint: str, console: Console
) -> tuple[Tokenizer, Path]:
    """The tokenizer, and the copy of it that workers read."""
    own = folder / f"tokenizer-{fingerprint[:16]}"
    if options.tokenizer:
        tokenizer = load_tokenizer(options.tokenizer, options.eod)
    elif find_tokenizer(own):
        return load_tokenizer(own), own
    else:
        with console.status("training the tokenizer") if console.is_terminal else contextlib.nullcontext():
            texts = sample_texts(found.files, options.sample_bytes, options.keys, SAMPLE_SEED)
            tokenizer = train_sentencepiece(texts, options.vocab_size)
        console.print(f"trained a tokenizer of {tokenizer.vocab_size} pieces")
    own.mkdir(exist_ok=True)
    tokenizer.save(own)
    return tokenizer, own


def _follow(done: Iterator[Part], parts: list[Part], console: Console) -> None:
    """Show progress while parts are made: a bar on a terminal, else a line every tenth of the text."""
    total, so_far = sum(part.size for part in parts), 0
    columns = (TextColumn("tokenising"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=total)
        for part in done:
            progress.advance(task, part.size)
            if not console.is_terminal and 10 * (so_far + part.size) // max(total, 1) > 10 * so_far // max(total, 1):
                console.print(f"tokenised {_megabytes(so_far + part.size)} of {_megabytes(total)}")
            so_far += part.size


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def command(
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="SOURCE...", help="Text files, .jsonl files (a document a line), and folders of them."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the corpus.")] = Path("corpus"),
    vocab_size: Annotated[int, typer.Option(help="Pieces of the tokenizer to train.")] = 8192,
    tokenizer: Annotated[
        str | None, typer.Option(help="Use this .model or tokenizer.json file (or folder) instead of training one.")
    ] = None,
    eod: Annotated[str | None, typer.Option(help="Token that ends a document, if the tokenizer does not say.")] = None,
    text_key: Annotated[str, typer.Option(help="Where the text is in a line of .jsonl.")] = "text",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. [default: one a core]")] = None,
    valid_fraction: Annotated[float, typer.Option(help="Share of the documents to hold out.")] = 0.01,
    stdlib: Annotated[bool, typer.Option("--stdlib", help="Add this Python's standard library.")] = False,
    min_bytes: Annotated[int, typer.Option(min=1, help="Leave out documents with fewer bytes.")] = 1,
    sample_bytes: Annotated[int, typer.Option(min=1, help="Text to train the tokenizer on.")] = SAMPLE_BYTES,
    instructions: Annotated[
        bool, typer.Option("--instructions", help="Lines are a prompt and a response; only responses are learnt.")
    ] = False,
    prompt_key: Annotated[str, typer.Option(help="Where the prompt is in a line of .jsonl.")] = "prompt",
    response_key: Annotated[str, typer.Option(help="Where the response is in a line of .jsonl.")] = "response",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another corpus in the folder.")] = False,
) -> None:
    """Make a corpus of text: tokenise it, hold some out, and write what `occult train` reads.

    Stopped, it goes on where it was when run again. In folders all plain text is read (Markdown, source code and the
    like) and .jsonl; hidden files are not.
    """
    try:
        prepare(
            sources or [],
            output,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            eod=eod,
            text_key=text_key,
            workers=workers,
            valid_fraction=valid_fraction,
            stdlib=stdlib,
            min_bytes=min_bytes,
            sample_bytes=sample_bytes,
            instructions=instructions,
            prompt_key=prompt_key,
            response_key=response_key,
            overwrite=overwrite,
        )
    except KeyboardInterrupt:
        typer.echo(f"stopped; the same command goes on with {output}", err=True)
        raise typer.Exit(130) from None
