"""What is wrong with hosts and links, in one line each that says what to do about it."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

from occult_train.launcher.doctor.host import Facts, Host

CLOCK_SECONDS = 1.0
"""That clocks may differ: files and logs of several hosts are compared by their times."""
DISK_BYTES = 5e9
SHARED_MEMORY_BYTES = 1e9
"""Through which NCCL moves data inside a host; containers begin with 64 MB."""
MEMORY_SHARE = 0.1
"""Of a host or GPU: less memory free than this on a host, or more taken on a GPU, is said."""
SLOW = {"all_to_all": 0.4, "all_reduce": 0.6}
"""A link is slow that has less than this share of what the best quarter of its like have. gloo's all-to-all now and
then sends both ways at once, which doubles its rate."""

Value = TypeVar("Value", bound=Hashable)
Matrix = list[list[float]]


def common(values: Sequence[Value]) -> Value:
    """What most have; of several, the first."""
    return Counter(values).most_common(1)[0][0]


def of_hosts(hosts: Sequence[Host], disk_bytes: float = DISK_BYTES) -> list[str]:
    """What is wrong with hosts.

    Args:
        disk_bytes: that must be free where the run writes.
    """
    found = [f"{host.name}: {host.trouble}; {_try(host)}" for host in hosts if host.facts is None]
    answered = [(host, host.facts) for host in hosts if host.facts is not None]
    for host, facts in answered:
        found += [f"{host.name}: {text}" for text in _alone(host, facts, disk_bytes)]
    return [*found, *_different(answered)]


def _try(host: Host) -> str:
    if host.trouble.startswith(("ssh:", "no answer")):
        return f"is it up, and does `ssh {host.name} true` work without a password?"
    return "does it have the same Python at the same path?"


def _alone(host: Host, facts: Facts, disk_bytes: float) -> Iterator[str]:
    low, high = host.clock
    if low > CLOCK_SECONDS or high < -CLOCK_SECONDS:
        way = "ahead of" if low > 0 else "behind"
        yield f"its clock is {abs(low + high) / 2:.1f} s {way} this machine's; let chrony or ntpd set it"
    if not facts.folder:
        yield "the folder in which this was typed does not exist there; make it, or share the disk"
    if not facts.versions["occult_train"]:
        yield "occult_train cannot be imported there; install it, or share the folder that holds it"
    if 0 <= facts.disk_free < disk_bytes:
        yield f"{facts.disk_free / 1e9:.1f} GB of disk are free, {disk_bytes / 1e9:.1f} are wanted; make room"
    if facts.memory_free < MEMORY_SHARE * facts.memory:
        yield f"{facts.memory_free / 1e9:.1f} of {facts.memory / 1e9:.1f} GB of memory are free; who takes it?"
    if len(facts.gpus) > 1 and 0 <= facts.shared_memory_free < SHARED_MEMORY_BYTES:
        free = facts.shared_memory_free / 1e9
        yield f"{free:.2f} GB of /dev/shm are free, which NCCL needs; containers take --shm-size=8g or --ipc=host"
    if facts.gpus and host.slots and max(host.slots) >= len(facts.gpus):
        yield f"slot {max(host.slots)} is to be used but there are {len(facts.gpus)} GPUs; correct the hostfile"
    for number, gpu in enumerate(facts.gpus):
        taken = gpu["memory"] - gpu["memory_free"]
        if taken > MEMORY_SHARE * gpu["memory"]:
            yield f"GPU {number}: {taken / 1e9:.1f} of {gpu['memory'] / 1e9:.1f} GB are taken; see nvidia-smi there"


COMPARED: dict[str, Callable[[Facts], str]] = {
    "GPUs": lambda facts: ", ".join(sorted({gpu["name"] for gpu in facts.gpus})) or "none",
    "driver": lambda facts: ", ".join(sorted({gpu["driver"] for gpu in facts.gpus})) or "none",
    "GPU links": lambda facts: ", ".join(facts.gpu_links) or "none",
}
"""What ought to be the same everywhere, beside versions."""


def _different(answered: Sequence[tuple[Host, Facts]]) -> Iterator[str]:
    """Where hosts differ from what most of them have."""
    if not answered:
        return
    for name in answered[0][1].versions:
        most = common([facts.versions[name] for _, facts in answered])
        for host, facts in answered:
            if (own := facts.versions[name]) != most:
                yield f"{host.name}: {name} {own or 'is missing'}, elsewhere {most or 'none'}; install the same"
    for name, value in COMPARED.items():
        most = common([value(facts) for _, facts in answered])
        for host, facts in answered:
            if (own := value(facts)) != most:
                yield f"{host.name}: {name} {own}, elsewhere {most}; use hosts of one kind, or --exclude it"


def of_links(names: Sequence[str], all_to_all: Matrix, all_reduce: Matrix) -> list[str]:
    """Slow links between hosts or GPUs. One that is slow with everybody is named once.

    Args:
        names: of the sides, N.
        all_to_all: [N, N] gigabytes a second, 0 where not measured; likewise all_reduce.
    """
    found: dict[tuple[int, int], str] = {}
    for kind, rates in (("all_reduce", all_reduce), ("all_to_all", all_to_all)):
        pairs = {(i, j): rates[i][j] for i in range(len(names)) for j in range(i) if rates[i][j] > 0}
        if len(pairs) < 3:
            continue
        usual = sorted(pairs.values())[int(0.75 * len(pairs))]
        for (i, j), rate in pairs.items():
            if rate < SLOW[kind] * usual:
                words = f"{gigabytes(rate)} GB/s in {kind.replace('_', '-')} where others have {gigabytes(usual)}"
                found.setdefault((j, i), words)
    lines, left = [], set(found)
    for index, name in enumerate(names):
        own = {pair for pair in found if index in pair}
        if len(own) == len(names) - 1 and len(names) > 2 and own & left:
            words = found[min(own)]
            lines.append(f"slow link of {name}, with every other: {words}; look at its adapter, cable and switch port")
            left -= own
    return lines + [
        f"slow link between {names[i]} and {names[j]}: {found[i, j]}; look at cables, switch and routes between them"
        for i, j in sorted(left)
    ]


def gigabytes(rate: float) -> str:
    """A rate with the digits that matter."""
    return f"{rate:.2g}" if rate < 100 else f"{rate:.0f}"
