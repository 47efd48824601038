"""Uniform samples without replacement: of a stream, and of several samples made one. Pure functions of a seed."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Seed = tuple[int, ...]
"""Any whole numbers that are not negative."""
_RESERVOIR, _SHARES, _PICK = range(1, 4)
"""What numbers are drawn for; SeedSequence takes no notice of zeros at its end."""


@lru_cache(maxsize=4)
def reservoir_draw(seed: Seed, seen: int, arriving: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which arriving items enter a reservoir, and where: algorithm R (Vitter, doi:10.1145/3147.3165) for many at once.

    The first `size` items of the stream fill the places in their order. Item i (from 0) after them enters with
    probability size / (i + 1), at a uniform place; where two take the same, the later one stays. All
    layers of a model, which see the same tokens, share one draw and one copy to the device.

    Args:
        seed: of the whole stream.
        seen: items before these.
        arriving: items now.
        size: places of the reservoir.

    Returns:
        indices among the arriving items and places in the reservoir, both int64 [A] on `device`, places distinct.
    """
    random = _generator(_RESERVOIR, *seed, seen)
    filling = np.arange(min(arriving, max(size - seen, 0)))
    later = len(filling) + _entering(random, seen + len(filling), arriving - len(filling), size)
    entering = np.concatenate((filling, later))
    places = np.concatenate((seen + filling, random.integers(0, max(size, 1), len(later))))
    # np.unique finds first occurrences: of the reversed row, the last one
    kept, first = np.unique(places[::-1], return_index=True)
    items = entering[::-1][first]
    return tuple(torch.from_numpy(a).to(device, non_blocking=True) for a in (items, kept))  # type: ignore[return-value]


def _entering(random: np.random.Generator, seen: int, arriving: int, size: int) -> NDArray[np.int64]:
    """Which arriving items enter a full reservoir, ascending, in time of their number: those that would if all were as
    likely as the first, found by the gaps between them, of which each is kept by its own likelihood."""
    chance = size / (seen + 1)
    found = np.zeros(0, dtype=np.int64)
    last = -1
    while chance and last < arriving - 1:
        some = last + np.cumsum(random.geometric(chance, int(1.1 * chance * arriving) + 20))
        found, last = np.concatenate((found, some)), int(some[-1])
    found = found[found < arriving]
    return found[random.random(len(found)) * (seen + found + 1) < seen + 1]


def shares(totals: list[int], held: list[int], limit: int | None, seed: int) -> list[int]:
    """How many items each part gives to a uniform sample of all parts' items, from uniform samples of the parts.

    The split is what a draw of that many out of all items without replacement would give (multivariate
    hypergeometric). The sample is as large as is certain to work: all items if every part holds all of its, else
    the smallest of the incomplete samples.

    Args:
        totals: items of each part.
        held: how many of them are in the part's sample.
        limit: the largest sample wanted; None for no limit.
        seed: of the draw.
    """
    incomplete = [h for t, h in zip(totals, held, strict=True) if h < t]
    size = min([sum(totals), *incomplete, *([] if limit is None else [limit])])
    if size == sum(totals):
        return list(totals)
    chosen = _generator(_SHARES, seed).choice(sum(totals), size, replace=False, shuffle=False)
    part = np.searchsorted(np.cumsum(totals), chosen, side="right")
    return np.bincount(part, minlength=len(totals)).tolist()


def pick(rows: Tensor, count: int, seed: int, part: int) -> Tensor:
    """`count` of the rows, uniformly without replacement, in their order; `part` sets draws of one seed apart."""
    if count == len(rows):
        return rows
    chosen: NDArray[Any] = _generator(_PICK, seed, part).choice(len(rows), count, replace=False, shuffle=False)
    return rows[torch.from_numpy(np.sort(chosen)).to(rows.device)]


def _generator(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
