"""Hostfiles and filters: what is accepted, and the words for what is not."""

import socket
from pathlib import Path

import pytest

from occult_train.errors import UserError
from occult_train.launcher.hostfile import is_this_machine, read, select

HOSTS = {"a": [0, 1, 2, 3], "b": [0, 1]}


def _write(folder: Path, text: str) -> str:
    path = folder / "hosts"
    path.write_text(text)
    return str(path)


def test_comments_and_empty_lines_are_skipped(tmp_path: Path) -> None:
    text = "# two nodes\n\na slots=4\n  b   slots=2  # the small one\nc slots=1 max_slots=8\n"
    assert read(_write(tmp_path, text)) == {**HOSTS, "c": [0]}


@pytest.mark.parametrize(
    "text, message",
    [
        ("a slots=4\nb slot=4\n", r"hosts:2: 'b slot=4' is not of the form HOST slots=N"),
        ("host 4\n", r"hosts:1: 'host 4' is not of the form"),
        ("a slots=4x\n", r"hosts:1: 'a slots=4x' is not of the form"),
        ("a\n", r"hosts:1: 'a' is not of the form"),
        ("a slots=-1\n", r"hosts:1: 'a slots=-1' is not of the form"),
        ("a slots=0\n", r"hosts:1: 'a slots=0' gives host a no slots"),
        ("a slots=1\n\na slots=2\n", r"hosts:3: 'a slots=2' lists host a a second time"),
        ("# nothing\n", r"hosts lists no hosts"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(_write(tmp_path, text))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere cannot be read: No such file"):
        read(str(tmp_path / "nowhere"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary cannot be read: it is not text"):
        read(str(tmp_path / "binary"))


@pytest.mark.parametrize(
    "options, slots",
    [
        ({}, HOSTS),
        ({"include": "b:1"}, {"b": [1]}),
        ({"include": "b@a:3,0"}, {"a": [0, 3], "b": [0, 1]}),
        ({"exclude": "b"}, {"a": [0, 1, 2, 3]}),
        ({"exclude": "a:1,2@b:0"}, {"a": [0, 3], "b": [1]}),
        ({"num_nodes": 1}, {"a": [0, 1, 2, 3]}),
        ({"num_gpus": 2}, {"a": [0, 1], "b": [0, 1]}),
    ],
)
def test_filters_agree_with_deepspeed(options: dict, slots: dict[str, list[int]]) -> None:
    from deepspeed.launcher.runner import apply_num_nodes_and_gpus, parse_inclusion_exclusion

    counts = {host: len(numbers) for host, numbers in HOSTS.items()}
    theirs = parse_inclusion_exclusion(counts, options.get("include", ""), options.get("exclude", ""))
    theirs = apply_num_nodes_and_gpus(theirs, options.get("num_nodes", 0), options.get("num_gpus", 0))
    assert select(HOSTS, **options) == slots == dict(theirs)
    assert list(select(HOSTS, **options)) == list(theirs)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"include": "a", "exclude": "b"}, r"cannot both be given"),
        ({"include": "a", "num_gpus": 1}, r"cannot be combined with --include"),
        ({"include": "c"}, r"--include=c: there is no host c among a, b"),
        ({"include": "b:2"}, r"--include=b:2: host b has no slot 2, it has 2"),
        ({"include": "a:x"}, r"'a:x' is not of the form HOST"),
        ({"exclude": "a@b"}, r"--exclude=a@b leaves no slots"),
        ({"num_nodes": 3}, r"--num-nodes=3 but there are 2 hosts"),
        ({"num_gpus": 3}, r"--num-gpus=3 but host b has 2"),
    ],
)
def test_filters_that_cannot_hold(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        select(HOSTS, **options)


def test_this_machine() -> None:
    assert all(is_this_machine(host) for host in ("localhost", "127.0.0.1", socket.gethostname()))
    assert not is_this_machine("192.0.2.7")
    assert not is_this_machine("no-such-host.invalid")
