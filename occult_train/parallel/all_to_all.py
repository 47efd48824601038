"""Uneven all-to-all of rows within an expert-parallel group, with gradients and counts.

Rows are laid out *home first*: the rank's own rows, then those of the other ranks in ascending order. Own rows are
copied and never enter the collective.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from occult_train.parallel.traffic import Traffic


@dataclass(frozen=True)
class ExchangePlan:
    """How many rows go where; both lists are home first, of length D."""

    group: Any
    rank: int
    send_counts: list[int]
    receive_counts: list[int]
    per_node: int
    """Consecutive ranks of the group that share a node."""

    @property
    def rows_in(self) -> int:
        """Rows held before the exchange."""
        return sum(self.send_counts)

    @property
    def rows_out(self) -> int:
        """Rows held after it."""
        return sum(self.receive_counts)

    def reversed(self) -> "ExchangePlan":
        """The plan that takes every row back to where it came from."""
        return ExchangePlan(self.group, self.rank, self.receive_counts, self.send_counts, self.per_node)

    def between_nodes(self) -> int:
        """Rows that go to ranks of other nodes."""
        order = home_first(self.rank, len(self.send_counts))
        node = self.rank // self.per_node
        return sum(count for rank, count in zip(order, self.send_counts, strict=True) if rank // self.per_node != node)


def home_first(rank: int, size: int) -> list[int]:
    """Device order of all layouts here: `rank`, then the others ascending. home_first(1, 3) == [1, 0, 2]."""
    return [rank] + [d for d in range(size) if d != rank]


def exchange_counts(counts: Tensor, group: Any, rank: int, per_node: int = 0) -> ExchangePlan:
    """Tell every rank how many rows it will get.

    Args:
        counts: [D] int64, rows for each device, home first.
        group: expert-parallel process group.
        rank: this rank's index in `group`.
        per_node: consecutive ranks of the group that share a node; 0 for all of them.
    """
    size = counts.numel()
    order = torch.tensor(home_first(rank, size), device=counts.device)
    by_rank = torch.empty_like(counts)
    by_rank[order] = counts
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, by_rank, group=group)
    return ExchangePlan(group, rank, counts.tolist(), received[order].tolist(), per_node or size)


def _in_rank_order(counts: list[int], rank: int) -> list[int]:
    """Split sizes for the collective: home-first counts in rank order, the home entry zero."""
    splits = counts[1:]
    splits.insert(rank, 0)
    return splits


def exchange(x: Tensor, plan: ExchangePlan, traffic: Traffic, name: str) -> Tensor:
    """Move rows without gradients: [rows_in, ...] home first -> [rows_out, ...] home first."""
    out, work = launch(x, plan, traffic, name)
    work.wait()
    return out


@dataclass(frozen=True)
class Work:
    """A collective under way, and the memory that it reads."""

    handle: Any
    source: Tensor

    def wait(self) -> None:
        """Until the rows are there: on CPU the caller waits, on a GPU its current stream."""
        self.handle.wait()


def launch(x: Tensor, plan: ExchangePlan, traffic: Traffic, name: str) -> tuple[Tensor, Work]:
    """As `exchange`, without waiting: where the rows will be [rows_out, ...] home first, and for what to wait."""
    if x.shape[0] != plan.rows_in:
        raise ValueError(f"{x.shape[0]} rows given, the plan sends {plan.rows_in}")
    own, x = plan.send_counts[0], x.contiguous()
    out = x.new_empty((plan.rows_out, *x.shape[1:]))
    out[:own] = x[:own]
    remote = x[own:]
    handle = dist.all_to_all_single(
        out[own:],
        remote,
        _in_rank_order(plan.receive_counts, plan.rank),
        _in_rank_order(plan.send_counts, plan.rank),
        group=plan.group,
        async_op=True,
    )
    traffic.add_bytes(name, remote.numel() * remote.element_size())
    return out, Work(handle, remote)


class _Passage:
    """Rows and whatever travels beside them, forth in forward and back in backward, always in the same order.

    Sent in one node of the graph and waited for in a later one; backward sends in the later one and waits in the
    earlier. What is computed between the two, in either direction, hides the way.
    """

    def __init__(self, plan: ExchangePlan, traffic: Traffic, name: str) -> None:
        self.plan, self.traffic, self.name = plan, traffic, name
        self._under_way: list[tuple[Tensor, Work]] = []

    def send(self, tensors: tuple[Tensor, ...], back: bool) -> None:
        """Start."""
        plan, name = (self.plan.reversed(), f"{self.name}_backward") if back else (self.plan, self.name)
        self.traffic.add_rows(name, sum(plan.send_counts[1:]), sum(plan.receive_counts[1:]), plan.between_nodes())
        self._under_way = [launch(t, plan, self.traffic, name) for t in tensors]

    def receive(self) -> tuple[Tensor, ...]:
        """Wait for what was sent last."""
        arrived, self._under_way = self._under_way, []
        for _, work in arrived:
            work.wait()
        return tuple(out for out, _ in arrived)


class _Send(torch.autograd.Function):
    """What it returns holds no values: it leads `_Receive`'s gradients here."""

    @staticmethod
    def forward(ctx: Any, passage: _Passage, *tensors: Tensor) -> Tensor:
        ctx.passage = passage
        passage.send(tensors, back=False)
        return tensors[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.passage.receive()  # passage


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, passage: _Passage, sent: Tensor) -> tuple[Tensor, ...]:
        ctx.passage = passage
        ctx.nothing = torch.empty_like(sent)
        return passage.receive()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        ctx.passage.send(grads, back=True)
        return None, ctx.nothing  # passage


def start(plan: ExchangePlan, traffic: Traffic, name: str, *tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Send several [rows_in, ...] tensors, the first of them the token rows, differentiably.

    Args:
        name: pass to count under, `dispatch` or `combine`; backward counts under `<name>_backward`.

    Returns:
        what waits for them and returns them [rows_out, ...]; to be called once.
    """
    passage = _Passage(plan, traffic, name)
    sent = _Send.apply(passage, *tensors)
    return lambda: _Receive.apply(passage, sent)
