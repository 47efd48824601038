"""Bandwidth of all-to-all and all-reduce between every two hosts, and every two ranks of a host.

Run on each rank as training is (`occult doctor` starts it); rank 0 prints the matrices. Several pairs are measured at
once, no host or rank in two of them. The ranks of a pair of hosts work together, as they do in training.
"""

import argparse
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import accumulate
from typing import Any

from occult_train import distributed

MARK = "occult-doctor "
"""What a line for `occult doctor` holds before its JSON."""
BUDGET = 20.0
"""Seconds after which no further pairs are measured."""
LIMIT = 50.0
"""Seconds that ranks may take to meet, and then to measure, whatever they wait for."""
ENOUGH = 0.1
"""Seconds that a message shall take; its size is quadrupled until it does."""
LEAST_BYTES = 1 << 16
MOST_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}
REPETITIONS = 3

Pair = tuple[int, int]
Game = tuple[int, Pair, list[int], list[int]]
"""Which matrix it belongs to, where there, and the ranks of both sides."""


def tournament(players: int) -> list[list[Pair]]:
    """Rounds in which each two of the players meet once, and nobody twice in a round."""
    seats: list[int | None] = [*range(players), *([None] if players % 2 else [])]
    rounds = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        rounds.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def measure(slots: Sequence[int], rank: int, device: Any) -> dict[str, Any]:
    """Gigabytes a second each way. Collective.

    Args:
        slots: ranks of each host, in their order.
        rank: this one's.
        device: of the tensors, as torch has it.

    Returns:
        `across`, of hosts, and `inside`, a list with an element a host, of its ranks: matrices by the collective's
        name, 0 where a pair was not measured; `complete`, whether all were.
    """
    import torch
    import torch.distributed as dist

    starts, began = [0, *accumulate(slots)], time.monotonic()
    hosts, most = len(slots), max(slots)
    # [H + 1 matrices, of which the last is of hosts; 2 collectives; sides; sides]
    found = torch.zeros(hosts + 1, 2, max(hosts, most), max(hosts, most), dtype=torch.float64, device=device)

    def inside(first: int, second: int) -> list[Game]:
        having = [host for host in range(hosts) if second < slots[host]]
        return [(h, (first, second), [starts[h] + first], [starts[h] + second]) for h in having]

    def across(first: int, second: int) -> list[Game]:
        width = min(slots[first], slots[second])
        left, right = ([*range(starts[host], starts[host] + width)] for host in (first, second))
        return [(hosts, (first, second), left, right)]

    complete = True
    games: list[tuple[Callable[[int, int], list[Game]], list[Pair]]] = [(across, pairs) for pairs in tournament(hosts)]
    games += [(inside, pairs) for pairs in tournament(most)]
    for kind, pairs in games:
        elapsed = torch.tensor(time.monotonic() - began, device=device)
        dist.all_reduce(elapsed, dist.ReduceOp.MAX)
        if elapsed.item() > BUDGET:
            complete = False
            break
        for matrix, (one, other), left, right in (game for pair in pairs for game in kind(*pair)):
            if rank in (*left, *right):
                rates = _measure_pair(left, right, rank, device)
                if rank == left[0]:
                    found[matrix, :, one, other] = found[matrix, :, other, one] = torch.tensor(rates).to(found)
    dist.all_reduce(found)
    tables = [_table(found[h], slots[h]) for h in range(hosts)]
    return {"across": _table(found[hosts], hosts), "inside": tables, "complete": complete, "device": device.type}


def _table(rates: Any, size: int) -> dict[str, Any]:
    to_all, reduced = rates[:, :size, :size].tolist()
    return {"all_to_all": to_all, "all_reduce": reduced}


def _measure_pair(left: list[int], right: list[int], rank: int, device: Any) -> tuple[float, float]:
    """Gigabytes a second that cross from one side to the other, as much coming back: of all-to-all, in which each rank
    sends as much to each of the other side, and of all-reduce, by the bytes of a ring."""
    import torch
    import torch.distributed as dist

    members = [*left, *right]
    group = dist.new_group(members, timeout=timedelta(seconds=LIMIT), use_local_synchronization=True)
    others, width = (right, left)[rank in right], len(left)

    def to_all(nbytes: int) -> Callable[[], Any]:
        count = nbytes // 4 // width
        splits = [count if member in others else 0 for member in members]
        source, target = (torch.ones(count * width, device=device) for _ in range(2))
        return lambda: dist.all_to_all_single(target, source, splits, splits, group=group)

    def reduced(nbytes: int) -> Callable[[], Any]:
        values = torch.zeros(nbytes // 4, device=device)
        return lambda: dist.all_reduce(values, group=group)

    def rate(make: Callable[[int], Callable[[], Any]]) -> float:
        nbytes, most = LEAST_BYTES, MOST_BYTES[device.type]
        make(nbytes)()  # connects
        while (seconds := _seconds(make(nbytes), group, device)) < ENOUGH and nbytes < most:
            nbytes *= 4
        run = make(nbytes)
        return nbytes / statistics.median([seconds, *(_seconds(run, group, device) for _ in range(REPETITIONS - 1))])

    try:
        ring = 2 * (len(members) - 1) / len(members)
        return rate(to_all) * width / 1e9, rate(reduced) * ring / 1e9
    finally:
        dist.destroy_process_group(group)


def _seconds(run: Callable[[], Any], group: Any, device: Any) -> float:
    """Of the slowest rank of the group."""
    import torch
    import torch.distributed as dist

    settle: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    dist.barrier(group)
    settle()
    before = time.perf_counter()
    run()
    settle()
    slowest = torch.tensor(time.perf_counter() - before, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    return float(slowest)


def _give_up() -> None:
    print(f"{MARK}{json.dumps({'error': f'measuring did not end within {LIMIT:.0f} s'})}", flush=True)
    os._exit(1)


def main() -> int:
    """The life of one rank."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--slots", required=True)
    slots = [int(count) for count in parser.parse_known_args()[0].slots.split(",")]
    distributed.prepare_environment()
    try:
        import torch

        world = distributed.initialize(timeout=timedelta(seconds=LIMIT))
        watchdog = threading.Timer(LIMIT, _give_up)
        watchdog.daemon = True
        watchdog.start()
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        found = measure(slots, world.rank, device)
        if world.rank == 0:
            print(f"{MARK}{json.dumps(found)}", flush=True)
        distributed.shutdown()
    except Exception as error:
        words = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"{MARK}{json.dumps({'error': words[:300]})}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
