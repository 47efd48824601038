"""Pruning in Triton: a part of the routing kernel, which holds a block's scores and choice in registers.

Example, K=2, devices {0, 1} and {2, 3}, one open: scores [.1, .4, .2, .3] choose experts 1 and 3. Expert 1 opens the
first device; expert 3 lies outside, and expert 0, the only free one inside, takes its place.
"""

import triton
import triton.language as tl


@triton.jit
def replace(
    score, experts_BK, chosen, slots, similarity, devices, group_size,
    E: tl.constexpr, K: tl.constexpr, EP: tl.constexpr, KP: tl.constexpr, B: tl.constexpr, SIMILAR: tl.constexpr,
):  # fmt: skip
    """Experts [B, KP] of a block of tokens after pruning, and as ones [B, EP]; see `reference.prune`.

    score [B, EP] holds no NaN. The choice: experts_BK, distinct in its first K columns, and as ones `chosen` [B, EP].
    """
    e, k = tl.arange(0, EP), tl.arange(0, KP)
    group = (tl.load(slots + e, mask=e < E, other=0) // group_size).to(tl.int32)
    group = tl.where(e < E, group, -1)
    reached = tl.zeros([B, EP], tl.int32)  # experts on open devices
    count = tl.zeros([B], tl.int32)
    for i in tl.static_range(K):
        hit = e[None, :] == tl.sum(tl.where((k == i)[None, :], experts_BK, 0), 1)[:, None]
        fresh = (tl.sum(tl.where(hit, reached, 0), 1) == 0) & (count < devices)
        device = tl.where(fresh, tl.sum(tl.where(hit, group[None, :], 0), 1), -2)
        reached = tl.where(group[None, :] == device[:, None], 1, reached)
        count += fresh.to(tl.int32)
    free = reached * (1 - chosen)
    used = tl.zeros([B, EP], tl.int32)
    for i in tl.static_range(K):
        here = (k == i)[None, :]
        expert = tl.sum(tl.where(here, experts_BK, 0), 1)
        outside = tl.sum(tl.where(e[None, :] == expert[:, None], reached, 0), 1) == 0
        if SIMILAR:
            wanted = (free > 0) & outside[:, None]
            worth = tl.load(similarity + expert[:, None] * E + e[None, :], mask=wanted, other=float("-inf"))
        else:
            worth = tl.where(free > 0, score, float("-inf"))
        best = tl.max(worth, 1)
        other = tl.min(tl.where(worth == best[:, None], e[None, :], EP), 1)
        expert = tl.where(outside, other, expert)
        hit = e[None, :] == expert[:, None]
        free = tl.where(hit, 0, free)
        used = tl.where(hit, 1, used)
        experts_BK = tl.where(here, expert[:, None], experts_BK)
    return experts_BK, used
