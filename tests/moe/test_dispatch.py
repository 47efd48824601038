"""Dispatchers on real ranks: results and gradients of one process, who receives what, and what enters the network.

The ranks only measure; every assertion is made here, where the data of all ranks lies side by side.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from occult_train.kernels.experts.reference import experts
from occult_train.moe.dispatch import AllToAllDispatcher, DedupDispatcher, LocalDispatcher, make_dispatcher
from occult_train.parallel.all_to_all import home_first
from occult_train.parallel.grid import Grid
from occult_train.parallel.traffic import PASSES, Traffic
from occult_train.testing import RankError, requires_gpus, run_distributed

HIDDEN, FFN = 8, 5
LAYOUTS = ((2, 2), (3, 3), (4, 4), (4, 2), (8, 8))
"""Ranks, and expert-parallel size; with 4 ranks and size 2 there are two groups, whose ranks are not global ranks. More
than 4 ranks are slow."""
REMOTE = ("all_to_all", "dedup")


@dataclass(frozen=True)
class Case:
    """Tokens of every rank and how they choose. `tokens` and `k` may depend on ranks and experts."""

    name: str
    tokens: Callable[[int, int], int]
    """Of (rank, ranks)."""
    local: int = 3
    k: int = 2
    """0 takes every expert."""
    allowed: Callable[[int, int], range] = lambda devices, local: range(devices * local)
    """Slots that tokens choose from."""
    permuted: bool = False
    """Whether experts live in shuffled slots."""

    def experts(self, devices: int) -> int:
        return devices * self.local

    def expert_to_slot(self, devices: int) -> Tensor:
        count = self.experts(devices)
        generator = torch.Generator().manual_seed(99)
        return torch.randperm(count, generator=generator) if self.permuted else torch.arange(count)


CASES = {
    case.name: case
    for case in (
        Case("random", lambda rank, ranks: 11 + rank, k=3),
        Case("permuted", lambda rank, ranks: 12, k=3, permuted=True),
        Case("one_rank_without_tokens", lambda rank, ranks: 0 if rank == ranks - 1 else 9),
        Case("tokens_on_one_rank", lambda rank, ranks: 9 if rank == 1 else 0),
        Case("no_tokens", lambda rank, ranks: 0),
        Case("all_to_one_device", lambda rank, ranks: 6, k=3, allowed=lambda devices, local: range(local)),
        Case("all_to_one_expert", lambda rank, ranks: 6, k=1, allowed=lambda devices, local: range(1)),
        Case("device_without_rows", lambda rank, ranks: 10, allowed=lambda d, local: range((d - 1) * local)),
        Case("prime", lambda rank, ranks: (7, 13, 101, 1, 17, 2, 3, 11)[rank], k=3),
        Case("k_1", lambda rank, ranks: 8, k=1),
        Case("k_all", lambda rank, ranks: 5, k=0),
        Case("l_1", lambda rank, ranks: 8, local=1),
    )
}


@dataclass(frozen=True)
class Tokens:
    """One rank's input."""

    x_TH: Tensor
    experts_TK: Tensor
    slots_TK: Tensor
    weights_TK: Tensor
    factor_TH: Tensor
    """The loss is sum(y * factor)."""

    def to(self, device: torch.device) -> "Tokens":
        return Tokens(*(getattr(self, field.name).to(device) for field in fields(self)))


def make_tokens(case: Case, rank: int, ranks: int, devices: int) -> Tokens:
    """The same for whoever asks. Weights of a token sum to 1."""
    generator = torch.Generator().manual_seed(1000 * ranks + 10 * devices + rank)
    tokens, allowed = case.tokens(rank, ranks), case.allowed(devices, case.local)
    k = case.k or case.experts(devices)
    slots_TK = torch.rand(tokens, len(allowed), generator=generator).argsort(dim=1)[:, :k] + allowed.start
    slot_to_expert = case.expert_to_slot(devices).argsort()
    weights_TK = torch.rand(tokens, k, dtype=torch.float64, generator=generator) + 0.1
    x_TH, factor_TH = (torch.randn(tokens, HIDDEN, dtype=torch.float64, generator=generator) for _ in range(2))
    return Tokens(x_TH, slot_to_expert[slots_TK], slots_TK, weights_TK / weights_TK.sum(1, keepdim=True), factor_TH)


def make_experts(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """w1, w2, w3 of all experts, by expert id."""
    generator = torch.Generator().manual_seed(7)
    shapes = ((count, FFN, HIDDEN), (count, HIDDEN, FFN), (count, FFN, HIDDEN))
    w1, w2, w3 = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    return w1, w2, w3


def stamp(tokens: Tokens, rank: int) -> tuple[Tensor, Tensor]:
    """Rows that say (rank, token), and weights that say (rank, token, k); exact in fp64."""
    count, k = tokens.slots_TK.shape
    x_TH = torch.zeros(count, HIDDEN, dtype=torch.float64)
    x_TH[:, 0], x_TH[:, 1] = rank + 1, torch.arange(count) + 1
    token_k = 1000.0 * (torch.arange(count)[:, None] + 1) + torch.arange(k)
    return x_TH, (1e6 * (rank + 1) + token_k).double()


@dataclass(frozen=True)
class Call:
    """What one collective was given."""

    data: Tensor
    send: list[int] | None
    receive: list[int] | None

    @property
    def bytes(self) -> int:
        return self.data.numel() * self.data.element_size()


OTHERS = (
    *("all_to_all", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "broadcast", "gather"),
    *("reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "send", "isend", "batch_isend_irecv"),
)
"""Ways to send something past the record."""


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Note every all_to_all_single that really happens, and let nothing else happen."""
    calls: list[Call] = []
    original = dist.all_to_all_single
    others = {name: getattr(dist, name) for name in OTHERS}

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("something was sent through another collective")

    def record(output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        receive, send = (args[i] if len(args) > i else None for i in range(2))
        calls.append(Call(input.detach().cpu().clone(), send, receive))
        return original(output, input, *args, **kwargs)

    dist.all_to_all_single = record
    for name in OTHERS:
        setattr(dist, name, refuse)
    try:
        yield calls
    finally:
        dist.all_to_all_single = original
        for name, other in others.items():
            setattr(dist, name, other)


@dataclass(frozen=True)
class Result:
    """What one rank measured with one dispatcher."""

    y_TH: Tensor
    gradients: dict[str, Tensor]
    """Of x, weights, and this rank's stacks w1, w2, w3."""
    calls: dict[str, list[Call]]
    """Collectives of each pass."""
    traffic: Traffic
    received: tuple[Tensor, Tensor, Tensor]
    """Rows, ids and weights that arrived when rows and weights were stamped."""
    undone: Tensor
    """`combine` of the stamped rows as they arrived."""
    averaged: Tensor
    """`combine` of the rows times the sum of their weights: experts that return what they get."""


def measure(case: Case, name: str, rank: int, ranks: int, grid: Grid) -> Result:
    """Run one case with one dispatcher on this rank, cut before and after the experts to tell the passes apart."""
    devices = grid.expert_size
    device = torch.device("cuda", rank) if dist.get_backend() == "nccl" else torch.device("cpu")
    grid, local = (Grid(), case.experts(devices)) if name == "local" else (grid, case.local)
    dispatcher = make_dispatcher(name, grid, local)
    tokens = make_tokens(case, rank, ranks, devices).to(device)
    mine = case.expert_to_slot(devices).argsort()[grid.expert_rank * local :][:local]
    x_TH, weights_TK = tokens.x_TH.requires_grad_(), tokens.weights_TK.requires_grad_()
    w1, w2, w3 = (w[mine].to(device).requires_grad_() for w in make_experts(case.experts(devices)))

    calls = {}
    with recorded() as calls["dispatch"]:
        sent = dispatcher.dispatch(x_TH, tokens.slots_TK, weights_TK)
    rows = experts(sent.rows_RH, sent.ids_RM, sent.weights_RM, w1, w2, w3)
    cut = rows.detach().requires_grad_()
    with recorded() as calls["combine"]:
        y_TH = dispatcher.combine(cut, sent)
    with recorded() as calls["combine_backward"]:
        (y_TH * tokens.factor_TH).sum().backward()
    with recorded() as calls["dispatch_backward"]:
        rows.backward(cut.grad)
    traffic = dispatcher.traffic.drain()
    leaves = {"x": x_TH, "weights": weights_TK, "w1": w1, "w2": w2, "w3": w3}
    gradients = {key: leaf.grad.cpu() for key, leaf in leaves.items() if leaf.grad is not None}

    with torch.no_grad():
        stamped_x_TH, stamped_weights_TK = (stamped.to(device) for stamped in stamp(tokens, rank))
        stamped = dispatcher.dispatch(stamped_x_TH, tokens.slots_TK, stamped_weights_TK)
        undone = dispatcher.combine(stamped.rows_RH, stamped)
        row_weight = torch.where(sent.ids_RM >= 0, sent.weights_RM, 0).sum(1, keepdim=True)
        averaged = dispatcher.combine(sent.rows_RH * row_weight, sent)
    received = (stamped.rows_RH.cpu(), stamped.ids_RM.cpu(), stamped.weights_RM.cpu())
    return Result(y_TH.detach().cpu(), gradients, calls, traffic, received, undone.cpu(), averaged.cpu())


Results = dict[tuple[int, str, str], Result]
"""By expert-parallel size, case and dispatcher."""


def measure_all(rank: int, ranks: int, sizes: list[int]) -> Results:
    """Everything one rank has to say."""
    results = {}
    for size in sizes:
        grid = Grid.create(size)
        for case in CASES.values():
            for name in ("local", *REMOTE):
                results[size, case.name, name] = measure(case, name, rank, ranks, grid)
    return results


@cache
def run(ranks: int) -> list[Results] | RankError:
    """`measure_all` of every rank; one start of the processes serves all tests, a failed one too."""
    try:
        return run_distributed(measure_all, ranks, ranks, [size for r, size in LAYOUTS if r == ranks], timeout=300)
    except RankError as error:
        return error


@dataclass(frozen=True)
class Outcome:
    """A case with one dispatcher over all ranks."""

    case: Case
    name: str
    ranks: int
    devices: int
    results: list[Result]

    def tokens(self, rank: int) -> Tokens:
        return make_tokens(self.case, rank, self.ranks, self.devices)

    def group(self, rank: int) -> list[int]:
        """Ranks that share a set of experts with this rank; the place in the list is the device."""
        size = 1 if self.name == "local" else self.devices
        return list(range(rank - rank % size, rank - rank % size + size))

    def copies(self, rank: int) -> list[list[int]]:
        """The devices that rows of each token go to, home included, one entry a row."""
        devices_TK = (self.tokens(rank).slots_TK // self.case.local).tolist()
        return devices_TK if self.name == "all_to_all" else [sorted(set(row)) for row in devices_TK]

    def remote_rows(self, rank: int) -> list[int]:
        """How many rows a rank sends to each device of its group; none to its own."""
        flat = [device for row in self.copies(rank) for device in row]
        return [0 if d == rank % self.devices else flat.count(d) for d in range(self.devices)]

    def remote_rows_received(self, rank: int) -> list[int]:
        """How many rows come from each device of the group."""
        return [self.remote_rows(sender)[rank % self.devices] for sender in self.group(rank)]


def outcome(layout: tuple[int, int], case: str, name: str) -> Outcome:
    ranks, devices = layout
    found = run(ranks)
    if isinstance(found, RankError):
        raise found
    return Outcome(CASES[case], name, ranks, devices, [result[devices, case, name] for result in found])


each_layout = pytest.mark.parametrize(
    "layout",
    [pytest.param(layout, marks=pytest.mark.slow if layout[0] > 4 else ()) for layout in LAYOUTS],
    ids=lambda layout: f"{layout[0]}ranks_ep{layout[1]}",
)
each_case = pytest.mark.parametrize("case", CASES)
each_dispatcher = pytest.mark.parametrize("name", ["local", *REMOTE])
each_remote = pytest.mark.parametrize("name", REMOTE)


@cache
def reference(
    layout: tuple[int, int], case: str, group: tuple[int, ...]
) -> tuple[list[Tensor], list[dict[str, Tensor]], dict[str, Tensor]]:
    """y and token gradients of each rank of the group, and expert gradients summed over them, by expert id.

    A plain loop over all experts in one process: each computes all tokens, those that did not choose it with weight 0.
    """
    ranks, devices = layout
    outputs, gradients = [], []
    stacks = [w.requires_grad_() for w in make_experts(CASES[case].experts(devices))]
    for rank in group:
        tokens = make_tokens(CASES[case], rank, ranks, devices)
        x_TH, weights_TK = tokens.x_TH.requires_grad_(), tokens.weights_TK.requires_grad_()
        y_TH = torch.zeros_like(x_TH)
        for e, (w1, w2, w3) in enumerate(zip(*stacks, strict=True)):
            weight_T = (weights_TK * (tokens.experts_TK == e)).sum(dim=1)
            y_TH = y_TH + weight_T[:, None] * ((F.silu(x_TH @ w1.T) * (x_TH @ w3.T)) @ w2.T)
        (y_TH * tokens.factor_TH).sum().backward()
        outputs.append(y_TH.detach())
        gradients.append({"x": x_TH.grad, "weights": weights_TK.grad})
    return outputs, gradients, {f"w{i}": w.grad for i, w in enumerate(stacks, start=1)}


def relative(got: Tensor, expected: Tensor) -> float:
    """‖got - expected‖ / ‖expected‖; the plain norm where the reference is zero."""
    assert got.shape == expected.shape
    return float((got - expected).norm()) / (float(expected.norm()) or 1.0)


def loop_received(out: Outcome, rank: int) -> list[tuple[list[float], list[int], list[float]]]:
    """Stamp, ids and weights of every row that must arrive at a rank, in order."""
    device, local = rank % out.devices, out.case.local
    width = 1 if out.name == "all_to_all" else min(out.tokens(rank).slots_TK.shape[1], local)
    rows = []
    for sender_device in home_first(device, out.devices):
        sender = out.group(rank)[sender_device]
        tokens = out.tokens(sender)
        x_TH, weights_TK = stamp(tokens, sender)
        lines = zip(x_TH.tolist(), tokens.slots_TK.tolist(), weights_TK.tolist(), strict=True)
        for x, slots, weights in lines:
            here = [(s % local, w) for s, w in zip(slots, weights, strict=True) if s // local == device]
            parts = [[one] for one in here] if out.name == "all_to_all" else [here] if here else []
            for part in parts:
                ids = [e for e, _ in part] + [-1] * (width - len(part))
                rows.append((x, ids, [w for _, w in part]))
    return rows


@each_layout
@each_case
@each_dispatcher
def test_result_and_gradients_are_those_of_one_process(layout: tuple[int, int], case: str, name: str) -> None:
    out = outcome(layout, case, name)
    for rank, got in enumerate(out.results):
        group = out.group(rank)
        outputs, gradients, stacks = reference(layout, case, tuple(group))
        place = group.index(rank)
        local = out.case.experts(out.devices) // len(group)
        mine = out.case.expert_to_slot(out.devices).argsort()[place * local :][:local]
        expected = gradients[place] | {key: grad[mine] for key, grad in stacks.items()}
        # measured at most 5.7e-16
        assert relative(got.y_TH, outputs[place]) < 1e-14
        assert got.gradients.keys() == expected.keys()
        for key, grad in expected.items():
            assert relative(got.gradients[key], grad) < 1e-14, (rank, key)


@each_layout
@each_case
@each_remote
def test_what_arrives_where(layout: tuple[int, int], case: str, name: str) -> None:
    """Rows are stamped with sender and token, weights also with k."""
    out = outcome(layout, case, name)
    for rank, result in enumerate(out.results):
        rows_RH, ids_RM, weights_RM = result.received
        expected = loop_received(out, rank)
        assert rows_RH.tolist() == [stamped for stamped, _, _ in expected], rank
        assert ids_RM.tolist() == [ids for _, ids, _ in expected], rank
        got = [row[: len(weights)] for row, (_, _, weights) in zip(weights_RM.tolist(), expected, strict=True)]
        assert got == [weights for _, _, weights in expected], rank


@each_layout
@each_case
@each_dispatcher
def test_combine_undoes_dispatch(layout: tuple[int, int], case: str, name: str) -> None:
    """A token comes home once for each of its rows, and once in all if its rows are weighted."""
    out = outcome(layout, case, name)
    for rank, result in enumerate(out.results):
        tokens = out.tokens(rank)
        x_TH, _ = stamp(tokens, rank)
        copies = torch.tensor([1 if name == "local" else len(row) for row in out.copies(rank)]).view(-1, 1)
        assert torch.equal(result.undone, x_TH * copies)
        # measured at most 5.7e-16
        assert relative(result.averaged, tokens.x_TH) < 1e-14


@each_layout
@each_case
@each_remote
def test_no_own_row_enters_a_collective(layout: tuple[int, int], case: str, name: str) -> None:
    """Every collective carries exactly the rows for other devices, and returns exactly those that came from them."""
    out = outcome(layout, case, name)
    for rank, result in enumerate(out.results):
        sent, received = out.remote_rows(rank), out.remote_rows_received(rank)
        for name_of_pass in PASSES:
            forth = name_of_pass in ("dispatch", "combine_backward")
            send, receive = (sent, received) if forth else (received, sent)
            calls = [call for call in result.calls[name_of_pass] if call.send is not None]
            assert calls, name_of_pass
            for call in calls:
                assert (call.send, call.receive) == (send, receive), (rank, name_of_pass)
                assert call.data.shape[0] == sum(send), (rank, name_of_pass)
            # one of them holds the rows: as many numbers as sum(send) rows have
            width = sum(call.data.numel() for call in calls)
            assert width >= sum(send) * HIDDEN, (rank, name_of_pass)


@each_layout
@each_case
@each_remote
def test_only_the_split_sizes_travel_unsplit(layout: tuple[int, int], case: str, name: str) -> None:
    """The only collective without split sizes tells the split sizes: D numbers, once, in dispatch."""
    for result in outcome(layout, case, name).results:
        unsplit = {key: [c for c in calls if c.send is None] for key, calls in result.calls.items()}
        assert [call.data.shape for call in unsplit.pop("dispatch")] == [(layout[1],)]
        assert not any(unsplit.values())


@each_layout
@each_case
@each_remote
def test_traffic_counts_what_was_sent(layout: tuple[int, int], case: str, name: str) -> None:
    out = outcome(layout, case, name)
    for rank, result in enumerate(out.results):
        sent, received = sum(out.remote_rows(rank)), sum(out.remote_rows_received(rank))
        back = {"combine": received, "dispatch_backward": received}
        forth = {"dispatch": sent, "combine_backward": sent}
        assert result.traffic.rows_sent == forth | back
        assert result.traffic.rows_received == {key: sent for key in back} | {key: received for key in forth}
        split = {key: [call for call in calls if call.send is not None] for key, calls in result.calls.items()}
        assert result.traffic.bytes_sent == {key: sum(call.bytes for call in calls) for key, calls in split.items()}


@each_layout
@each_case
@each_remote
def test_all_four_passes_move_the_same_rows_in_total(layout: tuple[int, int], case: str, name: str) -> None:
    traffics = [result.traffic for result in outcome(layout, case, name).results]
    totals = {sum(traffic.rows_sent[key] for traffic in traffics) for key in PASSES}
    assert totals == {sum(traffic.rows_received[key] for traffic in traffics) for key in PASSES}
    assert len(totals) == 1


@each_layout
@each_case
def test_dedup_never_sends_more_than_all_to_all(layout: tuple[int, int], case: str) -> None:
    """And less, wherever a token has two experts on another device."""
    few, many = (
        sum(result.traffic.rows_sent["dispatch"] for result in outcome(layout, case, name).results)
        for name in ("dedup", "all_to_all")
    )
    assert few <= many
    if case in ("random", "prime", "k_all", "all_to_one_device"):
        assert few < many


@each_layout
@each_case
def test_local_sends_nothing(layout: tuple[int, int], case: str) -> None:
    for result in outcome(layout, case, "local").results:
        assert not any(result.calls.values())
        assert not any(result.traffic.rows_sent.values())
        assert not any(result.traffic.bytes_sent.values())


@pytest.mark.gpu
@requires_gpus(2)
def test_nccl_does_what_gloo_does() -> None:
    """Arrivals, rows and bytes are the same; results and gradients are those of the same sums on another machine."""
    gloo, nccl = run(2), run_distributed(measure_all, 2, 2, [2], backend="nccl")
    assert not isinstance(gloo, RankError)
    for expected_by_case, got_by_case in zip(gloo, nccl, strict=True):
        assert got_by_case.keys() == expected_by_case.keys()
        for key, expected in expected_by_case.items():
            got = got_by_case[key]
            assert got.traffic == expected.traffic, key
            for name in PASSES:
                sizes = [[(c.data.shape, c.send, c.receive) for c in r.calls[name]] for r in (got, expected)]
                assert sizes[0] == sizes[1], (key, name)
            assert all(map(torch.equal, got.received, expected.received)), key
            assert relative(got.y_TH, expected.y_TH) < 1e-13, key
            for name, gradient in expected.gradients.items():
                assert relative(got.gradients[name], gradient) < 1e-13, (key, name)


def test_draining_traffic_starts_again_from_zero() -> None:
    traffic = Traffic()
    traffic.add_rows("combine", 3, 5)
    traffic.add_rows("combine", 1, 1)
    traffic.add_bytes("combine", 64)
    taken = traffic.drain()
    assert (taken.rows_sent["combine"], taken.rows_received["combine"], taken.bytes_sent["combine"]) == (4, 6, 64)
    assert traffic == Traffic()
    assert tuple(traffic.rows_sent) == PASSES


def test_make_dispatcher_builds_what_is_named() -> None:
    grid = Grid(world_size=2, expert_size=2)
    assert type(make_dispatcher("local", Grid(), 4)) is LocalDispatcher
    assert type(make_dispatcher("dedup", grid, 4)) is DedupDispatcher
    assert type(make_dispatcher("all_to_all", grid, 4)) is AllToAllDispatcher


def test_make_dispatcher_refuses_local_experts_on_several_ranks_and_unknown_names() -> None:
    with pytest.raises(ValueError, match="the local dispatcher needs expert_size=1, got 2"):
        make_dispatcher("local", Grid(world_size=2, expert_size=2), 4)
    with pytest.raises(ValueError, match="unknown dispatcher 'dedupe'"):
        make_dispatcher("dedupe", Grid(), 4)


def test_home_first_orders() -> None:
    assert home_first(1, 3) == [1, 0, 2]
    assert [home_first(rank, 2) for rank in range(2)] == [[0, 1], [1, 0]]
    assert home_first(0, 1) == [0]
