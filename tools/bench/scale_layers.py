"""Times of `occult bench layer` against the devices that a token needs (C_T), and the lines through them.

python -m occult_train.tools.bench.scale_layers LAYERS.csv [LAYERS.csv ...]
"""

import argparse
import csv
from pathlib import Path

from occult_train.tools.bench.pilot import fitted
from occult_train.tools.bench.results import Row
from occult_train.tools.bench.shapes import LAYER_SYSTEMS, parse_system

PEER = "autoep"
MEASURES = {"forward_ms": "forward", "train_ms": "forward + backward"}


def name(system: str) -> str:
    """What sets a system apart, in words."""
    base, options = parse_system(system, LAYER_SYSTEMS)
    placed = ["placed"] if "placement" in options else []
    pruned = [f"pruned to {options['prune']}"] if "prune" in options else []
    return ", ".join([base, *placed, *pruned])


def read(paths: list[Path]) -> list[Row]:
    """Rows of CSVs; numbers where there are some."""
    rows = []
    for path in paths:
        with path.open(newline="") as file:
            rows += list(csv.DictReader(file))
    numbers = ("c_t", "sent_bytes", *MEASURES)
    return [row | {key: float(row[key]) for key in numbers if row[key]} for row in rows]


def problem(row: Row) -> tuple[str, ...]:
    """What systems that are compared have in common."""
    return row["p2p"], row["shape"], row["routing"].rpartition("/")[2]


def table(rows: list[Row]) -> str:
    """In Markdown: each system beside AutoEP on the same problem."""
    lines = ["| P2P | shape | routing | system | C_T | forward ms | forward + backward ms | AutoEP / it | MB sent |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    peers = {problem(row): row["train_ms"] for row in rows if name(row["system"]) == PEER and row["train_ms"]}
    for row in rows:
        head = f"| {' | '.join(problem(row))} | {name(row['system'])} |"
        if row["error"]:
            lines.append(f"{head} {row['error'].splitlines()[-1]} | | | | |")
            continue
        times = f"{row['c_t']:.3f} | {row['forward_ms']:.3f} | {row['train_ms']:.3f}"
        peer = peers.get(problem(row))
        ratio = f"{peer / row['train_ms']:.2f}" if peer else ""
        lines.append(f"{head} {times} | {ratio} | {row['sent_bytes'] / 1e6:,.1f} |")
    return "\n".join(lines)


def lines_through(rows: list[Row]) -> str:
    """In Markdown: of each shape, our times over C_T. One C_T, or two points, make no line."""
    made = ["| P2P | shape | pass | ms a device of C_T | ms at none | r | points |", "|---|---|---|---|---|---|---|"]
    ours = [row for row in rows if name(row["system"]).startswith("ours") and not row["error"]]
    for place in dict.fromkeys((row["p2p"], row["shape"]) for row in ours):
        here = [row for row in ours if (row["p2p"], row["shape"]) == place]
        if len({row["c_t"] for row in here}) < 3:
            continue
        for measure, words in MEASURES.items():
            slope, start, r = fitted([{"c_t": row["c_t"], "ms": row[measure]} for row in here])
            made.append(f"| {' | '.join(place)} | {words} | {slope:.3f} | {start:.3f} | {r:.4f} | {len(here)} |")
    return "\n".join(made)


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layers", type=Path, nargs="+")
    rows = read(parser.parse_args().layers)
    print(f"{table(rows)}\n\nA line through the times of ours over C_T:\n\n{lines_through(rows)}")


if __name__ == "__main__":
    main()
