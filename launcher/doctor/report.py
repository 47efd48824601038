"""What the doctor found, as tables."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from occult_train.launcher.doctor.host import Facts, Host
from occult_train.launcher.doctor.judge import Matrix, common, gigabytes

MOST_NAMED = 16
"""Sides of a matrix that is shown whole; of larger ones, each side's slowest partner."""


def hosts_table(hosts: Sequence[Host]) -> Table:
    """A row a host, with free memory and disk; what differs from most hosts is marked."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("host", "answer", "clock", "cores", "memory", "disk", "GPUs", "differs"):
        table.add_column(name)
    answered = [host.facts for host in hosts if host.facts is not None]
    for host in hosts:
        if host.facts is None:
            table.add_row(host.name, Text("none !", style="bold red"))
            continue
        table.add_row(host.name, f"{host.seconds:.1f} s", *_cells(host, host.facts, answered))
    return table


def _cells(host: Host, facts: Facts, answered: Sequence[Facts]) -> Iterator[Text]:
    low, high = host.clock
    yield Text(f"{max(low, 0.0) + min(high, 0.0):+.1f} s")  # as far as it is certain
    yield _marked(str(facts.cores), [str(other.cores) for other in answered])
    yield Text(f"{facts.memory_free / 1e9:.0f} of {facts.memory / 1e9:.0f} GB")
    yield Text(f"{facts.disk_free / 1e9:.0f} GB" if facts.disk_free >= 0 else "unknown")
    yield _marked(_gpus(facts), [_gpus(other) for other in answered])
    everybody = [_installed(other) for other in answered]
    usual = {name: common([other[name] for other in everybody]) for name in everybody[0]}
    words = ", ".join(f"{name} {value}" for name, value in _installed(facts).items() if value != usual[name])
    yield Text(f"{words} !" if words else "", style="bold yellow")


def _installed(facts: Facts) -> dict[str, str]:
    """What ought to be equal and has no column."""
    network = ", ".join(f"{name} {speed}" for name, speed in facts.networks.items())
    drivers = ", ".join(sorted({gpu["driver"] for gpu in facts.gpus}))
    found = {**facts.versions, "driver": drivers, "network": network}
    return {name: value or "none" for name, value in found.items()}


def _gpus(facts: Facts) -> str:
    """`8 x NVIDIA H100 80GB HBM3, NV18`."""
    names = sorted({gpu["name"] for gpu in facts.gpus})
    links = [" ".join(facts.gpu_links)] if facts.gpu_links else []
    return ", ".join([f"{len(facts.gpus)} x {'/'.join(names)}", *links]) if names else "none"


def _marked(value: str, everybody: Sequence[str]) -> Text:
    usual = value == common(everybody)
    return Text(value if usual else f"{value} !", style="" if usual else "bold yellow")


def usual_line(hosts: Sequence[Host]) -> str:
    """What most hosts have of all else."""
    everybody = [_installed(host.facts) for host in hosts if host.facts is not None]
    usual = {name: common([other[name] for other in everybody]) for name in (everybody[0] if everybody else {})}
    return "usual: " + ", ".join(f"{name} {value}" for name, value in usual.items() if value != "none")


def links_table(names: Sequence[str], rates: dict[str, Matrix]) -> Table:
    """Gigabytes a second each way, all-to-all / all-reduce, of every two sides; the slowest is marked."""
    to_all, reduced = rates["all_to_all"], rates["all_reduce"]
    table = Table(box=box.SIMPLE_HEAD)
    least = min((rate for row in to_all for rate in row if rate > 0), default=0.0)
    table.add_column("")
    shown = len(names) <= MOST_NAMED
    for name in names if shown else ["slowest with", "GB/s"]:
        table.add_column(name, justify="right", no_wrap=True)
    for i, name in enumerate(names):
        cells = [_rate(to_all[i][j], reduced[i][j], least) for j in range(len(names))]
        if not shown:
            measured = [j for j in range(len(names)) if to_all[i][j] > 0]
            slowest = min(measured, key=lambda j: to_all[i][j], default=i)
            cells = [Text(names[slowest] if measured else ""), cells[slowest]]
        table.add_row(name, *cells)
    return table


def _rate(to_all: float, reduced: float, least: float) -> Text:
    words = f"{gigabytes(to_all)} / {gigabytes(reduced)}" if to_all > 0 else "·"
    return Text(words, style="bold yellow" if to_all == least > 0 else "")


def as_json(hosts: Sequence[Host], links: dict[str, Any], need: dict[str, Any], findings: list[str]) -> dict[str, Any]:
    """Everything, for scripts."""
    return {
        "well": not findings,
        "findings": findings,
        "hosts": [
            {
                "name": host.name,
                "slots": host.slots,
                "trouble": host.trouble,
                "answer_seconds": host.seconds,
                "clock_ahead_seconds": list(host.clock),
                "facts": None if host.facts is None else vars(host.facts),
            }
            for host in hosts
        ],
        "links": links,
        "memory": need,
    }
