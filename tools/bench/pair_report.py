"""What a pair's measurements come to: how much is hidden, how much faster it is, and what was asked of both.

R = (computing + exposed communication) / computing, of the top-2 twin's trace: how much faster it would be if all of
its communication were hidden. A share of R - 1 is asked for.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

from occult_train.tools.bench.results import Row

HIDDEN = {"on": 0.90, "off": 0.75}
"""Share of communication to be hidden, by P2P."""
GAIN = {"on": 0.60, "off": 0.75}
"""Share of R - 1 to be gained against top-2."""
AGAINST_AUTOEP = {"on": 1.3, "off": 1.8}
AUTOEP_PRESET = "gpt2_moe_medium"
"""The one of which it is asked."""
PHASES = {"train": ("forward", "backward"), "inference": ("inference",)}


@dataclass(frozen=True)
class Line:
    """One thing measured, and the least that is asked of it, if anything is."""

    preset: str
    what: str
    got: float
    least: float | None
    how: str = ""

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.least is None:
            return ""
        return "reached" if self.got >= self.least else "missed"


def total(row: Row, field: str, phases: tuple[str, ...]) -> float:
    """Milliseconds of a field of the trace."""
    return sum(row[f"{phase}_{field}_ms"] for phase in phases)


def hidden(row: Row, phases: tuple[str, ...]) -> float:
    """Share of the communication of these phases; 1 where there is none."""
    there = total(row, "communication", phases)
    return 1 - total(row, "exposed", phases) / there if there else 1.0


def potential(row: Row, phases: tuple[str, ...]) -> float:
    """R."""
    computing = total(row, "computing", phases)
    return (computing + total(row, "exposed", phases)) / computing


def lines(rows: list[Row]) -> list[Line]:
    """For each preset whose overlapped pair was measured. Of several variants of a system the fastest counts."""
    found = []
    for preset in dict.fromkeys(row["preset"] for row in rows):
        ours = _best(rows, preset, "overlapped", "train")
        if ours is None:
            continue
        p2p = ours["p2p"]
        if "forward_computing_ms" in ours:
            for phase in ("forward", "backward", "inference"):
                least = None if phase == "inference" else HIDDEN[p2p]
                found.append(Line(preset, f"communication hidden, {phase}", hidden(ours, (phase,)), least))
        for name, kind in product(("sequential", "top2", "autoep"), PHASES):
            row = _best(rows, preset, name, kind)
            if row is not None:
                found.append(_speed(preset, ours, name, row, kind))
    return found


def _speed(preset: str, ours: Row, name: str, row: Row, kind: str) -> Line:
    got, least, how = row[f"{kind}_ms"] / ours[f"{kind}_ms"], None, ""
    if name == "top2" and "forward_computing_ms" in row:
        r = potential(row, PHASES[kind])
        least, how = 1 + GAIN[ours["p2p"]] * (r - 1), f"R = {r:.3f}"
    if name == "autoep" and preset == AUTOEP_PRESET and kind == "train":
        least = AGAINST_AUTOEP[ours["p2p"]]
    return Line(preset, f"times as fast as {name}, {kind}", got, least, how)


def _best(rows: list[Row], preset: str, name: str, kind: str) -> Row | None:
    here = (r for r in rows if r["preset"] == preset and r["system"].partition(":")[0] == name)
    return min((r for r in here if "train_ms" in r), key=lambda row: row[f"{kind}_ms"], default=None)


def timeline(rows: list[Row]) -> dict[str, Any]:
    """What was traced, as JSON: by preset and system, by phase, spans of microseconds."""
    traced = [row for row in rows if "timeline" in row]
    return {
        "columns": ["kind", "start_us", "end_us", "kernel"],
        "traces": [
            {key: row[key] for key in ("preset", "system", "p2p", "ranks", "tokens", "gpu", "torch")} | row["timeline"]
            for row in traced
        ],
    }
