"""Host memory between a live model and the files of its checkpoint: bounded, and used again by the next one."""

import queue
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from occult_train.checkpoint.shards import ShardWriter

BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Segment:
    """Bytes of a block that belong to a tensor; a large tensor lies in several blocks."""

    writer: ShardWriter
    name: str
    start: int
    end: int


@dataclass
class Block:
    """Some bytes that were copied and are not yet written."""

    data_B: Tensor
    """[B] uint8 of the host, pinned where there is a GPU."""
    segments: list[Segment] = field(default_factory=list)
    copied: torch.cuda.Event | None = None
    """When the copies from the GPU have come."""

    @property
    def used(self) -> int:
        """Bytes that are taken."""
        return self.segments[-1].end if self.segments else 0

    def write(self) -> None:
        """Append the segments to their files. Raises OSError if the disk does not take them."""
        if self.copied is not None:
            self.copied.synchronize()
        data = memoryview(self.data_B.numpy())
        for segment in self.segments:
            segment.writer.append(segment.name, data[segment.start : segment.end])
        for writer in dict.fromkeys(segment.writer for segment in self.segments):
            writer.flush()


class Blocks:
    """Equal blocks, made when first needed and then used again.

    Args:
        limit: bytes of all of them together, at most.
    """

    def __init__(self, limit: int) -> None:
        self.size = min(BLOCK_BYTES, limit)
        self._left = limit // self.size
        self._free: queue.SimpleQueue[Block] = queue.SimpleQueue()
        self.bytes = 0
        """Of all blocks made so far."""

    def take(self) -> Block | None:
        """An empty block, or None while all are in use."""
        try:
            return self._free.get_nowait()
        except queue.Empty:
            if not self._left:
                return None
        self._left -= 1
        self.bytes += self.size
        return Block(torch.empty(self.size, dtype=torch.uint8, pin_memory=torch.cuda.is_available()))

    def wait(self) -> Block:
        """An empty block, once one has been written."""
        return self._free.get()

    def give(self, block: Block) -> None:
        """Take a block back."""
        block.segments, block.copied = [], None
        self._free.put(block)


class Copier:
    """Fills blocks with tensors, one after the other.

    Args:
        blocks: where to take them from.
        full: takes those that are full.
        begin: is called once somebody is to write them: when all blocks are in use, or nothing more comes. Writing
            before that would only slow the copying.
    """

    def __init__(self, blocks: Blocks, full: "queue.SimpleQueue[Block | None]", begin: Callable[[], None]) -> None:
        self._blocks, self._full, self._begin = blocks, full, begin
        self._block: Block | None = None
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self._before: torch.cuda.Event | None = None
        self.waited = False
        """Whether all blocks were in use at a time."""

    def put(self, writer: ShardWriter, name: str, value: Tensor) -> None:
        """Copy a tensor, which may be freed then, and changed after `finish`. Waits for a block to be written where all
        are in use."""
        rest_B = value.detach().float().contiguous().view(-1).view(torch.uint8)
        if self._stream is not None and rest_B.is_cuda:
            self._stream.wait_stream(torch.cuda.current_stream())
            rest_B.record_stream(self._stream)
        while True:
            block = self._with_room()
            start, room = block.used, self._blocks.size - block.used
            part_B, rest_B = rest_B[:room], rest_B[room:]
            self._copy(block.data_B[start : start + len(part_B)], part_B)
            block.segments.append(Segment(writer, name, start, start + len(part_B)))
            if not len(rest_B):
                break
        if self._stream is not None:
            if self._before is not None:
                self._before.synchronize()  # else a fast link gathers more than the host has taken, without bound
            self._before = self._stream.record_event()

    def _copy(self, target_B: Tensor, source_B: Tensor) -> None:
        if self._stream is None or not source_B.is_cuda:
            target_B.copy_(source_B)
            return
        with torch.cuda.stream(self._stream):
            target_B.copy_(source_B, non_blocking=True)

    def _with_room(self) -> Block:
        if self._block is not None and self._block.used == self._blocks.size:
            self._hand_over()
        if self._block is None:
            self._block = self._blocks.take()
        if self._block is None:
            if not self.waited:
                self._begin()
            self.waited = True
            self._block = self._blocks.wait()
        return self._block

    def _hand_over(self) -> None:
        if self._block is not None:
            self._block.copied = self._stream.record_event() if self._stream is not None else None
            self._full.put(self._block)
            self._block = None

    def finish(self) -> None:
        """No more comes. What the GPU computes from now on may change what was put."""
        self._hand_over()
        self._full.put(None)
        if not self.waited:
            self._begin()
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
