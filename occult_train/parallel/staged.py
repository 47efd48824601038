"""All-to-all between the GPUs of one host through pinned host memory, moved by copy engines alone.

For hosts whose GPUs cannot reach each other's memory. NCCL then copies through host memory too, but with kernels: they
take multiprocessors from the computation beside them, and reach less than half of what the copy engines do.

Each ordered pair of ranks has a ring of pinned slots in shared memory, a counter of pieces written and one of pieces
read. The sender's stream waits for a free slot, copies out and raises the first; the receiver's stream waits for that,
copies in and raises the second. The waiting is done by the GPU's own queues (stream memory operations), not the host.
In step k every rank sends to the rank k places on and receives from the one k places back, so rings that fill up
cannot wait in a circle.
"""

import mmap
import os
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from occult_train.parallel.grid import Grid
from occult_train.parallel.queues import Driver, Queues

SLOT_BYTES = 8 * 2**20
SLOTS = 8
"""Slots of a ring. 64 MB hold what a rank sends to another in most passes, so that senders seldom wait."""
HEADER = 4096
SHARED_MEMORY = "/dev/shm"
WRITTEN, READ = 0, 64
"""Where the counters lie in the header."""


@dataclass
class Transfer:
    """An exchange under way."""

    done: torch.cuda.Event

    def wait(self) -> None:
        """Let the current stream wait until everything has arrived."""
        torch.cuda.current_stream().wait_event(self.done)


class _Ring:
    """One direction between two ranks, as either of them sees it: addresses, and how many pieces went through."""

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.pieces = memory, 0
        self.written, self.read = memory.data_ptr() + WRITTEN, memory.data_ptr() + READ

    def next(self) -> tuple[int, int]:
        """Number of the next piece, counted from 1, and the address of its slot."""
        slot = self.memory.data_ptr() + HEADER + self.pieces % SLOTS * SLOT_BYTES
        self.pieces += 1
        return self.pieces, slot


def bytes_needed(size: int) -> int:
    """Of shared memory, for all rings of a group of `size` ranks."""
    return size * (size - 1) * (HEADER + SLOTS * SLOT_BYTES)


@dataclass
class Rings:
    """The rings of one rank by peer, and the order in which they are used."""

    rank: int
    size: int
    sends: dict[int, _Ring]
    receives: dict[int, _Ring]
    queues: Queues

    def exchange(self, out: int, into: int, outs: list[tuple[int, int]], ins: list[tuple[int, int]]) -> None:
        """Send and receive, on a stream each: address and bytes for and from each rank."""
        for step in range(1, self.size):
            to, sender = (self.rank + step) % self.size, (self.rank - step) % self.size
            self._send(out, self.sends[to], *outs[to])
            self._receive(into, self.receives[sender], *ins[sender])

    def _send(self, stream: int, ring: _Ring, address: int, nbytes: int) -> None:
        """Copy memory out through the ring; piece n waits until piece n - SLOTS has been read."""
        for start in range(0, nbytes, SLOT_BYTES):
            number, slot = ring.next()
            self.queues.wait(stream, ring.read, number - SLOTS)
            self.queues.copy(stream, slot, address + start, min(SLOT_BYTES, nbytes - start))
            self.queues.write(stream, ring.written, number)

    def _receive(self, stream: int, ring: _Ring, address: int, nbytes: int) -> None:
        """Copy memory in through the ring."""
        for start in range(0, nbytes, SLOT_BYTES):
            number, slot = ring.next()
            self.queues.wait(stream, ring.written, number)
            self.queues.copy(stream, address + start, slot, min(SLOT_BYTES, nbytes - start))
            self.queues.write(stream, ring.read, number)


class HostAllToAll:
    """`all_to_all_single` of an expert-parallel group on one host. Making one is collective over the group."""

    def __init__(self, grid: Grid) -> None:
        rank, size, group = grid.expert_rank, grid.expert_size, grid.expert_group
        self.out, self.into = torch.cuda.Stream(), torch.cuda.Stream()
        queues, names = Driver(), [""] * size
        dist.all_gather_object(names, f"{SHARED_MEMORY}/occult-{os.getpid()}-{id(self)}", group=group)
        peers = [p for p in range(size) if p != rank]
        for peer in peers:
            Path(f"{names[rank]}-{peer}").write_bytes(bytes(HEADER + SLOTS * SLOT_BYTES))
        dist.barrier(group)
        sends = {peer: _Ring(_pinned(f"{names[rank]}-{peer}")) for peer in peers}
        receives = {peer: _Ring(_pinned(f"{names[peer]}-{rank}")) for peer in peers}
        self._rings = Rings(rank, size, sends, receives, queues)
        dist.barrier(group)
        for peer in peers:  # the mappings keep the memory; nothing is left behind if the job dies
            Path(f"{names[rank]}-{peer}").unlink()

    def __call__(self, target: Tensor, source: Tensor, arrives: list[int], sends: list[int]) -> Transfer:
        """Start to send rows to and receive rows from each rank; asynchronous to the current stream.

        Args:
            target, source: [rows, ...] contiguous, by rank; nothing for this rank.
            arrives, sends: rows from and for each rank.
        """
        now = torch.cuda.current_stream()
        self.out.wait_stream(now)
        self.into.wait_stream(now)
        source.record_stream(self.out)
        target.record_stream(self.into)
        outs, ins = _spans(source, sends), _spans(target, arrives)
        self._rings.exchange(self.out.cuda_stream, self.into.cuda_stream, outs, ins)
        return Transfer(self.into.record_event())


def _spans(rows: Tensor, counts: list[int]) -> list[tuple[int, int]]:
    """Address and bytes of the rows of each rank."""
    width = rows.stride(0) * rows.element_size() if len(rows) else 0
    ends = list(accumulate(counts))
    return [(rows.data_ptr() + (end - n) * width, n * width) for n, end in zip(counts, ends, strict=True)]


def _pinned(path: str) -> Tensor:
    """A shared file as pinned memory [bytes]."""
    with Path(path).open("r+b") as file:
        memory = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)
    status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(status):
        raise RuntimeError(f"pinning {memory.numel()} bytes failed with CUDA error {int(status)}")
    return memory
