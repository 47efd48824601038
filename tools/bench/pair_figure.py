"""A picture of when a pair of blocks computes and when it communicates, before and after."""

from pathlib import Path
from typing import Any

from occult_train.errors import UserError

COLOURS = {"computing": "#4878a8", "communication": "#d1603d"}
BEFORE, AFTER = ("top2",), ("overlapped",)
PHASES = ("forward", "backward")


def draw(traces: dict[str, Any], path: Path) -> None:
    """A row for each preset: the top-2 twin above, the overlapped pair below, forward then backward, on one axis of
    milliseconds.

    Args:
        traces: as `pair_report.timeline` gives them.

    Raises:
        UserError: matplotlib is not installed, or does not write such files.
        OSError: the disk does not take it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"--figure={path} needs the package {error.name}, which is not installed") from None
    shown = [t for t in traces["traces"] if t["system"].partition(":")[0] in (*BEFORE, *AFTER)]
    presets = list(dict.fromkeys(t["preset"] for t in shown))
    if not presets:
        raise UserError(f"--figure={path}: neither top2 nor overlapped was traced")
    figure = Figure(figsize=(10, 2.1 * len(presets)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, preset in zip(figure.subplots(len(presets), squeeze=False)[:, 0], presets, strict=True):
        of_preset = [t for kind in (BEFORE, AFTER) for t in shown if t["preset"] == preset and _is(t, kind)]
        for number, trace in enumerate(of_preset):
            _lane(axes, trace, 2.4 * (len(of_preset) - 1 - number))
        ticks = [2.4 * (len(of_preset) - 1 - n) + lane for n in range(len(of_preset)) for lane in (1.2, 0.3)]
        names = [f"{t['system'].partition(':')[0]}: {lane}" for t in of_preset for lane in COLOURS]
        axes.set_yticks(ticks, names, fontsize=7)
        axes.set_xlim(left=0)
        axes.set_xlabel("ms, forward | backward", fontsize=7)
        axes.tick_params(axis="x", labelsize=7)
        known = of_preset[0]
        axes.set_title(f"{preset}, {known['tokens']} tokens a rank, {known['gpu']}, P2P {known['p2p']}", fontsize=8)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise UserError(f"--figure={path}: {error}") from None


def _is(trace: dict[str, Any], kind: tuple[str, ...]) -> bool:
    return trace["system"].partition(":")[0] in kind


def _lane(axes: Any, trace: dict[str, Any], bottom: float) -> None:
    """Computing above communication; a line where backward begins."""
    start = 0.0
    for phase in PHASES:
        spans = trace[phase]
        for lane, (kind, colour) in enumerate(reversed(COLOURS.items())):
            bars = [((start + a) / 1000, (b - a) / 1000) for k, a, b, _ in spans if k == kind]
            axes.broken_barh(bars, (bottom + 0.9 * lane, 0.8), color=colour, linewidth=0)
        start += max((end for _, _, end, _ in spans), default=0.0)
        axes.plot([start / 1000] * 2, [bottom - 0.1, bottom + 1.8], color="black", linewidth=0.6)
