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
from itertools import accumulate
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


class HostAllToAll:
    """`all_to_all_single` of an expert-parallel group on one host. Making one is collective over the group."""

    def __init__(self, grid: Grid) -> None:
        self.rank, self.size, group = grid.expert_rank, grid.expert_size, grid.expert_group
        driver = ctypes.CDLL("libcuda.so.1")
        self._wait_value, self._write_value = driver.cuStreamWaitValue32_v2, driver.cuStreamWriteValue32_v2
        for function in (self._wait_value, self._write_value):
            function.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
        self._copy_async = driver.cuMemcpyAsync
        self._copy_async.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
        self.out, self.into = torch.cuda.Stream(), torch.cuda.Stream()
        names: list[Any] = [None] * self.size
        dist.all_gather_object(names, f"{SHARED_MEMORY}/occult-{os.getpid()}-{id(self)}", group=group)
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
        outs, ins = _spans(source, sends), _spans(target, arrives)
        for step in range(1, self.size):
            to, sender = (self.rank + step) % self.size, (self.rank - step) % self.size
            self._send(self._sends[to], *outs[to])
            self._receive(self._receives[sender], *ins[sender])
        return Transfer(self.into.record_event())

    def _send(self, ring: _Ring, address: int, nbytes: int) -> None:
        """Copy memory out through the ring; piece n waits until piece n - SLOTS has been read."""
        stream = self.out.cuda_stream
        for start in range(0, nbytes, SLOT_BYTES):
            number, slot = ring.next()
            _checked(self._wait_value(stream, ring.read, (number - SLOTS) % 2**32, 0))
            _checked(self._copy_async(slot, address + start, min(SLOT_BYTES, nbytes - start), stream))
            _checked(self._write_value(stream, ring.written, number % 2**32, 0))

    def _receive(self, ring: _Ring, address: int, nbytes: int) -> None:
        """Copy memory in through the ring. Waiting is for a counter that is at least the value, cyclic: it may wrap."""
        stream = self.into.cuda_stream
        for start in range(0, nbytes, SLOT_BYTES):
            number, slot = ring.next()
            _checked(self._wait_value(stream, ring.written, number % 2**32, 0))
            _checked(self._copy_async(address + start, slot, min(SLOT_BYTES, nbytes - start), stream))
            _checked(self._write_value(stream, ring.read, number % 2**32, 0))


def _checked(status: int) -> None:
    if status:
        raise RuntimeError(f"a copy, or an operation on stream memory, failed with CUDA error {status}")


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
