"""Where rows are packed, sent and merged: on the computing stream, or on one of their own beside it.

Memory is safe without `record_stream` by these rules. What the computing stream made and the other reads (`aside`'s
`held`, and what an exchange holds) is held until the computing stream has waited for the other (`join`). What the
other made and the computing stream reads may be freed at once: it is made anew only within `aside`, which begins by
waiting for all that the computing stream was given. And where `aside` waits for what came before a `mark` alone, the
computing stream was given nothing since then that reads what the other made.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


class Lane:
    """The computing stream itself. `BesideLane` is the other."""

    apart = False
    """Whether what is launched `aside` may run beside what is launched after it."""

    def mark(self) -> Any:
        """What the computing stream was given so far, for `aside`."""

    @contextmanager
    def aside(self, *held: Tensor, after: Any = None) -> Iterator[None]:
        """Launch on the lane, after all that the computing stream was given, or that it was given before the mark.

        Args:
            held: what the computing stream made and is read here.
        """
        yield

    def join(self) -> None:
        """Let the computing stream wait for all that was launched aside."""


HERE = Lane()


class BesideLane(Lane):
    """A stream of its own on a GPU; on CPU, where collectives alone run beside the computation, nothing more."""

    apart = True

    def __init__(self) -> None:
        self.stream = _stream(torch.cuda.current_device()) if torch.cuda.is_available() else None
        self._held: list[Tensor] = []

    def mark(self) -> Any:
        """As `Lane.mark`."""
        return None if self.stream is None else torch.cuda.current_stream().record_event()

    @contextmanager
    def aside(self, *held: Tensor, after: Any = None) -> Iterator[None]:
        """As `Lane.aside`."""
        if self.stream is None:
            yield
            return
        self._held += held
        self.stream.wait_event(after or torch.cuda.current_stream().record_event())
        with torch.cuda.stream(self.stream):
            yield

    def join(self) -> None:
        """As `Lane.join`."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
            self._held.clear()


@lru_cache
def _stream(device: int) -> torch.cuda.Stream:
    """One for all layers. Before others: its kernels are short, and what the computing stream does can wait for them
    while it waits for none."""
    return torch.cuda.Stream(device, priority=-1)
