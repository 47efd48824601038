"""Which ways settings leave open, and that the fastest of them is taken."""

import itertools
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from occult_train.kernels.grouped_matmul import library
from occult_train.moe import choose
from occult_train.moe import transport as transports
from occult_train.moe.choose import CHUNKS, Shape, Wanted, candidates
from occult_train.moe.fused import Way
from occult_train.moe.transport import HostTransport, SymmetricTransport
from occult_train.parallel.grid import Grid
from occult_train.parallel.staged import bytes_needed

SHAPE = Shape(64, 32, 8, 2, 16, torch.bfloat16)
ONE, TWO = Grid(), Grid(world_size=2, expert_size=2)
MATMULS = ("triton", "joint", "mixed", "library")
OVERLAPS = {"none": (0,), "1": (1,), "3": (3,), "auto": CHUNKS}
Machine = Callable[[bool, bool, bool], None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Say whether GPUs write each other's memory, are of one host, and whether the library multiplies there."""

    def is_like(peers: bool, one_host: bool, has_library: bool) -> None:
        monkeypatch.setattr(SymmetricTransport, "available", staticmethod(lambda grid: peers))
        monkeypatch.setattr(HostTransport, "available", staticmethod(lambda grid: one_host))
        monkeypatch.setattr(library, "supported", lambda *args: has_library)

    return is_like


def expected_transports(wanted: str, several: bool, peers: bool, one_host: bool) -> set[str]:
    """By the words of the settings: host memory stands in where GPUs cannot reach each other."""
    if wanted != "auto":
        return {wanted}
    if several and peers:
        return {"collective", "symmetric"}
    return {"collective", "host"} if several and one_host else {"collective"}


def test_rings_that_are_there_need_no_second_room(monkeypatch: pytest.MonkeyPatch) -> None:
    eight = Grid(world_size=8, expert_size=8)
    monkeypatch.setattr(transports, "devices_of_one_host", lambda grid: list(range(8)))
    monkeypatch.setattr(transports, "_all_say", lambda answer, grid: answer)
    free = SimpleNamespace(free=bytes_needed(8) - 1)
    monkeypatch.setattr(transports, "shutil", SimpleNamespace(disk_usage=lambda path: free))
    assert not HostTransport.available(eight)
    monkeypatch.setitem(transports._RINGS, eight.expert_group, None)
    assert HostTransport.available(eight)


@pytest.mark.parametrize("peers,one_host", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("has_library", [True, False])
@pytest.mark.parametrize("grid", [ONE, TWO], ids=["one rank", "two ranks"])
def test_candidates_of_all_settings(
    grid: Grid, has_library: bool, peers: bool, one_host: bool, machine: Machine
) -> None:
    machine(peers, one_host, has_library)
    several = grid.expert_size > 1
    works = {"auto": True, "collective": True, "symmetric": several and peers, "host": several and one_host}
    for matmul, transport, overlap in itertools.product(("auto", *MATMULS), works, OVERLAPS):
        wanted = Wanted(matmul, transport, overlap)
        if not works[transport] or (matmul in ("mixed", "library") and not has_library):
            with pytest.raises(ValueError, match=f"transport={transport} needs|matmul={matmul} does not take"):
                candidates(SHAPE, grid, wanted)
            continue
        matmuls = [m for m in MATMULS if matmul in ("auto", m) and (m in ("triton", "joint") or has_library)]
        transports = expected_transports(transport, several, peers, one_host)
        expected = {
            Way(m, t, c)
            for m, t, c in itertools.product(matmuls, transports, OVERLAPS[overlap])
            if c == 0 or (several and t != "symmetric")
        }
        if not expected:
            with pytest.raises(ValueError, match=f"overlap={overlap}"):
                candidates(SHAPE, grid, wanted)
            continue
        found = candidates(SHAPE, grid, wanted)
        assert len(found) == len(set(found))
        assert set(found) == expected, wanted


def test_errors_say_what_was_asked_for(machine: Machine) -> None:
    machine(False, False, False)
    with pytest.raises(ValueError, match=r"transport=symmetric needs parallel.expert of 2 .*write each other's memory"):
        candidates(SHAPE, TWO, Wanted(transport="symmetric"))
    with pytest.raises(ValueError, match=r"transport=host needs parallel.expert of 2 .*of one host, and 64 MB"):
        candidates(SHAPE, TWO, Wanted(transport="host"))
    with pytest.raises(ValueError, match=r"matmul=library does not take torch.bfloat16 of widths \(64, 32\)"):
        candidates(SHAPE, TWO, Wanted(matmul="library"))
    machine(True, True, True)
    with pytest.raises(ValueError, match="transport=symmetric moves all rows at once; overlap=2 was asked for"):
        candidates(SHAPE, TWO, Wanted(transport="symmetric", overlap="2"))
    with pytest.raises(ValueError, match="overlap=2 needs several ranks a layer"):
        candidates(SHAPE, ONE, Wanted(overlap="2"))


class Trial:
    """Takes as long as it is told, and remembers what was measured."""

    def __init__(self, milliseconds: Callable[[Way], float]) -> None:
        self.milliseconds = milliseconds
        self.measured: list[Way] = []

    def __call__(self, shape: Shape, grid: Grid) -> "Trial":
        return self

    def measure(self, way: Way) -> float:
        self.measured.append(way)
        return self.milliseconds(way)


def costs(matmul: str, transport: str, chunks: int) -> Callable[[Way], float]:
    """A machine on which this way is the fastest, and each part of it counts for itself."""
    return lambda way: 1.0 + (way.matmul != matmul) + 2 * (way.transport != transport) + 4 * (way.chunks != chunks)


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> Any:
    """On a machine with a GPU and everything."""
    machine(False, True, True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def take(milliseconds: Callable[[Way], float]) -> Trial:
        made = Trial(milliseconds)
        monkeypatch.setattr(choose, "_Trial", made)
        return made

    return take


@pytest.mark.parametrize("matmul", MATMULS)
@pytest.mark.parametrize("transport,chunks", [("collective", 0), ("collective", 2), ("host", 0), ("host", 4)])
def test_the_fastest_is_chosen(matmul: str, transport: str, chunks: int, trial: Any) -> None:
    made = trial(costs(matmul, transport, chunks))
    best, text = choose.choose(SHAPE, TWO, Wanted())
    assert best == Way(matmul, transport, chunks)
    assert len(made.measured) == len(set(made.measured)) == 2 * len(CHUNKS) + 3  # the other products with one transport
    cut = f", {chunks} chunks" if chunks else ""
    start = f"{matmul} products, {transport} transport{cut}"
    assert text.startswith(f"{start}: fastest, in ms forward and backward: {start} 1.00, ")
    listed = [float(ms) for ms in re.findall(r" (\d+\.\d\d)", text)]
    assert len(listed) == len(made.measured)
    assert listed == sorted(listed)


def test_only_what_settings_leave_open_is_measured(trial: Any) -> None:
    made = trial(costs("triton", "collective", 0))
    best, _ = choose.choose(SHAPE, TWO, Wanted("mixed", "host", "auto"))
    assert best == Way("mixed", "host", 0)
    assert set(made.measured) == {Way("mixed", "host", c) for c in CHUNKS}


def test_a_single_way_is_not_measured(trial: Any) -> None:
    made = trial(costs("triton", "collective", 0))
    best, text = choose.choose(SHAPE, TWO, Wanted("library", "host", "2"))
    assert (best, made.measured) == (Way("library", "host", 2), [])
    assert text == "library products, host transport, 2 chunks, as set"


def test_without_a_gpu_nothing_is_measured(trial: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trial(costs("library", "host", 4))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    best, _ = choose.choose(SHAPE, TWO, Wanted())
    assert (best, made.measured) == (Way("triton", "collective", 0), [])


@pytest.mark.parametrize("interpreted,gpu", itertools.product([False, True], repeat=2))
def test_kernels_run_on_gpus_and_interpreted(interpreted: bool, gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
    assert choose.can_run_kernels() == (interpreted or gpu)
