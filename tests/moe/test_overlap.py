"""The schedule of shortcut experts: which gap, in what order, and that the order changes no bit and stops no rank."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fused_problems import MappedBox
from torch import Tensor

from occult_train.kernels.grouped_matmul import outer, rows
from occult_train.moe.fused import Way
from occult_train.moe.layer import MoELayer, MoEOptions
from occult_train.moe.overlap import CHUNKS, MEASURED, WARMUP, Schedule, Times, best_gap, run_window
from occult_train.moe.placement import Placement
from occult_train.moe.routes import Room
from occult_train.parallel.grid import Grid
from occult_train.testing import requires_gpus, run_distributed

# --- which gap


def crossed(times: Times, gap: int) -> float:
    """When the last of it is done, event by event: rows cross from the start, and back once experts are done."""
    now = sum(times.window[:gap])
    now = max(now, times.dispatch) + times.experts
    return max(now + times.combine, now + sum(times.window[gap:]))


@pytest.mark.parametrize(
    ("times", "gap"),
    [
        (Times(1.0, 5.0, 1.0, (1.0, 1.0)), 1),
        (Times(3.0, 1.0, 0.5, (1.0, 2.0, 1.0)), 2),
        (Times(0.1, 1.0, 3.0, (1.0, 2.0, 1.0)), 1),
        (Times(9.0, 1.0, 0.0, (1.0, 1.0)), 2),
        (Times(0.0, 1.0, 9.0, (1.0, 1.0)), 0),
    ],
    ids=["even", "slow dispatch", "slow combine", "dispatch alone", "combine alone"],
)
def test_the_gap_that_exposes_least_is_chosen(times: Times, gap: int) -> None:
    assert best_gap(times) == gap
    for other in range(len(times.window) + 1):
        assert times.taken(other) == pytest.approx(crossed(times, other))
        assert times.taken(gap) <= times.taken(other)


def test_both_directions_decide_and_the_slower_one_prevails() -> None:
    forward = Times(3.0, 1.0, 0.0, (1.0, 2.0))
    backward = Times(9.0, 1.0, 0.0, (1.0, 8.0))  # dy crosses while what follows the experts is computed
    assert best_gap(forward) == 2
    assert best_gap(forward, backward) == 1
    assert best_gap(forward, Times(0.0, 1.0, 9.0, (1.0, 8.0))) == 2


def test_of_equal_gaps_the_one_with_most_slack_is_taken() -> None:
    assert best_gap(Times(1.0, 1.0, 1.0, (2.0, 2.0, 2.0, 2.0))) == 2
    assert best_gap(Times(1.0, 1.0, 2.5, (2.0, 2.0, 2.0, 2.0))) == 2
    assert best_gap(Times(1.0, 1.0, 5.0, (2.0, 2.0, 2.0, 2.0))) == 1


def test_a_gap_that_the_window_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="gaps 0 to 2, not 3"):
        Schedule("3", ("attention", "shared expert"))


# --- in what order


class _Spoken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, log: list[str], name: str) -> Tensor:
        ctx.log, ctx.name = log, name
        log.append(name)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.log.append(ctx.name)
        return grad, None, None


class _Watched:
    def __init__(self, log: list[str], work: Any) -> None:
        self.log, self.work = log, work

    def wait(self) -> None:
        self.log.append("wait")
        self.work.wait()


@contextmanager
def all_to_alls(log: list[str]) -> Iterator[None]:
    """Note when one is sent without waiting, and when it is waited for."""
    original = dist.all_to_all_single

    def record(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        work = original(*args, async_op=async_op, **kwargs)
        if async_op:
            log.append("send")
        return _Watched(log, work) if async_op else work

    dist.all_to_all_single = record
    try:
        yield
    finally:
        dist.all_to_all_single = original


def make_layer(grid: Grid, way: Way | None, dispatcher: str = "dedup", experts: int = 8, top_k: int = 2) -> MoELayer:
    layer = MoELayer(
        MoEOptions(8, 12, experts, top_k, dispatcher=dispatcher, way=way), grid, Placement.contiguous(experts)
    )
    generator = torch.Generator().manual_seed(5)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return layer


def tell_order(rank: int, ways: list[Way | None], folder: Path) -> list[tuple[list[str], list[str]]]:
    """For each way and gap, with operators launched slowly and quickly, what happened in forward and in backward; a run
    of sends or waits is told once."""
    MappedBox.install(folder)
    grid, found = Grid.create(2), []
    for way, gap, quick in product(ways, range(4), (False, True)):
        layer, log = make_layer(grid, way), []
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        layer.experts.register_forward_pre_hook(lambda *_, log=log: log.append("experts"))
        schedule = Schedule(str(gap), ("a", "b", "c"), quick=quick)
        window = [lambda h, log=log, name=name: _Spoken.apply(h, log, name) for name in "abc"]
        with all_to_alls(log):
            h, y = run_window(schedule, layer, layer.choose(x), x, window)
            forward = once(log)
            log.clear()
            (h + y).sum().backward()
        found.append((forward, once(log)))
    return found


def once(log: list[str]) -> list[str]:
    return [word for at, word in enumerate(log) if at == 0 or word != log[at - 1]]


def test_rows_are_sent_early_and_waited_for_late_in_both_directions(tmp_path: Path) -> None:
    """The fused layer sends behind the first operator, which the device computes while the host waits for counts; and
    behind all that come before the experts if they are launched quickly."""
    ways = [None, Way("triton", "collective", 0)]
    for found in run_distributed(tell_order, 2, ways, tmp_path):
        cases = product(ways, range(4), (False, True))
        for (way, gap, quick), (forward, backward) in zip(cases, found, strict=True):
            before, after = list("abc")[:gap], list("abc")[gap:]
            early = 0 if way is None else gap if quick else min(gap, 1)
            out = [*before[:early], "send", *before[early:]]
            compute = ["wait", "experts", "send"] if way is None else ["experts", "wait", "send"]
            assert forward == [*out, *compute, *after, "wait"], (way, gap, quick)
            assert backward == ["send", *after[::-1], "wait", "send", *before[::-1], "wait"], (way, gap, quick)


# --- that it changes no bit and stops no rank


def problem(rank: int, tokens: list[int], aim: str, hidden: int = 8, experts: int = 8) -> tuple[Tensor, Tensor]:
    """x, and logits: anywhere, or all tokens at the last device's experts."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(tokens[rank], hidden, generator=generator)
    logits = torch.randn(tokens[rank], experts, generator=generator)
    logits[:, : experts - experts // len(tokens)] -= 20 * (aim == "last device")
    return x.requires_grad_(), logits.requires_grad_()


def linear(seed: int, delay: float = 0.0) -> Any:
    """An operator with a weight, slow in both directions."""
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)).requires_grad_()

    def apply(h: Tensor) -> Tensor:
        time.sleep(delay)
        out = h @ weight
        if out.requires_grad:
            out.register_hook(lambda grad: time.sleep(delay))
        return out

    return apply, weight


def results(rank: int, setting: str, way: Way | None, dispatcher: str, tokens: list[int], aim: str) -> list[Tensor]:
    """Output and all gradients of this rank, of each pass of those whose room is guessed (the first time not, then
    rightly, then wrongly), else of the last; every rank is slow somewhere else."""
    layer = make_layer(Grid.create(len(tokens)), way, dispatcher)
    x, logits = problem(rank, tokens, aim)
    operators = [linear(number, 0.02 * (number == rank)) for number in range(3)]
    schedule = Schedule(setting, ("a", "b", "c"), 0 if way is None else way.chunks, quick=setting in ("2", "auto"))
    guessed, found = layer.fused is not None and layer.fused.transport.one_sided, []
    for turn in range(WARMUP + MEASURED + 1 if setting == "auto" else 3 if guessed else 1):
        if guessed and turn == 2:
            layer.fused.room = Room(1, 1)
        for tensor in (x, logits, *layer.parameters(), *(weight for _, weight in operators)):
            tensor.grad = None
        chosen = layer.choose(x, logits)
        h, y = run_window(schedule, layer, chosen, x, [apply for apply, _ in operators])
        (h.square().sum() + (h * y).sum() + chosen.routing.z).backward()
        schedule.settle()
        gradients = [t.grad for t in (x, logits, *layer.experts.parameters(), *(weight for _, weight in operators))]
        found = [*(found if guessed else []), y.detach(), *gradients]
    if setting == "auto":
        assert schedule.gaps[True] in range(4)
        assert not schedule.timing
    return found


Case = tuple[Way | None, str, list[int], str]
PLAIN: list[Case] = [
    (None, dispatcher, tokens, aim)
    for dispatcher in ("dedup", "all_to_all")
    for tokens, aim in (([5, 7], "anywhere"), ([0, 3], "anywhere"), ([0, 0], "anywhere"), ([3, 5], "last device"))
]
FUSED: list[Case] = [
    (Way("triton", "collective", 0), "dedup", [3, 5], "anywhere"),
    (Way("triton", "collective", 0), "dedup", [0, 3], "last device"),
    (Way("triton", "collective", 2), "dedup", [2, 5], "anywhere"),
    (Way("triton", "symmetric", 0), "dedup", [3, 2], "anywhere"),
    (Way("triton", "symmetric", 0), "dedup", [0, 4], "last device"),
]
FOUR: list[Case] = [
    (None, "dedup", [3, 0, 7, 2], "anywhere"),
    (None, "all_to_all", [1, 2, 0, 5], "last device"),
    (Way("triton", "collective", 0), "dedup", [1, 0, 2, 1], "anywhere"),
]


def rank_differences(rank: int, cases: list[Case], settings: list[str], folder: Path) -> list[str]:
    """What of what the schedules give is not, to the bit, what comes of one step after the other."""
    MappedBox.install(folder)
    found = []
    for number, (way, dispatcher, tokens, aim) in enumerate(cases):
        one = results(rank, "none", way, dispatcher, tokens, aim)
        assert all(torch.isfinite(value).all() for value in one)
        for setting in settings if way is None else [settings[number % len(settings)]]:
            other = results(rank, setting, way, dispatcher, tokens, aim)
            equal = [torch.equal(a, b) for a, b in zip(one, other, strict=True)]
            found += [f"{(way, dispatcher, tokens, aim, setting)}: {equal}"] * (not all(equal))
    return found


@pytest.mark.parametrize("cases", [PLAIN, FUSED, FOUR], ids=["plain", "fused", "four ranks"])
def test_no_schedule_changes_a_bit_or_stops_a_rank(cases: list[Case], tmp_path: Path) -> None:
    """With ranks that have no tokens, one device that gets all of them, and each rank slow in another operator."""
    settings = ["0", "1", "2", "3", "auto"] if cases is PLAIN else ["1", "3", "2"]
    ranks = len(cases[0][2])
    for found in run_distributed(rank_differences, ranks, cases, settings, tmp_path, timeout=300):
        assert found == []


def frozen(rank: int, way: Way | None, folder: Path) -> list[bool]:
    """With inputs that need no gradient the experts still have theirs, and the other way about."""
    MappedBox.install(folder)
    grid, found = Grid.create(2), []
    for setting, thawed in product(("none", "1"), ("experts", "inputs")):
        layer = make_layer(grid, way)
        layer.requires_grad_(thawed == "experts")
        x, logits = problem(rank, [3, 4], "anywhere")
        x.requires_grad_(thawed == "inputs")
        operators = [linear(number)[0] for number in range(3)]
        h, y = run_window(Schedule(setting, ("a", "b", "c")), layer, layer.choose(x, logits.detach()), x, operators)
        (h * y).sum().backward()
        found.append([layer.experts.w1.grad, layer.experts.w2.grad, layer.experts.w3.grad, x.grad])
    for got in found:
        assert [value is None for value in got[:3]] == [got[3] is not None] * 3
    pairs = [
        (a, b) for one, other in ((found[0], found[2]), (found[1], found[3])) for a, b in zip(one, other, strict=True)
    ]
    return [torch.equal(a, b) for a, b in pairs if a is not None and b is not None]


@pytest.mark.parametrize("way", [None, Way("triton", "collective", 0)], ids=["plain", "fused"])
def test_what_is_frozen_has_no_gradient_and_the_rest_has(way: Way | None, tmp_path: Path) -> None:
    assert run_distributed(frozen, 2, way, tmp_path) == [[True] * 4] * 2


# --- what is measured


def measured(rank: int) -> tuple[list[str], dict[bool, int | None], int]:
    """Lines of `auto`, one of whose operators is slow: it is where rows should travel."""
    layer = make_layer(Grid.create(2), None)
    x, logits = problem(rank, [3, 5], "anywhere")
    operators = [linear(number, 0.03 * (number == 1))[0] for number in range(3)]
    schedule, lines = Schedule("auto", ("quick", "slow", "quick too"), 0, try_chunks=True), []
    schedule_steps = WARMUP + MEASURED + len(CHUNKS) * MEASURED + 1
    for _ in range(schedule_steps):
        h, y = run_window(schedule, layer, layer.choose(x, logits), x, operators)
        (h * y).sum().backward()
        lines.append(schedule.settle())
    return [line for line in lines if line], schedule.gaps, len(schedule.watches)


def test_auto_measures_chooses_alike_on_all_ranks_and_says_so() -> None:
    (lines, gaps, left), (others, other_gaps, _) = run_distributed(measured, 2)
    assert lines == others
    assert gaps == other_gaps
    assert left == 0
    assert lines[0].startswith(f"shortcut experts: in gap {gaps[True]} of 0 to 3 around quick, slow, quick too; ")
    words = lines[0].split("forward / backward ms: ")[1]
    times = {part.rsplit(" ", 3)[0]: [float(t) for t in part.split(" ")[-3::2]] for part in words.split(", ")}
    assert list(times) == ["dispatch", "experts", "combine", "quick", "slow", "quick too"]
    assert all(30 <= ms < 60 for ms in times["slow"])
    assert all(ms < 30 for name in ("experts", "quick", "quick too") for ms in times[name])


# --- on GPUs


def gpu_differences(rank: int, ways: list[Way]) -> list[str]:
    """Large rows, memory that is used again at once, and many passes: what is not waited for shows."""
    for settings in (rows.HOPPER, outer.HOPPER):
        del settings[1:]  # how fast they are is not the question here, and measuring it takes minutes
    grid, device, found = Grid.create(2), torch.device("cuda", rank), []
    hidden, tokens = 1024, 4099 + 1000 * rank
    for way in ways:
        with torch.device(device):
            options = MoEOptions(hidden, 1536, 16, 2, dispatcher="dedup", way=way)
            layer = MoELayer(options, grid, Placement.contiguous(16)).bfloat16()
        generator = torch.Generator(device).manual_seed(3)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
        weights = [torch.randn(hidden, hidden, device=device, generator=generator).bfloat16() / 32 for _ in range(3)]
        xs = [torch.randn(tokens, hidden, device=device).bfloat16().requires_grad_() for _ in range(2)]
        expected: dict[int, list[Tensor]] = {}
        for turn, setting in enumerate(("none", *"0123" * 3)):
            schedule = Schedule(setting, ("a", "b", "c"), way.chunks)
            if turn % 3 == 2:
                layer.fused.room = Room(64, 64)  # too little, where it is used
            for number, x in enumerate(xs):
                for tensor in (x, *layer.parameters()):
                    tensor.grad = None
                operators = [lambda h, w=w: torch.relu(h @ w) + h for w in weights]
                h, y = run_window(schedule, layer, layer.choose(x), x, operators)
                torch.empty(2**27, device=device).fill_(float("nan"))
                (h * y).float().square().mean().backward()
                got = [y.detach().clone(), x.grad, *(p.grad for p in layer.parameters())]
                same = [torch.equal(a, b) for a, b in zip(got, expected.setdefault(number, got), strict=True)]
                found += [f"{way}, gap {setting}: {same}"] * (not all(same))
    return found


@pytest.mark.gpu
@requires_gpus(2)
@pytest.mark.parametrize("transport", ["collective", "symmetric", "host"])
def test_two_gpus_compute_the_same_beside_a_window(transport: str) -> None:
    if transport == "symmetric" and not torch.cuda.can_device_access_peer(0, 1):
        pytest.skip("these GPUs cannot write each other's memory")
    ways = [Way("triton", transport, chunks) for chunks in ((0,) if transport == "symmetric" else (0, 2))]
    for found in run_distributed(gpu_differences, 2, ways, timeout=300, backend="nccl"):
        assert found == []
