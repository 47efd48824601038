"""Uneven all-to-all of rows within an expert-parallel group, with gradients and counts.

Rows are laid out *home first*: the rank's own rows, then those of the other ranks in ascending order. Own rows are
copied and never enter the collective.
"""

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
        return ExchangePlan(self.group, self.rank, self.receive_counts, self.send_counts)


def home_first(rank: int, size: int) -> list[int]:
    """Device order of all layouts here: `rank`, then the others ascending. home_first(1, 3) == [1, 0, 2]."""
    return [rank] + [d for d in range(size) if d != rank]


def exchange_counts(counts: Tensor, group: Any, rank: int) -> ExchangePlan:
    """Tell every rank how many rows it will get.

    Args:
        counts: [D] int64, rows for each device, home first.
        group: expert-parallel process group.
        rank: this rank's index in `group`.
    """
    size = counts.numel()
    order = torch.tensor(home_first(rank, size), device=counts.device)
    by_rank = torch.empty_like(counts)
    by_rank[order] = counts
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, by_rank, group=group)
    return ExchangePlan(group, rank, counts.tolist(), received[order].tolist())


def _in_rank_order(counts: list[int], rank: int) -> list[int]:
    """Split sizes for the collective: home-first counts in rank order, the home entry zero."""
    splits = counts[1:]
    splits.insert(rank, 0)
    return splits


def exchange(x: Tensor, plan: ExchangePlan, traffic: Traffic, name: str) -> Tensor:
    """Move rows without gradients: [rows_in, ...] home first -> [rows_out, ...] home first."""
    if x.shape[0] != plan.rows_in:
        raise ValueError(f"{x.shape[0]} rows given, the plan sends {plan.rows_in}")
    own, x = plan.send_counts[0], x.contiguous()
    out = x.new_empty((plan.rows_out, *x.shape[1:]))
    out[:own] = x[:own]
    remote = x[own:]
    dist.all_to_all_single(
        out[own:],
        remote,
        _in_rank_order(plan.receive_counts, plan.rank),
        _in_rank_order(plan.send_counts, plan.rank),
        group=plan.group,
    )
    traffic.add_bytes(name, remote.numel() * remote.element_size())
    return out


class _Exchange(torch.autograd.Function):
    """Rows and whatever travels beside them, forth in forward and back in backward, always in the same order.

    One function for all tensors of a pass keeps the order of collectives equal on all ranks in backward too.
    """

    @staticmethod
    def forward(ctx: Any, plan: ExchangePlan, traffic: Traffic, name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.plan, ctx.traffic, ctx.name = plan, traffic, name
        traffic.add_rows(name, sum(plan.send_counts[1:]), sum(plan.receive_counts[1:]))
        return tuple(exchange(t, plan, traffic, name) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        name, back = f"{ctx.name}_backward", ctx.plan.reversed()
        ctx.traffic.add_rows(name, sum(back.send_counts[1:]), sum(back.receive_counts[1:]))
        # plan, traffic and name take no gradient
        return None, None, None, *(exchange(g, back, ctx.traffic, name) for g in grads)


def all_to_all(plan: ExchangePlan, traffic: Traffic, name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Exchange several [rows_in, ...] tensors, the first of them the token rows, differentiably.

    Args:
        name: pass to count under, `dispatch` or `combine`; backward counts under `<name>_backward`.
    """
    return _Exchange.apply(plan, traffic, name, *tensors)
