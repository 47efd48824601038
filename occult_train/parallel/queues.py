"""What the queues (streams) of a GPU do by themselves: copies, flags that they set and wait for, and barriers of these.

Nothing of it occupies a multiprocessor, as a kernel that waits does.
"""

import ctypes
from collections.abc import Sequence
from typing import Protocol

WAIT, WRITE = 1, 2
"""CU_STREAM_MEM_OP_WAIT_VALUE_32 and CU_STREAM_MEM_OP_WRITE_VALUE_32."""


class Queues(Protocol):
    """Operations of streams, each asynchronous and in the stream's order. Counters are of 32 bits and may wrap."""

    def wait(self, stream: int, address: int, value: int) -> None:
        """Wait for a counter that is at least the value, cyclic."""

    def write(self, stream: int, address: int, value: int) -> None:
        """Set a counter, after all that came before in the stream."""

    def copy(self, stream: int, target: int, source: int, nbytes: int) -> None:
        """Copy between host and device memory."""

    def meet(self, stream: int, there: Sequence[int], here: Sequence[int], value: int) -> None:
        """Set the counters there, then wait for those here."""


class _Operation(ctypes.Structure):
    """CUstreamBatchMemOpParams."""

    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("rest", ctypes.c_uint64 * 2),
    )


class Driver:
    """`Queues` by the CUDA driver."""

    def __init__(self) -> None:
        driver = ctypes.CDLL("libcuda.so.1")
        self._wait, self._write = driver.cuStreamWaitValue32_v2, driver.cuStreamWriteValue32_v2
        for function in (self._wait, self._write):
            function.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
        self._copy = driver.cuMemcpyAsync
        self._copy.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
        self._batch = driver.cuStreamBatchMemOp_v2
        self._batch.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint]

    def wait(self, stream: int, address: int, value: int) -> None:
        """As `Queues.wait`."""
        _checked(self._wait(stream, address, value % 2**32, 0))

    def write(self, stream: int, address: int, value: int) -> None:
        """As `Queues.write`."""
        _checked(self._write(stream, address, value % 2**32, 0))

    def copy(self, stream: int, target: int, source: int, nbytes: int) -> None:
        """As `Queues.copy`."""
        _checked(self._copy(target, source, nbytes, stream))

    def meet(self, stream: int, there: Sequence[int], here: Sequence[int], value: int) -> None:
        """As `Queues.meet`."""
        value %= 2**32
        found = [_Operation(WRITE, a, value) for a in there] + [_Operation(WAIT, a, value) for a in here]
        _checked(self._batch(stream, len(found), (_Operation * len(found))(*found), 0))


class Meeting:
    """A barrier of GPUs that reach each other's memory: each sets a flag in all others and waits for its own."""

    def __init__(self, rank: int, flags_D: Sequence[int], queues: Queues) -> None:
        """flags_D: where D int32, zero at first, lie in each device's memory, as seen from here."""
        self.queues, self.number = queues, 0
        peers = [peer for peer in range(len(flags_D)) if peer != rank]
        self._there = [flags_D[peer] + 4 * rank for peer in peers]
        self._here = [flags_D[rank] + 4 * peer for peer in peers]

    def __call__(self, stream: int) -> None:
        """What comes next in the stream begins when all devices have come this far, and finds what they wrote."""
        self.number += 1
        self.queues.meet(stream, self._there, self._here, self.number)


def _checked(status: int) -> None:
    if status:
        raise RuntimeError(f"a copy, or an operation on stream memory, failed with CUDA error {status}")
