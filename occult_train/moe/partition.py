"""A first partition by Mt-KaHyPar, a multilevel hypergraph partitioner: vertices are experts, hyperedges the K-sets.

C_T is its connectivity objective (km1) plus one. Its own seed and its deterministic preset make the result repeatable.
"""

import functools
from typing import Any

import numpy as np

from occult_train.errors import PlacementError
from occult_train.moe.spread import Ints, Sets

EDGES = 10_000
"""Distinct sets given to the partitioner, drawn by weight; exchanges then go by more."""


def partition(sets: Sets, devices: int, nodes: int, seed: int) -> Ints:
    """Devices [E], equally many experts on each, with few devices, and before that few nodes, to a set.

    Raises:
        PlacementError: the partitioner is not installed.
    """
    sets = sets.sample(EDGES, np.random.default_rng(seed))
    every = np.arange(sets.experts)
    node_E = _parts(sets, every, nodes, seed)
    device_E = np.zeros(sets.experts, dtype=np.int64)
    per_node = devices // nodes
    for node in range(nodes):
        members = every[node_E == node]
        device_E[members] = node * per_node + _parts(sets, members, per_node, seed)
    return device_E


def _parts(sets: Sets, members: Ints, parts: int, seed: int) -> Ints:
    """A part for each of the members, by the sets restricted to them; sizes are equal."""
    if parts == 1:
        return np.zeros(members.size, dtype=np.int64)
    if parts == members.size:
        return np.arange(parts)
    edges, weights = _edges(sets, members)
    if not edges:
        return np.arange(members.size) % parts
    library, initializer = _initialized()
    library.set_seed(seed)
    context = initializer.context_from_preset(library.PresetType.DETERMINISTIC)
    context.set_partitioning_parameters(parts, 0.0, library.Objective.KM1)
    context.logging = False
    graph = initializer.create_hypergraph(context, members.size, len(edges), edges, [1] * members.size, weights)
    return _equal_sizes(np.array(graph.partition(context).get_partition(), dtype=np.int64), parts)


def _edges(sets: Sets, members: Ints) -> tuple[list[list[int]], list[int]]:
    """Hyperedges of at least two members, as indices into them, and their weights."""
    index_E = np.full(sets.experts, -1)
    index_E[members] = np.arange(members.size)
    local_UK = index_E[sets.members_UK]
    several = (local_UK >= 0).sum(1) > 1
    edges = [[i for i in row if i >= 0] for row in local_UK[several].tolist()]
    return edges, sets.weight_U[several].astype(int).tolist()


def _equal_sizes(part_E: Ints, parts: int) -> Ints:
    """The partitioner keeps sizes equal or, where it fails to, moves experts of the largest parts to the smallest."""
    size = part_E.size // parts
    count = np.bincount(part_E, minlength=parts)
    for part in np.flatnonzero(count > size):
        for expert in np.flatnonzero(part_E == part)[size:]:
            part_E[expert] = int(count.argmin())
            count = np.bincount(part_E, minlength=parts)
    return part_E


@functools.cache
def _initialized() -> tuple[Any, Any]:
    """The library and its one thread pool, which a process may make once."""
    try:
        import mtkahypar
    except ImportError as error:
        raise PlacementError(
            f"placement by hypergraph needs the package mtkahypar, which cannot be imported ({error}); "
            "greedy needs none"
        ) from None
    return mtkahypar, mtkahypar.initialize(1)
