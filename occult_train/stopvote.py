"""Stopping all ranks in the same step."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from occult_train.faults import StopSignal
from occult_train.moe.routes import HostCopy


class StopVote:
    """Whether any rank was asked to stop, known to all in the same step. The answer is one step late, so that a host
    can be a step ahead of its device."""

    def __init__(self, signal: StopSignal, device: torch.device) -> None:
        self.signal, self.device = signal, device
        self._aside = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pending: Callable[[], bool] | None = None

    def agreed(self) -> bool:
        """Collective: last step's vote; casts this step's."""
        before, self._pending = self._pending, self._cast()
        return before is not None and before()

    def _cast(self) -> Callable[[], bool]:
        """The answer, when called. It waits for the vote alone, not for what the device was given since."""
        vote = torch.zeros(1, dtype=torch.int32, device=self.device).fill_(int(self.signal.requested))
        work = dist.all_reduce(vote, dist.ReduceOp.MAX, async_op=True)
        if self._aside is None:

            def wait() -> bool:
                work.wait()
                return bool(vote.item())

            return wait
        with torch.cuda.stream(self._aside):
            work.wait()
            copied = HostCopy()(vote)
        vote.record_stream(self._aside)
        return lambda: bool(copied().item())
