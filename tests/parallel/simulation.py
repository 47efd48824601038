"""The queues of GPUs in ordinary memory: streams whose operations are executed in any order among each other."""

import ctypes
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

PICKS: dict[str, Callable[[list[int]], int]] = {
    "first rank first": min,
    "last rank first": max,
    **{f"random {seed}": random.Random(seed).choice for seed in range(8)},
}
"""Which of the streams that can go on does."""


@dataclass
class SimulatedQueues:
    """Streams that execute in order, in any order among each other; takes the place of the driver.

    A stream is a number. Slots named in `full` are watched: none may be written before it was read, nor read before it
    was written.
    """

    streams: dict[int, deque[tuple[str, int, int, int]]] = field(default_factory=dict)
    full: dict[int, bool] = field(default_factory=dict)
    """Whether what lies in the slot at an address has yet to be read."""
    most_full: int = 0

    def wait(self, stream: int, address: int, value: int) -> None:
        self._add(stream, "wait", address, value, 0)

    def write(self, stream: int, address: int, value: int) -> None:
        self._add(stream, "write", address, value, 0)

    def copy(self, stream: int, target: int, source: int, nbytes: int) -> None:
        self._add(stream, "copy", target, source, nbytes)

    def meet(self, stream: int, there: Sequence[int], here: Sequence[int], value: int) -> None:
        for address in there:
            self.write(stream, address, value)
        for address in here:
            self.wait(stream, address, value)

    def _add(self, stream: int, *operation: object) -> None:
        self.streams.setdefault(stream, deque()).append(operation)  # type: ignore[arg-type]

    def run(self, pick: Callable[[list[int]], int]) -> None:
        """Execute everything; `pick` says which of the streams that can go on does. Fails if none can."""
        while any(self.streams.values()):
            ready = [stream for stream, queue in self.streams.items() if queue and self._can_start(queue[0])]
            assert ready, f"all wait for each other: {[queue[0] for queue in self.streams.values() if queue]}"
            self._execute(*self.streams[pick(ready)].popleft())

    def _can_start(self, operation: tuple[str, int, int, int]) -> bool:
        """A counter is reached if it is less than half a turn ahead, as the driver compares."""
        kind, address, value, _ = operation
        return kind != "wait" or (counter(address).value - value) % 2**32 < 2**31

    def _execute(self, kind: str, first: int, second: int, nbytes: int) -> None:
        if kind == "write":
            counter(first).value = second % 2**32
        elif kind == "copy":
            if first in self.full:
                assert not self.full[first], "a slot is overwritten before it was read"
                self.full[first] = True
            if second in self.full:
                assert self.full[second], "a slot is read before it was written"
                self.full[second] = False
            self.most_full = max(self.most_full, sum(self.full.values()))
            ctypes.memmove(first, second, nbytes)


def counter(address: int) -> ctypes.c_uint32:
    return ctypes.c_uint32.from_address(address)
