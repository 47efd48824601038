"""Dispatchers: how token rows reach the devices of their experts and come back merged.

A dispatcher is a plain class with `dispatch(x, slots, weights) -> Dispatched` and `combine(rows, dispatched) -> y`.
All give the same result; they differ in what crosses the network. `send` and `send_back` are the same two without
waiting for the rows; each returns what waits.

T tokens, H width, K experts a token, D devices, L experts a device, R received rows, M experts a received row.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from occult_train.kernels.reindex.reference import RowIndex, device_rows, row_experts
from occult_train.kernels.rows.autograd import gather, gather_sum
from occult_train.parallel.all_to_all import ExchangePlan, exchange_counts, home_first, launch, start
from occult_train.parallel.grid import Grid
from occult_train.parallel.traffic import Traffic


@dataclass(frozen=True)
class Hop:
    """One exchange on the way out."""

    index: RowIndex
    """Which row before it each of its rows is a copy of."""
    plan: ExchangePlan


@dataclass(frozen=True)
class Dispatched:
    """Rows that arrived on this device, and what `combine` needs to send their results home."""

    rows_RH: Tensor
    ids_RM: Tensor
    """[R, M] int64, local expert ids of each row, -1 padded."""
    weights_RM: Tensor
    """[R, M] routing weights of those experts, differentiable."""
    hops: tuple[Hop, ...] = ()
    """In the order in which they were taken."""


class Dispatcher(Protocol):
    """What the MoE layer asks of a dispatcher."""

    traffic: Traffic

    def dispatch(self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Dispatched:
        """Bring rows to the devices that hold their experts."""
        ...

    def combine(self, rows_RH: Tensor, dispatched: Dispatched) -> Tensor:
        """Bring merged rows home and sum them: [R, H] -> [T, H]."""
        ...

    def send(self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Callable[[], Dispatched]:
        """Begin `dispatch`; call what is returned once to end it."""
        ...

    def send_back(self, rows_RH: Tensor, dispatched: Dispatched) -> Callable[[], Tensor]:
        """Begin `combine`; call what is returned once to end it."""
        ...


class LocalDispatcher:
    """All experts live here; nothing moves."""

    def __init__(self) -> None:
        self.traffic = Traffic()

    def dispatch(self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Dispatched:
        """Every token is its own row, with its K experts."""
        return Dispatched(x_TH, slots_TK, weights_TK)

    def combine(self, rows_RH: Tensor, dispatched: Dispatched) -> Tensor:
        """The rows are the tokens."""
        return rows_RH

    def send(self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Callable[[], Dispatched]:
        """Nothing is under way."""
        dispatched = self.dispatch(x_TH, slots_TK, weights_TK)
        return lambda: dispatched

    def send_back(self, rows_RH: Tensor, dispatched: Dispatched) -> Callable[[], Tensor]:
        """Nothing is under way."""
        return lambda: rows_RH


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
        return self.send(x_TH, slots_TK, weights_TK)()

    def combine(self, rows_RH: Tensor, dispatched: Dispatched) -> Tensor:
        """Steps 8 and 9: rows go back the way they came; home sums them."""
        return self.send_back(rows_RH, dispatched)()

    def send(self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Callable[[], Dispatched]:
        """As `Dispatcher.send`. Only the numbers of rows are waited for."""
        index, counts_D = device_rows(slots_TK // self.local, self.order)
        ids_SM, row_TK, column_TK = row_experts(index, slots_TK, self.order, self.local)
        weights_SM = weights_TK.new_zeros(ids_SM.shape).index_put((row_TK, column_TK), weights_TK)
        return self._send(gather(x_TH, index), ids_SM, weights_SM, index, counts_D)

    def send_back(self, rows_RH: Tensor, dispatched: Dispatched) -> Callable[[], Tensor]:
        """As `Dispatcher.send_back`: rows go back the way they came, and are summed where they came from."""
        *before, last = dispatched.hops
        receive = start(last.plan.reversed(), self.traffic, "combine", rows_RH)

        def end() -> Tensor:
            (back_SH,) = receive()
            rows_RH = gather_sum(back_SH, last.index)
            for hop in reversed(before):
                (back_SH,) = start(hop.plan.reversed(), self.traffic, "combine", rows_RH)()
                rows_RH = gather_sum(back_SH, hop.index)
            return rows_RH

        return end

    def _send(
        self, rows: Tensor, ids: Tensor, weights: Tensor, index: RowIndex, counts: Tensor
    ) -> Callable[[], Dispatched]:
        plan = exchange_counts(counts, self.grid.expert_group, self.grid.expert_rank, self.grid.node_size)
        return self._exchange(rows, ids, weights, Hop(index, plan))

    def _exchange(self, rows: Tensor, ids: Tensor, weights: Tensor, hop: Hop) -> Callable[[], Dispatched]:
        coming_ids, ids_work = launch(ids.to(torch.int32), hop.plan, self.traffic, "dispatch")
        receive = start(hop.plan, self.traffic, "dispatch", rows, weights)

        def end() -> Dispatched:
            ids_work.wait()
            received, received_weights = receive()
            return Dispatched(received, coming_ids.to(torch.int64), received_weights, (hop,))

        return end


class AllToAllDispatcher(DedupDispatcher):
    """The baseline of plain expert parallelism: one row per (token, expert), K copies of a token."""

    def send(self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Callable[[], Dispatched]:
        """As `Dispatcher.send`: every assignment is a row of its own, with one expert."""
        tokens, k = slots_TK.shape
        index, counts_D = device_rows(slots_TK.reshape(-1, 1) // self.local, self.order)
        assignment_S = index.row_to_source
        rows_TK = index.source_to_rows.amax(dim=1).view(tokens, k)  # each assignment has one row; the rest are -1
        copies = RowIndex(assignment_S // k, rows_TK)
        ids_S1 = (slots_TK.reshape(-1) % self.local)[assignment_S, None]
        weights_S1 = weights_TK.reshape(-1)[assignment_S, None]
        return self._send(gather(x_TH, copies), ids_S1, weights_S1, copies, counts_D)


class HierarchicalDispatcher(DedupDispatcher):
    """One row per (token, node), to the rank of the sender's place there, which fans it out to the node's devices and
    merges what they return before it goes back.

    Rows between nodes in each of the four exchanges: the sum over tokens of |nodes(t) minus home|.
    """

    def __init__(self, grid: Grid, local_experts: int) -> None:
        super().__init__(grid, local_experts)
        self.node, self.place = divmod(grid.expert_rank, grid.node_size)
        self.nodes_first = home_first(self.node, grid.nodes)
        self.places_first = home_first(self.place, grid.node_size)

    def send(self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Callable[[], Dispatched]:
        """As `Dispatcher.send`: the steps of Occult's dispatch with a node for a device, and when the rows are there,
        again inside the node."""
        local = self.local * self.grid.node_size
        index, counts_J = device_rows(slots_TK // local, self.nodes_first)
        ids_SN, row_TK, column_TK = row_experts(index, slots_TK, self.nodes_first, local)
        weights_SN = weights_TK.new_zeros(ids_SN.shape).index_put((row_TK, column_TK), weights_TK)
        plan = exchange_counts(counts_J, self.grid.across_group, self.node, per_node=1)
        on_node = self._exchange(gather(x_TH, index), ids_SN, weights_SN, Hop(index, plan))
        return lambda: self._fan_out(on_node())

    def _fan_out(self, on_node: Dispatched) -> Dispatched:
        """One row for each device of this node that a row needs."""
        slots_RN = on_node.ids_RM
        device_RN = torch.where(slots_RN >= 0, slots_RN, slots_RN[:, :1]) // self.local  # a row has an expert at least
        index, counts_G = device_rows(device_RN, self.places_first)
        ids_SM, weights_SM = _share_out(index, slots_RN, on_node.weights_RM, device_RN, self.places_first, self.local)
        plan = exchange_counts(counts_G, self.grid.inside_group, self.place)
        there = self._exchange(gather(on_node.rows_RH, index), ids_SM, weights_SM, Hop(index, plan))()
        return replace(there, hops=on_node.hops + there.hops)


def _share_out(
    index: RowIndex, slots_RN: Tensor, weights_RN: Tensor, device_RN: Tensor, order: list[int], local: int
) -> tuple[Tensor, Tensor]:
    """As `row_experts` for rows that have up to N experts: local ids and weights of each new row, -1 and 0 padded.

    Args:
        index: from `device_rows` of device_RN.
        slots_RN: [R, N] -1 for none.
        device_RN: [R, N] of each slot; where there is none, of another one of the row.
    """
    wide = min(slots_RN.shape[1], local)
    position_G = torch.tensor(order, device=slots_RN.device).argsort()
    row_RN = index.source_to_rows.gather(1, position_G[device_RN])
    valid_RN = slots_RN >= 0
    before_RNN = (device_RN[:, :, None] == device_RN[:, None, :]) & valid_RN[:, None, :]
    # what is no expert goes to a column behind the last one
    column_RN = torch.where(valid_RN, before_RNN.tril(-1).sum(2), wide)
    ids_SM = slots_RN.new_full((index.row_to_source.numel(), wide + 1), -1)
    ids_SM[row_RN, column_RN] = slots_RN % local
    weights_SM = weights_RN.new_zeros(ids_SM.shape).index_put((row_RN, column_RN), weights_RN)
    return ids_SM[:, :wide], weights_SM[:, :wide]


def make_dispatcher(name: str, grid: Grid, local_experts: int) -> Dispatcher:
    """Build the dispatcher `local`, `all_to_all`, `dedup` or `hierarchical`.

    Raises:
        ValueError: an unknown name, `local` with experts on several ranks, or `hierarchical` without nodes.
    """
    if name == "local":
        if grid.expert_size > 1:
            raise ValueError(f"the local dispatcher needs expert_size=1, got {grid.expert_size}")
        return LocalDispatcher()
    kinds = {"all_to_all": AllToAllDispatcher, "dedup": DedupDispatcher, "hierarchical": HierarchicalDispatcher}
    if name not in kinds:
        raise ValueError(f"unknown dispatcher {name!r}")
    if name == "hierarchical" and grid.inside_group is None:
        raise ValueError(
            f"the hierarchical dispatcher needs several nodes of several ranks; expert_size={grid.expert_size} is on "
            f"{grid.nodes} of {grid.node_size}"
        )
    return kinds[name](grid, local_experts)
