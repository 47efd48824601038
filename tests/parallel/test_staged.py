"""All-to-all through host memory: its rings in a simulation of the GPUs' queues, and the whole on two GPUs."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from simulation import PICKS as ANY_ORDER
from simulation import SimulatedQueues, counter
from torch import Tensor

from occult_train.parallel import staged
from occult_train.parallel.grid import Grid
from occult_train.parallel.staged import HEADER, HostAllToAll, Rings
from occult_train.testing import requires_gpus, run_distributed

SLOT_BYTES, SLOTS = 16, 3


class World:
    """Rings of some ranks over ordinary memory, all driven by the same queues."""

    def __init__(self, size: int, pieces: int = 0) -> None:
        """With `pieces`, that many have already gone through each ring."""
        self.size, self.queues = size, SimulatedQueues()
        self.kept: list[Tensor] = []
        """What queued copies read and write."""
        pairs = [(a, b) for a in range(size) for b in range(size) if a != b]
        self.memory = {pair: torch.zeros(HEADER + SLOTS * SLOT_BYTES, dtype=torch.uint8) for pair in pairs}
        for memory in self.memory.values():
            for offset in (staged.WRITTEN, staged.READ):
                counter(memory.data_ptr() + offset).value = pieces % 2**32
            slots = range(memory.data_ptr() + HEADER, memory.data_ptr() + memory.numel(), SLOT_BYTES)
            self.queues.full.update(dict.fromkeys(slots, False))
        self.rings = [
            Rings(
                rank, size,
                {p: self._ring((rank, p), pieces) for p in range(size) if p != rank},
                {p: self._ring((p, rank), pieces) for p in range(size) if p != rank},
                self.queues,
            )
            for rank in range(size)
        ]  # fmt: skip

    def _ring(self, pair: tuple[int, int], pieces: int) -> staged._Ring:
        ring = staged._Ring(self.memory[pair])
        ring.pieces = pieces
        return ring

    def exchange(self, rows: list[list[int]], number: int) -> list[tuple[Tensor, Tensor]]:
        """Enqueue an all-to-all of rows[from][to] rows of 5 bytes on all ranks; target and what it shall become."""
        generator = torch.Generator().manual_seed(number)
        made = [torch.randint(0, 256, (sum(r), 5), generator=generator, dtype=torch.uint8) for r in rows]
        found = []
        for rank in range(self.size):
            arrives = [rows[source][rank] for source in range(self.size)]
            parts = [made[source].split(rows[source])[rank] for source in range(self.size)]
            target = torch.zeros(sum(arrives), 5, dtype=torch.uint8)
            spans = staged._spans(made[rank], rows[rank]), staged._spans(target, arrives)
            self.rings[rank].exchange(2 * rank, 2 * rank + 1, *spans)
            found.append((target, torch.cat(parts)))
        self.kept += [*made, *(target for target, _ in found)]
        return found


@pytest.fixture(autouse=True)
def small_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings of three slots of 16 bytes, that fill up."""
    monkeypatch.setattr(staged, "SLOT_BYTES", SLOT_BYTES)
    monkeypatch.setattr(staged, "SLOTS", SLOTS)


TABLES = {
    2: [
        [[0, 40], [3, 0]],
        [[0, 0], [1, 0]],
        [[0, 0], [0, 0]],
        [[0, 16], [32, 0]],
        [[0, 7], [50, 0]],
    ],
    3: [
        [[0, 40, 3], [5, 0, 60], [0, 31, 0]],
        [[0, 0, 0], [0, 0, 30], [0, 30, 0]],
        [[0, 9, 9], [9, 0, 9], [9, 9, 0]],
        [[0, 0, 70], [70, 0, 0], [0, 70, 0]],
    ],
    **{n: [[[(17 * a + 29 * b) % 71 * (a != b) for b in range(n)] for a in range(n)]] for n in (4, 8)},
}
"""Rows from each rank to each, of 5 bytes: none, less than a slot, exactly some, more than the ring holds."""
PICKS: dict[str, Callable[[list[int]], int]] = {
    "senders first": lambda ready: min(ready, key=lambda s: (s % 2, s)),
    "receivers first": lambda ready: min(ready, key=lambda s: (-(s % 2), s)),
    **ANY_ORDER,
}


@pytest.mark.parametrize("pieces", [0, 2**32 - 5], ids=["fresh", "counters wrap"])
@pytest.mark.parametrize("pick", PICKS.values(), ids=PICKS)
@pytest.mark.parametrize("size", TABLES)
def test_rings_move_all_rows_in_any_order_of_the_queues(
    size: int, pick: Callable[[list[int]], int], pieces: int
) -> None:
    """Several exchanges in a row without waiting in between."""
    world = World(size, pieces)
    moved = [pair for number, rows in enumerate(TABLES[size] * 2) for pair in world.exchange(rows, number)]
    world.queues.run(pick)
    for target, expected in moved:
        assert torch.equal(target, expected)
    assert not any(world.queues.full.values())
    if pick is PICKS["senders first"]:
        assert world.queues.most_full >= SLOTS


@pytest.mark.parametrize("size", TABLES)
@pytest.mark.parametrize("forgotten", ["out", "into"])
def test_the_simulation_sees_a_wait_that_is_missing(size: int, forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(size)
    wait, kept = world.queues.wait, 1 if forgotten == "out" else 0
    monkeypatch.setattr(world.queues, "wait", lambda stream, *rest: wait(stream, *rest) if stream % 2 == kept else None)
    world.exchange(TABLES[size][0], 0)
    with pytest.raises(AssertionError, match="a slot is"):
        world.queues.run(PICKS["senders first" if forgotten == "out" else "receivers first"])


def test_the_simulation_sees_queues_that_wait_in_a_circle() -> None:
    """Nobody receives."""
    world = World(2)
    world.rings[1]._receive = lambda *args: None  # type: ignore[method-assign]
    world.exchange(TABLES[2][0], 0)
    with pytest.raises(AssertionError, match="all wait for each other"):
        world.queues.run(min)


GPU_ROWS = [
    [[0, 1000], [3, 0]],
    [[0, 0], [17, 0]],
    [[0, 0], [0, 0]],
    [[0, 30000], [20000, 0]],
    [[0, 4096], [8192, 0]],
]


def rank_exchanges(rank: int, slot_bytes: int, slots: int, tables: list[list[list[int]]], repeats: int) -> list[bool]:
    """Whether each exchange gave what NCCL's gives; all are under way before the first is looked at."""
    staged.SLOT_BYTES, staged.SLOTS = slot_bytes, slots
    grid = Grid.create(2)
    exchange, found = HostAllToAll(grid), []
    for number, rows in enumerate(tables * repeats):
        sends, arrives = rows[rank], [r[rank] for r in rows]
        generator = torch.Generator("cuda").manual_seed(2 * number + rank)
        source = torch.randn(sum(sends), 96, device="cuda", generator=generator)
        targets = [torch.full((sum(arrives), 96), float("nan"), device="cuda") for _ in range(2)]
        transfer = exchange(targets[0], source, arrives, sends)
        dist.all_to_all_single(targets[1], source, arrives, sends, group=grid.expert_group)
        transfer.wait()
        found.append((targets[0] == targets[1]).all())
        del source, targets  # their memory may be taken again while the copies run
    torch.cuda.synchronize()
    return [bool(same) for same in found]


@pytest.mark.gpu
@requires_gpus(2)
@pytest.mark.parametrize("slot_bytes,slots", [(4096, 3), (10000, 1), (2**20, 8)])
def test_it_equals_the_all_to_all_of_the_process_group(slot_bytes: int, slots: int) -> None:
    for found in run_distributed(rank_exchanges, 2, slot_bytes, slots, GPU_ROWS, 20, backend="nccl"):
        assert len(found) == 20 * len(GPU_ROWS)
        assert all(found)


@pytest.mark.gpu
@requires_gpus(2)
def test_it_equals_the_all_to_all_of_the_process_group_beyond_its_own_rings() -> None:
    """A gigabyte through 64 megabytes."""
    tables = [[[0, 400_000], [250_000, 0]], [[0, 1], [400_000, 0]]]
    for found in run_distributed(rank_exchanges, 2, 8 * 2**20, 8, tables, 3, backend="nccl"):
        assert all(found)
