"""The schedule of shortcut-connected experts (ScMoE, arXiv 2404.05019): rows travel beside the window's computing.

The window is the n operators between where the shortcut begins and where the experts' output is added: of the two
attentions, the MLP and the shared expert those behind the shortcut. Tokens are routed and sent before it, the sums come
home after it, and the experts are computed in one of the n + 1 gaps around its operators; nothing computes beside
anything else. Gap k has k operators before it. Backward meets all of it from behind.

A step then takes, in forward, max(before_k, dispatch) + experts + max(after_k, combine), in backward the same with
backward's times and the two windows exchanged: dy crosses while what follows the experts is computed. `auto` measures
all of it in the first steps, one operation after the other, takes the gap of the least sum, and if rows are still
exposed then, tries to cut tokens in chunks whose crossing and computing overlap too.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from occult_train.moe.layer import Chosen, MoELayer
from occult_train.moe.stopwatch import Stopwatch

WARMUP, MEASURED = 2, 3
"""Steps that are not measured (kernels are compiled and tuned in them), and that are."""
CHUNKS = (0, 1, 2, 4)
"""What is tried where rows outlast the window: none; own tokens while the others' travel; and those cut in 2 or 4."""
EXPOSED = 0.02
"""Of a pair's time; less is no reason to try chunks."""
Operators = Sequence[Callable[[Any], Any]]
WAY = ("landed", "computed", "combined")
"""What is waited for in the experts' way."""


@dataclass(frozen=True)
class Times:
    """Milliseconds of one direction, each alone."""

    dispatch: float
    experts: float
    combine: float
    window: tuple[float, ...]
    """Operators in forward's order."""

    @classmethod
    def of(cls, parts: Sequence[float]) -> "Times":
        """From dispatch, experts, combine and the window's operators."""
        return cls(parts[0], parts[1], parts[2], tuple(parts[3:]))

    @property
    def parts(self) -> tuple[float, ...]:
        """The other way."""
        return self.dispatch, self.experts, self.combine, *self.window

    @property
    def computing(self) -> float:
        """Without rows on their way."""
        return self.experts + sum(self.window)

    @property
    def whole(self) -> float:
        """One after the other."""
        return self.dispatch + self.combine + self.computing

    def taken(self, gap: int) -> float:
        """With the experts in that gap. Of backward give the times by `mirrored`."""
        before, after = sum(self.window[:gap]), sum(self.window[gap:])
        return max(before, self.dispatch) + self.experts + max(after, self.combine)

    def slack(self, gap: int) -> float:
        """How much longer both crossings could be without being waited for; negative where they are."""
        return min(sum(self.window[:gap]) - self.dispatch, sum(self.window[gap:]) - self.combine)

    def mirrored(self) -> "Times":
        """Backward's times as forward's: what comes home goes out first there."""
        return Times(self.combine, self.experts, self.dispatch, self.window)


def best_gap(forward: Times, backward: Times | None = None) -> int:
    """The gap of the least time; of equal ones, that with most slack.

    Args:
        backward: as measured: `dispatch` is of dy.
    """
    directions = [forward] if backward is None else [forward, backward.mirrored()]
    return min(
        range(len(forward.window) + 1),
        key=lambda gap: (sum(t.taken(gap) for t in directions), -min(t.slack(gap) for t in directions)),
    )


class Schedule:
    """Where the shortcut-connected experts of a model are computed; the same in all its blocks and on all ranks."""

    def __init__(
        self, setting: str, window: Sequence[str], chunks: int = 0, try_chunks: bool = False, quick: bool = False
    ) -> None:
        """`auto`, `none` (one after the other) or the number of a gap.

        Args:
            window: names of the operators.
            chunks: of the fused layer; see `Way`.
            try_chunks: whether `auto` may choose another number.
            quick: whether operators are launched in no time, as CUDA graphs are.

        Raises:
            ValueError: the window has no such gap.
        """
        if setting.isdecimal() and int(setting) > len(window):
            raise ValueError(f"the window ({', '.join(window)}) has gaps 0 to {len(window)}, not {setting}")
        gap = int(setting) if setting.isdecimal() else None
        self.window, self.chunks, self.quick = tuple(window), chunks, quick
        self.gaps = {True: gap, False: gap}
        """For passes with gradients and without; None is one after the other."""
        self.watches: list[Stopwatch] = []
        self.timing = setting == "auto"
        """Whether passes are timed: their parts while there is no gap, then the whole."""
        self._choice = self._choose(try_chunks) if self.timing else iter(())

    def settle(self) -> str:
        """After each step: choose if enough was measured, and return a line that says what. Collective."""
        return next(self._choice, "")

    def _choose(self, try_chunks: bool) -> Iterator[str]:
        """A step is done between each two of what it gives."""
        for _ in range(WARMUP - 1):
            yield ""
        self.watches.clear()
        for _ in range(MEASURED):
            yield ""
        forward, backward = self._times()
        self.gaps = {True: best_gap(forward, backward), False: best_gap(forward)}
        directions = [forward, *([] if backward is None else [backward.mirrored()])]
        gap = self.gaps[True]
        assert gap is not None
        taken, computing = sum(t.taken(gap) for t in directions), sum(t.computing for t in directions)
        line = self._describe(forward, backward, taken)
        if try_chunks and taken - computing > EXPOSED * taken:
            yield line
            line = yield from self._choose_chunks()
        self.timing = False
        yield line

    def _choose_chunks(self) -> Generator[str, None, str]:
        times = {}
        for self.chunks in CHUNKS:
            yield ""
            self.watches.clear()
            for _ in range(MEASURED - 1):
                yield ""
            times[self.chunks] = self._whole_times()
        self.chunks = min(times, key=lambda chunks: times[chunks])
        listed = ", ".join(f"{chunks} {ms:.2f}" for chunks, ms in times.items())
        return f"shortcut experts: {self.chunks} chunks; ms of a pair, forward and backward, by chunks: {listed}"

    def _describe(self, forward: Times, backward: Times | None, taken: float) -> str:
        gap, last = self.gaps[True], len(self.window)
        directions = [forward] if backward is None else [forward, backward]
        parts = zip(("dispatch", "experts", "combine", *self.window), *(t.parts for t in directions), strict=True)
        listed = ", ".join(f"{name} {' / '.join(f'{ms:.2f}' for ms in times)}" for name, *times in parts)
        serial = sum(t.whole for t in directions)
        words = "forward" if backward is None else "forward / backward"
        return (
            f"shortcut experts: in gap {gap} of 0 to {last} around {', '.join(self.window)}; {taken:.2f} ms a pair "
            f"expected, {serial:.2f} one after the other; {words} ms: {listed}"
        )

    def _times(self) -> tuple[Times, Times | None]:
        """Medians of the timed passes' parts, mean over ranks; drops them. Without backward's if there was none."""
        names = (*WAY, *self.window)
        found = [(watch.forward(), watch.backward()) for watch in self._drain()]
        forward = _agreed([median(times[name] for times, _ in found) for name in names])
        whole = [times for _, times in found if all(name in times for name in names)]
        backward = _agreed([median(times[name] for times in whole) for name in names]) if whole else None
        return Times.of(forward), None if backward is None else Times.of(backward)

    def _whole_times(self) -> float:
        """Median of the timed passes, mean over ranks; drops them."""
        taken = [watch.forward()["whole"] + watch.backward().get("whole", 0.0) for watch in self._drain()]
        return _agreed([median(taken)])[0]

    def _drain(self) -> list[Stopwatch]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        watches, self.watches = self.watches, []
        return watches


def _agreed(values: list[float]) -> list[float]:
    """Means over ranks. Collective."""
    if not dist.is_initialized():
        return values
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    shared = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(shared)
    return (shared / dist.get_world_size()).tolist()


@torch.compiler.disable
def run_window(schedule: Schedule, moe: MoELayer, chosen: Chosen, h: Any, window: Operators) -> tuple[Any, Tensor]:
    """The operators of a window, one on the other's result, and the experts beside them. Collective.

    Args:
        chosen: what the experts get.
        h: what the first operator gets.

    Returns:
        the last operator's result, and the experts' [T, H].
    """
    gap = schedule.gaps[torch.is_grad_enabled()]
    if schedule.timing and torch.is_grad_enabled():
        schedule.watches.append(Stopwatch())
        return (_time_parts if gap is None else _time_whole)(schedule, moe, chosen, h, window)
    if gap is not None:
        return _interleave(schedule, moe, chosen, h, window, gap)
    for operator in window:
        h = operator(h)
    return h, moe.apply_experts(chosen)


def _interleave(
    schedule: Schedule, moe: MoELayer, chosen: Chosen, h: Any, window: Operators, gap: int
) -> tuple[Any, Tensor]:
    flight = moe.begin(chosen, schedule.chunks)
    # the host waits for counts, and then has much to launch: behind operators, that the device has work meanwhile
    before = gap if schedule.quick else min(gap, 1)
    for operator in window[:before]:
        h = operator(h)
    flight.send()
    for operator in window[before:gap]:
        h = operator(h)
    flight.compute()
    for operator in window[gap:]:
        h = operator(h)
    return h, flight.finish()


def _time_parts(schedule: Schedule, moe: MoELayer, chosen: Chosen, h: Any, window: Operators) -> tuple[Any, Tensor]:
    """Each by itself; in backward too, since there nodes made last come first."""
    watch = schedule.watches[-1]
    watch.stamp("begun")
    flight = moe.begin(chosen, schedule.chunks, watch)
    flight.send()
    flight.compute()
    y = flight.finish()
    for name, operator in zip(schedule.window, window, strict=True):
        h = operator(watch.node(h, name))
        watch.stamp(name)
    return h, watch.node(y, "begun")


def _time_whole(schedule: Schedule, moe: MoELayer, chosen: Chosen, h: Any, window: Operators) -> tuple[Any, Tensor]:
    watch, gap = schedule.watches[-1], schedule.gaps[True]
    assert gap is not None
    watch.stamp("begun")
    chosen = replace(chosen, x_TH=watch.node(chosen.x_TH, "whole"))  # whose gradient comes last
    h, y = _interleave(schedule, moe, chosen, h, window, gap)
    watch.stamp("whole")
    return h, watch.node(y, "begun")
