"""Naming the devices and slots of a new placement so that few experts have to move. Pure functions.

Which device is called 0 and which slot of a device an expert has makes no difference to C_T. E experts, D devices.
"""

from occult_train.moe.placement import Placement


def settle(old: Placement, new: Placement, devices: int, nodes: int = 1) -> Placement:
    """`new` with its devices renamed and its slots reordered: the same experts share a device, and the same devices a
    node, but as many as a greedy choice finds stay where `old` has them.

    Args:
        devices: D, which divides E.
        nodes: devices d·D/nodes to (d+1)·D/nodes − 1 are one node.
    """
    sets = [set(group) for group in new.by_device(devices)]
    homes = [set(group) for group in old.by_device(devices)]
    each = devices // nodes
    node_sets, node_homes = ([set().union(*g[n * each : (n + 1) * each]) for n in range(nodes)] for g in (sets, homes))
    slots: list[int] = []
    for home_node, node in enumerate(_match(node_homes, node_sets)):
        inside = sets[node * each : (node + 1) * each]
        for device, chosen in enumerate(_match(homes[home_node * each : (home_node + 1) * each], inside)):
            slots += _keep_slots(old.by_device(devices)[home_node * each + device], inside[chosen])
    return Placement(tuple(slots))


def _match(homes: list[set[int]], sets: list[set[int]]) -> list[int]:
    """For each home the set that goes there: largest overlap first, ties to the lower home, then the lower set."""
    pairs = [(-len(home & group), h, g) for h, home in enumerate(homes) for g, group in enumerate(sets)]
    chosen: dict[int, int] = {}
    for _, home, group in sorted(pairs):
        if home not in chosen and group not in chosen.values():
            chosen[home] = group
    return [chosen[home] for home in range(len(homes))]


def _keep_slots(before: list[int], experts: set[int]) -> list[int]:
    """The experts of a device in slots: who was there stays in its slot, newcomers fill the others in order."""
    newcomers = iter(sorted(experts - set(before)))
    return [expert if expert in experts else next(newcomers) for expert in before]
