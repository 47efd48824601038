"""Dispatchers: how token rows reach the devices of their experts and come back merged.

A dispatcher is a plain class with `dispatch(x, slots, weights) -> Dispatched` and `combine(rows, dispatched) -> y`.
All give the same result; they differ in what crosses the network.

T tokens, H width, K experts a token, D devices, L experts a device, R received rows, M experts a received row.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from occult_train.kernels.reindex.reference import RowIndex, device_rows, row_experts
from occult_train.kernels.rows.autograd import gather, gather_sum
from occult_train.parallel.all_to_all import ExchangePlan, all_to_all, exchange, exchange_counts, home_first
from occult_train.parallel.grid import Grid
from occult_train.parallel.traffic import Traffic


@dataclass(frozen=True)
class Dispatched:
    """Rows that arrived on this device, and what `combine` needs to send their results home."""

    rows_RH: Tensor
    ids_RM: Tensor
    """[R, M] int64, local expert ids of each row, -1 padded."""
    weights_RM: Tensor
    """[R, M] routing weights of those experts, differentiable."""
    index: RowIndex | None
    plan: ExchangePlan | None


class Dispatcher(Protocol):
    """What the MoE layer asks of a dispatcher."""

    traffic: Traffic

    def dispatch(self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Dispatched:
        """Bring rows to the devices that hold their experts."""
        ...

    def combine(self, rows_RH: Tensor, dispatched: Dispatched) -> Tensor:
        """Bring merged rows home and sum them: [R, H] -> [T, H]."""
        ...


class LocalDispatcher:
    """All experts live here; nothing moves."""

    def __init__(self) -> None:
        self.traffic = Traffic()

    def dispatch(self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Dispatched:
        """Every token is its own row, with its K experts."""
        return Dispatched(x_TH, slots_TK, weights_TK, None, None)

    def combine(self, rows_RH: Tensor, dispatched: Dispatched) -> Tensor:
        """The rows are the tokens."""
        return rows_RH


class DedupDispatcher:
    """Occult's dispatch: one row per (token, device), merged over the device's experts before it returns.

    Rows sent in dispatch and in combine's backward: the sum over own tokens of |devices(t) minus home|; in combine and
    in dispatch's backward, exactly the rows received.
    """

    def __init__(self, grid: Grid, local_experts: int) -> None:
        self.traffic = Traffic()
        self.grid, self.local = grid, local_experts
        self.order = home_first(grid.expert_rank, grid.expert_size)

    def dispatch(self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Dispatched:
        """Steps 2 to 4 of Occult's forward: index, gather, exchange rows with their experts and weights."""
        index, counts_D = device_rows(slots_TK // self.local, self.order)
        ids_SM, row_TK, column_TK = row_experts(index, slots_TK, self.order, self.local)
        weights_SM = weights_TK.new_zeros(ids_SM.shape).index_put((row_TK, column_TK), weights_TK)
        return self._send(gather(x_TH, index), ids_SM, weights_SM, index, counts_D)

    def combine(self, rows_RH: Tensor, dispatched: Dispatched) -> Tensor:
        """Steps 8 and 9: rows go back the way they came; home sums them."""
        assert dispatched.plan is not None
        assert dispatched.index is not None
        (back_SH,) = all_to_all(dispatched.plan.reversed(), self.traffic, "combine", rows_RH)
        return gather_sum(back_SH, dispatched.index)

    def _send(self, rows: Tensor, ids: Tensor, weights: Tensor, index: RowIndex, counts: Tensor) -> Dispatched:
        plan = exchange_counts(counts, self.grid.expert_group, self.grid.expert_rank)
        received_ids = exchange(ids.to(torch.int32), plan, self.traffic, "dispatch").to(torch.int64)
        received, received_weights = all_to_all(plan, self.traffic, "dispatch", rows, weights)
        return Dispatched(received, received_ids, received_weights, index, plan)


class AllToAllDispatcher(DedupDispatcher):
    """The baseline of plain expert parallelism: one row per (token, expert), K copies of a token."""

    def dispatch(self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Dispatched:
        """Every assignment is a row of its own, with one expert."""
        tokens, k = slots_TK.shape
        index, counts_D = device_rows(slots_TK.reshape(-1, 1) // self.local, self.order)
        assignment_S = index.row_to_source
        rows_TK = index.source_to_rows.amax(dim=1).view(tokens, k)  # each assignment has one row; the rest are -1
        copies = RowIndex(assignment_S // k, rows_TK)
        ids_S1 = (slots_TK.reshape(-1) % self.local)[assignment_S, None]
        weights_S1 = weights_TK.reshape(-1)[assignment_S, None]
        return self._send(gather(x_TH, copies), ids_S1, weights_S1, copies, counts_D)


def make_dispatcher(name: str, grid: Grid, local_experts: int) -> Dispatcher:
    """Build the dispatcher `local`, `all_to_all` or `dedup`.

    Raises:
        ValueError: an unknown name, or `local` with experts on several ranks.
    """
    if name == "local":
        if grid.expert_size > 1:
            raise ValueError(f"the local dispatcher needs expert_size=1, got {grid.expert_size}")
        return LocalDispatcher()
    kinds = {"all_to_all": AllToAllDispatcher, "dedup": DedupDispatcher}
    if name not in kinds:
        raise ValueError(f"unknown dispatcher {name!r}")
    return kinds[name](grid, local_experts)
