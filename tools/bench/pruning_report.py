"""The pruning study's table and figure.

python -m occult_train.tools.bench.pruning_report RUNS.csv ... [--figure FILE.png]

Quality against bytes: held-out loss with its spread over seeds, beside what a token moves between devices.
"""

import argparse
import statistics
from pathlib import Path

from occult_train.tools.bench.pruning_tune import Row
from occult_train.tools.bench.study import read_rows

NAMES = {"none": "not pruned", "router": "by score", "similarity": "by similarity"}


def gather(rows: list[Row]) -> dict[tuple[str, int], list[Row]]:
    """Runs by policy and m, the fewest devices first."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.devices, row.policy)):
        found.setdefault((row.policy, row.devices), []).append(row)
    return found


def mean(rows: list[Row], field: str) -> float:
    """Over seeds."""
    return statistics.mean(getattr(row, field) for row in rows)


def spread(rows: list[Row]) -> float:
    """Standard deviation of the held-out loss over seeds; 0 with one."""
    return statistics.stdev(row.loss for row in rows) if len(rows) > 1 else 0.0


def table(rows: list[Row]) -> str:
    """In Markdown."""
    lines = ["| routing | m | C_T | bytes a token and layer | loss before | loss | seeds | ms a step |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for (policy, m), runs in gather(rows).items():
        numbers = f"{mean(runs, 'c_t'):.2f} | {mean(runs, 'bytes_token'):,.0f} | {mean(runs, 'loss_before'):.4f}"
        loss = f"{mean(runs, 'loss'):.4f} ± {spread(runs):.4f}"
        lines.append(f"| {NAMES[policy]} | {m} | {numbers} | {loss} | {len(runs)} | {mean(runs, 'step_ms'):.1f} |")
    first = rows[0]
    about = f"base {first.base}, {first.groups} devices, {first.steps} steps of {first.tokens // first.steps:,} tokens"
    return "\n".join([*lines, "", f"{about}, {first.device}; spread: standard deviation over seeds"])


def draw(rows: list[Row], path: Path) -> None:
    """Loss over bytes, a line for each policy, which ends at the run that is not pruned."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    found = gather(rows)
    for policy in ("router", "similarity"):
        points = {key: runs for key, runs in found.items() if key[0] in (policy, "none")}
        x = [mean(runs, "bytes_token") for runs in points.values()]
        y, errors = [mean(runs, "loss") for runs in points.values()], [spread(runs) for runs in points.values()]
        axes.errorbar(x, y, errors, marker="o", capsize=3, label=NAMES[policy])
        for (_, m), at, loss in zip(points, x, y, strict=True):
            axes.annotate(f"m={m}", (at, loss), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("bytes that a token moves in a layer and training step")
    axes.set_ylabel("held-out loss after fine-tuning, nats")
    axes.set_ylim(bottom=None)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    rows = [row for path in given.runs for row in read_rows(Row, path)]
    if len({row.base for row in rows}) != 1:
        parser.error(f"runs of one base are needed, not of {len({row.base for row in rows})}")
    print(table(rows))
    if given.figure:
        draw(rows, given.figure)


if __name__ == "__main__":
    main()
