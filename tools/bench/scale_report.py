"""What came of a run of scale_train.py: python -m occult_train.tools.bench.scale_report RUN OUTPUT

Writes OUTPUT/training.md, training.csv and, where matplotlib is installed, training.png: losses, devices a token needs
(C_T) and load over time, re-placements, and whether the curve goes on behind the kill.
"""

import argparse
import csv
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from occult_train import config as configs
from occult_train import runlog
from occult_train.errors import UserError
from occult_train.tools.bench.scale_train import KILLED, LOG_KILLED, Killed

Record = dict[str, Any]
SHOWN = 16
"""Steps in the table; the CSV has all that were logged."""


@dataclass(frozen=True)
class Point:
    """A logged step; of layers the mean."""

    step: int
    time: float
    """Seconds since 1970."""
    tokens: int
    loss: float
    c_t: float
    intra_share: float
    load: float
    """Largest expert's over the mean."""
    bytes_sent: int
    """By all ranks, in all layers."""
    tokens_per_second: float

    @staticmethod
    def of(record: Record) -> "Point":
        """From a line of the log."""
        layers = record["layers"]
        c_t, intra, load = (fmean(layer[n] for layer in layers) for n in ("c_t", "intra_share", "load_max_over_mean"))
        sent = sum(layer["bytes_sent"] for layer in layers)
        step, time, tokens, loss = (record[name] for name in ("step", "time", "tokens", "loss"))
        return Point(step, time, tokens, loss, c_t, intra, load, sent, record["tokens_per_second"])


@dataclass(frozen=True)
class Training:
    """A run's log."""

    points: list[Point]
    evaluations: list[Record]
    replacements: list[Record]
    killed: Killed | None
    before: list[Point]
    """As they were when the rank was killed."""
    interval: int
    """Steps between log lines."""
    ranks: int
    top_k: int

    @staticmethod
    def read(run: Path) -> "Training":
        """Of a run's folder.

        Raises:
            UserError: nothing was logged there.
        """
        log = runlog.read(run / "log.jsonl") if (run / "log.jsonl").exists() else []
        if not any(record["kind"] == "step" for record in log):
            raise UserError(f"{run} has no logged step")
        config = configs.load([str(run / "config.yaml")])
        killed = Killed(**json.loads((run / KILLED).read_text())) if (run / KILLED).exists() else None
        before = _points(runlog.read(run / LOG_KILLED)) if killed else []
        evaluations, replacements = ([r for r in log if r["kind"] == kind] for kind in ("evaluation", "replacement"))
        sizes = (config.monitor.interval, config.parallel.expert, config.model.num_experts_per_tok)
        return Training(_points(log), evaluations, replacements, killed, before, *sizes)

    def repeated(self) -> list[tuple[Point, Point]]:
        """Logged steps that were trained before the kill and again behind it."""
        now = {point.step: point for point in self.points}
        return [(old, now[old.step]) for old in self.before if old.step in now and now[old.step].time != old.time]

    def missing(self) -> list[int]:
        """Steps that should be in the log and are not."""
        seen = {point.step for point in self.points}
        return sorted({1, *range(self.interval, max(seen) + 1, self.interval)} - seen)

    def seconds(self) -> float:
        """Spent on the steps in the log, without starting and evaluating."""
        tokens = [0, *(point.tokens for point in self.points)]
        spent = zip(self.points, tokens[:-1], strict=True)
        return sum((point.tokens - before) / point.tokens_per_second for point, before in spent)


def _points(log: list[Record]) -> list[Point]:
    return [Point.of(record) for record in log if record["kind"] == "step"]


def continuity(run: Training) -> str:
    """Whether the curve goes on behind the kill, in a sentence."""
    if run.killed is None:
        return "No rank was killed."
    at = f"Rank {run.killed.rank} of {run.ranks} was killed with -9 after step {run.killed.step:,}"
    pairs = run.repeated()
    if not pairs:
        return f"{at}; no step has been logged since."
    (first, again), (last, redone) = pairs[0], pairs[-1]
    apart = [abs(new.loss - old.loss) / old.loss for old, new in pairs]
    missing = run.missing()
    log = f"steps {missing} are missing" if missing else "no logged step is missing"
    losses = f"{first.loss:.4f} to {last.loss:.4f} before and {again.loss:.4f} to {redone.loss:.4f} behind the kill"
    return (
        f"{at}; {again.time - run.killed.time:.0f} s later step {again.step:,} was logged again. Steps {first.step:,} "
        f"to {last.step:,} were trained twice ({len(pairs)} logged): the loss was {losses}, at most {max(apart):.1e} "
        f"apart (relative); {log} up to step {run.points[-1].step:,}."
    )


def report(run: Training) -> str:
    """In Markdown."""
    points = run.points
    shown = [points[i] for i in sorted({*np.linspace(0, len(points) - 1, SHOWN).round().astype(int).tolist()})]
    first, last = points[0], points[-1]
    speed = float(np.median([point.tokens_per_second for point in points[1:] or points]))
    lines = [
        f"EP={run.ranks}, {run.top_k} experts a token: {last.step:,} steps, {last.tokens / 1e6:,.1f} M tokens, "
        f"{run.seconds() / 60:.1f} minutes of steps, {speed:,.0f} tokens/s (median); loss {first.loss:.4f} to "
        f"{last.loss:.4f}, C_T {first.c_t:.3f} to {last.c_t:.3f}.",
        *("", continuity(run), ""),
        "| step | M tokens | loss | C_T | inside a device | load, largest expert | MB sent a step | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for p in shown:
        numbers = f"{p.loss:.4f} | {p.c_t:.3f} | {p.intra_share:.1%} | {p.load:.2f} | {p.bytes_sent / 1e6:,.2f}"
        lines.append(f"| {p.step:,} | {p.tokens / 1e6:,.2f} | {numbers} | {p.tokens_per_second:,.0f} |")
    if run.evaluations:
        held_out = ", ".join(f"{record['loss']:.4f} at step {record['step']:,}" for record in run.evaluations)
        lines += ["", f"Held-out loss: {held_out}."]
    if run.replacements:
        lines += ["", *_replacements(run.replacements)]
    return "\n".join(lines)


def _replacements(records: list[Record]) -> list[str]:
    lines = [
        "| placed anew at | layers moved | experts | C_T | expected | device load | expected | solved, s | moved, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        layers = record["layers"]
        c_t, load = (fmean(layer[name] for layer in layers) for name in ("c_t", "load_max_over_mean"))
        after = [
            fmean(layer[new if layer["moved"] else old] for layer in layers)
            for old, new in (("c_t", "c_t_expected"), ("load_max_over_mean", "load_expected"))
        ]
        moved = f"{sum(layer['moved'] for layer in layers)} of {len(layers)} | {record['experts_moved']}"
        numbers = f"{c_t:.3f} | {after[0]:.3f} | {load:.2f} | {after[1]:.2f}"
        took = f"{record['solve_seconds']:.1f} | {record['move_seconds']:.2f}"
        lines.append(f"| {record['step']:,} | {moved} | {numbers} | {took} |")
    return lines


def draw(run: Training, path: Path) -> None:
    """Losses, C_T and load over steps; dotted where experts were placed anew, red where the rank was killed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 8), layout="constrained")
    FigureCanvasAgg(figure)
    loss, devices, load = figure.subplots(3, 1, sharex=True)
    steps = [point.step for point in run.points]
    loss.plot(steps, [point.loss for point in run.points], label="training")
    if pairs := run.repeated():
        loss.plot([old.step for old, _ in pairs], [old.loss for old, _ in pairs], "--", label="before the kill")
    if run.evaluations:
        held_out = [(record["step"], record["loss"]) for record in run.evaluations]
        loss.plot(*zip(*held_out, strict=True), "o", label="held out")
    loss.legend()
    devices.plot(steps, [point.c_t for point in run.points])
    load.plot(steps, [point.load for point in run.points])
    for axes, name in ((loss, "loss, nats"), (devices, "C_T, devices a token"), (load, "largest expert / mean")):
        axes.set_ylabel(name)
        for record in run.replacements:
            axes.axvline(record["step"], color="gray", linestyle=":", linewidth=0.8)
        if run.killed:
            axes.axvline(run.killed.step, color="red", linewidth=0.8)
    load.set_xlabel("step")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    given = parser.parse_args()
    run = Training.read(given.run)
    given.output.mkdir(parents=True, exist_ok=True)
    text = report(run)
    (given.output / "training.md").write_text(text + "\n")
    with (given.output / "training.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Point)])
        writer.writeheader()
        writer.writerows(asdict(point) for point in run.points)
    print(text)
    try:
        draw(run, given.output / "training.png")
    except ImportError as error:
        print(f"no figure: {error.name} is not installed")


if __name__ == "__main__":
    main()
