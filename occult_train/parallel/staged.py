"""All-to-all between the GPUs of one host through pinned host memory, moved by copy engines alone.

For hosts whose GPUs cannot reach each other's memory. NCCL then copies through host memory too, but with kernels: they
take multiprocessors from the computation beside them, and reach less than half of what the copy engines do.

Each ordered pair of ranks has a ring of pinned slots in shared memory, a counter of pieces written and one of pieces
read. The sender's stream waits for a free slot, copies out and raises the first; the receiver's stream waits for that,
copies in and raises the second. The waiting is done by the GPU's own queues (stream memory operations), not the host.
In step k every rank sends to the rank k places on and receives from the one k places back, so rings that fill up
cannot wait in a circle.
"""

import ctypes
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from occult_train.parallel.grid import Grid

SLOT_BYTES = 8 * 2**20
SLOTS = 8
"""Slots of a ring. 64 MB hold what a rank sends to another in most passes, so that senders seldom wait."""
HEADER = 4096
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
    """One direction between two ranks, as either of them sees it."""

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.pieces = memory, 0
        self.written, self.read = memory.data_ptr() + WRITTEN, memory.data_ptr() + READ

    def next(self) -> tuple[int, Tensor]:
        """Number of the next piece, counted from 1, and its slot."""
        start = HEADER + self.pieces % SLOTS * SLOT_BYTES
        self.pieces += 1
        return self.pieces, self.memory[start : start + SLOT_BYTES]


class HostAllToAll:
    """`all_to_all_single` of an expert-parallel group on one host. Making one is collective over the group."""

    def __init__(self, grid: Grid) -> None:
        self.rank, self.size, group = grid.expert_rank, grid.expert_size, grid.expert_group
        driver = ctypes.CDLL("libcuda.so.1")
        self._wait_value, self._write_value = driver.cuStreamWaitValue32_v2, driver.cuStreamWriteValue32_v2
        for function in (self._wait_value, self._write_value):
            function.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
        self.out, self.into = torch.cuda.Stream(), torch.cuda.Stream()
        names: list[Any] = [None] * self.size
        dist.all_gather_object(names, f"/dev/shm/occult-{os.getpid()}-{id(self)}", group=group)
        peers = [p for p in range(self.size) if p != self.rank]
        for peer in peers:
            Path(f"{names[self.rank]}-{peer}").write_bytes(bytes(HEADER + SLOTS * SLOT_BYTES))
        dist.barrier(group)
        self._sends = {peer: _Ring(_pinned(f"{names[self.rank]}-{peer}")) for peer in peers}
        self._receives = {peer: _Ring(_pinned(f"{names[peer]}-{self.rank}")) for peer in peers}
        dist.barrier(group)
        for peer in peers:  # the mappings keep the memory; nothing is left behind if the job dies
            Path(f"{names[self.rank]}-{peer}").unlink()

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
        from_bytes, to_bytes = _by_rank(source, sends), _by_rank(target, arrives)
        for step in range(1, self.size):
            with torch.cuda.stream(self.out):
                self._send((self.rank + step) % self.size, from_bytes)
            with torch.cuda.stream(self.into):
                self._receive((self.rank - step) % self.size, to_bytes)
        return Transfer(self.into.record_event())

    def _send(self, peer: int, parts: list[Tensor]) -> None:
        ring = self._sends[peer]
        for piece in parts[peer].split(SLOT_BYTES):
            number, slot = ring.next()
            self._wait(self.out, ring.read, number - SLOTS)
            slot[: piece.numel()].copy_(piece, non_blocking=True)
            self._write(self.out, ring.written, number)

    def _receive(self, peer: int, parts: list[Tensor]) -> None:
        ring = self._receives[peer]
        for piece in parts[peer].split(SLOT_BYTES):
            number, slot = ring.next()
            self._wait(self.into, ring.written, number)
            piece.copy_(slot[: piece.numel()], non_blocking=True)
            self._write(self.into, ring.read, number)

    def _wait(self, stream: torch.cuda.Stream, address: int, value: int) -> None:
        """Hold the stream until the counter is at least `value`; cyclic, so it may wrap."""
        _checked(self._wait_value(stream.cuda_stream, address, value % 2**32, 0))

    def _write(self, stream: torch.cuda.Stream, address: int, value: int) -> None:
        _checked(self._write_value(stream.cuda_stream, address, value % 2**32, 0))


def _checked(status: int) -> None:
    if status:
        raise RuntimeError(f"a stream memory operation failed with CUDA error {status}")


def _by_rank(rows: Tensor, counts: list[int]) -> list[Tensor]:
    """The bytes for each rank."""
    width = rows[0].numel() * rows.element_size() if len(rows) else 0
    return list(rows.reshape(-1).view(torch.uint8).split([count * width for count in counts]))


def _pinned(path: str) -> Tensor:
    """A shared file as pinned memory [bytes]."""
    with Path(path).open("r+b") as file:
        memory = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)
    status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(status):
        raise RuntimeError(f"pinning {memory.numel()} bytes failed with CUDA error {int(status)}")
    return memory
