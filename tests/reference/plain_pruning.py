"""Collaboration pruning a token at a time, in plain Python, from the method's text."""

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class PrunedToken:
    """One token's experts by place in its top-K, and their weights' experts."""

    experts: list[int]
    weighed: list[int]
    """Whose probability each place's weight is."""


def top_k(scores: list[float], k: int) -> list[int]:
    """The K best, best first, ties to the lower id."""
    return sorted(range(len(scores)), key=lambda expert: (-scores[expert], expert))[:k]


def prune_token(
    scores: list[float],
    k: int,
    devices: list[int],
    limit: int,
    similarity: list[list[float]] | None = None,
    inherit: bool = False,
) -> PrunedToken:
    """Limit one token to `limit` devices; devices[e] is where expert e lives."""
    chosen = top_k(scores, k)
    if len({devices[expert] for expert in chosen}) <= limit:
        return PrunedToken(chosen, chosen)
    opened: list[int] = []
    for expert in chosen:
        if devices[expert] not in opened and len(opened) < limit:
            opened.append(devices[expert])
    final = {place: expert for place, expert in enumerate(chosen) if devices[expert] in opened}
    for place, expert in enumerate(chosen):
        if place in final:
            continue
        inside = [e for e in range(len(scores)) if devices[e] in opened and e not in final.values()]
        worth = scores if similarity is None else similarity[expert]
        final[place] = min(inside, key=lambda e: (-worth[e], e))
    experts = [final[place] for place in range(k)]
    return PrunedToken(experts, chosen if inherit else experts)


def best_on_open_devices(scores: list[float], k: int, devices: list[int], limit: int) -> set[int]:
    """The `router` policy as the method words it: the K highest-scoring of all experts on open devices."""
    opened: set[int] = set()
    for expert in top_k(scores, k):
        if len(opened) < limit:
            opened.add(devices[expert])
    inside = [e for e in range(len(scores)) if devices[e] in opened]
    return set(sorted(inside, key=lambda e: (-scores[e], e))[:k])


def cosine(columns: list[list[float]]) -> list[list[float]]:
    """[E][E] of E columns, in exact sums of products."""
    from math import sqrt

    def dot(a: list[float], b: list[float]) -> Fraction:
        return sum((Fraction(x) * Fraction(y) for x, y in zip(a, b, strict=True)), Fraction(0))

    norms = [sqrt(dot(column, column)) for column in columns]
    return [
        [float(dot(a, b)) / (p * q) for b, q in zip(columns, norms, strict=True)]
        for a, p in zip(columns, norms, strict=True)
    ]
