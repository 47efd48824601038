"""Rows of measurements: as CSV, as tables, and as ratios of peers to a base system."""

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Write rows under these columns; what a row lacks is left empty.

    Raises:
        ValueError: a row has a field that is no column.
    """
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers, at least one."""
    return math.exp(sum(map(math.log, values)) / len(values))


def ratios(rows: Sequence[Row], base: str, measure: str, within: Sequence[str], over: str) -> dict[str, list[float]]:
    """For each other system its `measure` divided by that of `base`, for every value of `over` that both have.

    Args:
        rows: with `system`, the fields of `within` (equal in all rows compared) and `over`.
    """
    value = {
        (row["system"], *(row[key] for key in within), row[over]): row[measure] for row in rows if row.get(measure)
    }
    found: dict[str, list[float]] = {}
    for (system, *place), got in value.items():
        if system != base and (base, *place) in value:
            found.setdefault(system, []).append(got / value[base, *place])
    return found


def ratio_table(rows: Sequence[Row], base: str, measures: dict[str, str], within: Sequence[str], over: str) -> Table:
    """Geometric means, over all values of `over`, of every system's measures divided by those of `base`.

    Args:
        measures: column of a row, and how the table calls it.
    """
    table = Table(title=f"times {base} (geometric mean over {over}s)")
    for name in (*within, "system", *measures.values()):
        table.add_column(name)
    settings = dict.fromkeys(tuple(row[key] for key in within) for row in rows)
    for setting in settings:
        here = [row for row in rows if tuple(row[key] for key in within) == setting]
        found = {name: ratios(here, base, column, within, over) for column, name in measures.items()}
        for system in dict.fromkeys(row["system"] for row in here):
            cells = [_mean(found[name].get(system)) for name in measures.values()]
            if any(cells):
                table.add_row(*map(str, setting), system, *cells)
    return table


def _mean(values: list[float] | None) -> str:
    return f"{geometric_mean(values):.2f} ({len(values)})" if values else ""


def show(title: str, rows: Sequence[Row], columns: dict[str, str]) -> None:
    """Print rows as a table; a row with an error shows it below.

    Args:
        columns: field of a row, and how the table calls it; fields in `_ms` get two digits, bytes become MB.
    """
    table = Table(title=title)
    for name in columns.values():
        table.add_column(name, justify="left" if name in ("system", "shape", "routing") else "right")
    for row in rows:
        table.add_row(*(_cell(field, row) for field in columns))
    console = Console(width=200)
    console.print(table)
    for row in rows:
        if row.get("error"):
            console.print(f"{row['system']} {row.get('shape', '')}: {row['error']}", markup=False, highlight=False)


def _cell(field: str, row: Row) -> str:
    value = row.get(field)
    if value is None:
        return "error" if field.startswith("train") and row.get("error") else ""
    if field.endswith("_bytes"):
        return f"{value / 1e6:,.1f}"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0%}" if field == "share_of_peak" else f"{value:,.3g}" if abs(value) < 10 else f"{value:,.1f}"
