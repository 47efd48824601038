"""Which variant of a kernel is remembered for which arguments."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from occult_train.kernels import launching
from occult_train.kernels.launching import Quick, full, power_of_2


class Compiled:
    """A variant, with what it was launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    function, packed_metadata = "function", "metadata"

    def run(self, x: int, y: int, z: int, stream: int, *args: Any) -> None:
        assert stream == 7
        assert args[:5] == ("function", "metadata", None, None, None)
        self.launches.append(((x, y, z), args[5:]))


class Function:
    """A JIT function that compiles anew at each call."""

    arg_names = ("x", "n", "K", "BH")

    def __init__(self) -> None:
        self.made: list[Compiled] = []
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **constants: Any) -> Compiled:
            self.calls.append((grid, args, constants))
            self.made.append(Compiled())
            return self.made[-1]

        return run


@pytest.fixture
def function(monkeypatch: pytest.MonkeyPatch) -> Function:
    monkeypatch.setattr(launching, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    return Function()


def launched(*args: Any) -> tuple[Any, ...]:
    """Addresses in place of tensors."""
    return tuple(arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args)


def aligned(offset: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor whose first element is `offset` bytes past a multiple of 64."""
    memory = torch.zeros(256, dtype=torch.uint8)
    start = -memory.data_ptr() % 64 + offset
    return memory[start : start + 64].view(dtype)


def test_a_variant_is_compiled_once_and_launched_with_its_constants(function: Function) -> None:
    x, quick = aligned(), Quick(function)
    for rows in (3, 4, 5):
        quick[(rows, 2)](x, 32, K=8, BH=64, num_warps=4)
    assert function.calls == [((3, 2), (x, 32), {"K": 8, "BH": 64, "num_warps": 4})]
    assert function.made[0].launches == [((4, 2, 1), launched(x, 32, 8, 64)), ((5, 2, 1), launched(x, 32, 8, 64))]


@pytest.mark.parametrize(
    "first,second",
    [
        ((aligned(), 32), (aligned(dtype=torch.bfloat16), 32)),
        ((aligned(), 32), (aligned(4), 32)),
        ((aligned(), 32), (None, 32)),
        ((aligned(), 32), (aligned(), 1)),
        ((aligned(), 32), (aligned(), 33)),
        ((aligned(), 33), (aligned(), 1)),
        ((aligned(), 32), (aligned(), 2**31)),
        ((aligned(), -1), (aligned(), 1)),
    ],
)
def test_arguments_of_another_kind_take_another_variant(
    first: tuple[Any, ...], second: tuple[Any, ...], function: Function
) -> None:
    quick = Quick(function)
    for _ in range(2):
        quick[(1,)](*first, K=8, BH=64)
        quick[(1,)](*second, K=8, BH=64)
    assert [args for _, args, _ in function.calls] == [first, second]
    assert [[args[:2] for _, args in made.launches] for made in function.made] == [
        [launched(*first)],
        [launched(*second)],
    ]


@pytest.mark.parametrize(
    "first,second",
    [((aligned(), 32), (aligned(16), 4096)), ((aligned(), 33), (aligned(48), 7)), ((aligned(), 0), (aligned(), 16))],
)
def test_arguments_of_one_kind_share_a_variant(
    first: tuple[Any, ...], second: tuple[Any, ...], function: Function
) -> None:
    quick = Quick(function)
    quick[(1,)](*first, K=8, BH=64)
    quick[(1,)](*second, K=8, BH=64)
    assert len(function.calls) == 1
    assert function.made[0].launches == [((1, 1, 1), launched(*second, 8, 64))]


@pytest.mark.parametrize("constants", [{"K": 4}, {"BH": 128}, {"num_warps": 8}])
def test_other_constants_take_another_variant(constants: dict[str, int], function: Function) -> None:
    quick, usual = Quick(function), {"K": 8, "BH": 64, "num_warps": 4}
    quick[(1,)](aligned(), 32, **usual)
    quick[(1,)](aligned(), 32, **(usual | constants))
    assert len(function.calls) == 2


def test_each_device_has_its_variant(function: Function, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = Quick(function)
    quick[(1,)](aligned(), 32, K=8, BH=64)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    quick[(1,)](aligned(), 32, K=8, BH=64)
    assert len(function.calls) == 2


def test_two_functions_share_nothing(function: Function) -> None:
    other = Function()
    for each in (function, other):
        Quick(each)[(1,)](aligned(), 32, K=8, BH=64)
    assert (len(function.calls), len(other.calls)) == (1, 1)


def test_the_interpreter_is_called_each_time(function: Function, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "INTERPRETED", True)
    quick = Quick(function)
    for _ in range(2):
        quick[(1,)](aligned(), 32, K=8, BH=64)
    assert len(function.calls) == 2
    assert not any(made.launches for made in function.made)


def test_grids_have_three_dimensions() -> None:
    assert [full(grid) for grid in ((5,), (5, 6), (5, 6, 7))] == [(5, 1, 1), (5, 6, 1), (5, 6, 7)]


@given(st.integers(0, 2**40))
def test_power_of_2(n: int) -> None:
    found = power_of_2(n)
    assert found.bit_count() == 1
    assert found >= n
    assert found == 1 or found // 2 < n
