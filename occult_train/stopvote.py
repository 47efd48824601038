"""Stopping all ranks in the same step."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from occult_train.faults import StopSignal


class StopVote:
    """Whether any rank was asked to stop, known to all in the same step. The answer is one step late, so that nothing
    waits for it."""

    def __init__(self, signal: StopSignal, device: torch.device) -> None:
        self.signal, self.device = signal, device
        self._pending: tuple[Tensor, Any] | None = None

    def agreed(self) -> bool:
        """Collective: last step's vote; casts this step's."""
        before = self._pending
        vote = torch.tensor([int(self.signal.requested)], device=self.device)
        self._pending = (vote, dist.all_reduce(vote, dist.ReduceOp.MAX, async_op=True))
        if before is None:
            return False
        before[1].wait()
        return bool(before[0].item())
