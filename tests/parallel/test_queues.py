"""Barriers by the queues of GPUs: in a simulation of these, and on two GPUs beside kernels that write."""

import ctypes
from collections.abc import Callable

import pytest
import torch
from simulation import PICKS, SimulatedQueues

from occult_train.kernels.movers import kernel as movers
from occult_train.moe.transport import SymmetricBox
from occult_train.parallel.grid import Grid
from occult_train.parallel.queues import Meeting
from occult_train.testing import requires_gpus, run_distributed

ROUNDS = 5


@pytest.mark.parametrize("passed", [0, 2**32 - 3], ids=["fresh", "counters wrap"])
@pytest.mark.parametrize("pick", PICKS.values(), ids=PICKS)
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_nobody_goes_on_before_all_have_come(size: int, pick: Callable[[list[int]], int], passed: int) -> None:
    """Each rank says in which round it is, and afterwards sees all others in that round or the next."""
    queues = SimulatedQueues()
    flags = [(ctypes.c_uint32 * size)(*[passed % 2**32] * size) for _ in range(size)]
    rounds, seen = (ctypes.c_uint32 * size)(), torch.full((size, ROUNDS, size), -1, dtype=torch.int32)
    addresses = [ctypes.addressof(array) for array in flags]
    for rank in range(size):
        meeting = Meeting(rank, addresses, queues)
        meeting.number = passed
        for number in range(ROUNDS):
            queues.write(rank, ctypes.addressof(rounds) + 4 * rank, number + 1)
            meeting(rank)
            queues.copy(rank, seen[rank, number].data_ptr(), ctypes.addressof(rounds), 4 * size)
    queues.run(pick)
    expected = torch.arange(1, ROUNDS + 1, dtype=torch.int32)[None, :, None]
    assert ((seen == expected) | (seen == expected + 1)).all()


def test_the_simulation_sees_one_who_does_not_come() -> None:
    queues, flags = SimulatedQueues(), [(ctypes.c_uint32 * 2)() for _ in range(2)]
    Meeting(0, [ctypes.addressof(array) for array in flags], queues)(0)
    with pytest.raises(AssertionError, match="all wait for each other"):
        queues.run(min)


def rank_writes(rank: int, rounds: int) -> list[bool]:
    """Whether after each barrier all that the other wrote before it was there: into one of two places that take turns,
    late in even rounds if it is rank 0, in odd ones if it is rank 1."""
    box, count, found = SymmetricBox.of(Grid.create(2), "test"), 1000, []
    box.reserve(4 * 2 * 2 * count, agreed=True)
    with torch.cuda.stream(torch.cuda.Stream()):
        for number in range(rounds):
            first = 2 * count * (number % 2)
            if number % 2 == rank:
                torch.cuda._sleep(2_000_000)
            numbers = torch.full((count,), number + 1, dtype=torch.int32, device="cuda")
            movers.share(numbers, box.address_D, first + rank * count)
            box.barrier()
            found.append((box.numbers(first, 2 * count) == number + 1).all())
    torch.cuda.synchronize()
    return [bool(same) for same in found]


@pytest.mark.gpu
@requires_gpus(2)
def test_what_was_written_before_is_there_afterwards() -> None:
    for found in run_distributed(rank_writes, 2, 200, backend="nccl"):
        assert len(found) == 200
        assert all(found)
