"""From router logits to experts and weights in Triton: two launches forward, one backward. See `reference.py`.

A program holds the logits of a block of tokens in registers, so softmax, choice and sums read them once. Sums over
tokens are added up block by block in a fixed order. Equal scores go to the lower expert; scores that are no numbers
come last. Pruning (kernels/pruning) replaces experts between the choice and all that follows from it.

Example, K=2, logits log [.1, .4, .2, .3], bias 0: experts [1, 3], weights [.4, .3], normalised [.571, .429].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from occult_train.kernels.launching import parts, power_of_2, quick
from occult_train.kernels.pruning.kernel import replace
from occult_train.kernels.pruning.reference import Pruning
from occult_train.kernels.routing.reference import Routing

LEAST = tl.constexpr(-3.0e38)


@triton.jit
def _softmax(logits, t, e, T, E):
    """Probabilities [B, EP], 0 beyond E, and logsumexp [B], of a block of tokens."""
    inside = (t < T)[:, None] & (e < E)[None, :]
    x = tl.load(logits + t.to(tl.int64)[:, None] * E + e[None, :], mask=inside, other=float("-inf"))
    x = tl.where((t < T)[:, None], x, 0.0)  # tokens beyond the end are computed too, but never stored
    top = tl.max(x, 1)
    exp = tl.exp(x - top[:, None])
    total = tl.sum(exp, 1)
    return exp / total[:, None], top + tl.log(total)


@quick
@triton.jit
def _forward_kernel(
    logits, bias, experts, weights, sums, slots, similarity, weighed, T, devices, group_size,
    E: tl.constexpr, K: tl.constexpr, EP: tl.constexpr, KP: tl.constexpr, B: tl.constexpr, NORMALISE: tl.constexpr,
    PRUNE: tl.constexpr, SIMILAR: tl.constexpr, INHERIT: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * B + tl.arange(0, B)
    e, k = tl.arange(0, EP), tl.arange(0, KP)
    probs, lse = _softmax(logits, t, e, T, E)
    score = probs + tl.load(bias + e, mask=e < E, other=0.0)[None, :]
    score = tl.where(score == score, score, LEAST)
    score = tl.where((e < E)[None, :], score, float("-inf"))
    whole = score
    chosen = tl.zeros([B, EP], tl.int32)
    experts_BK = tl.zeros([B, KP], tl.int32)
    weights_BK = tl.zeros([B, KP], tl.float32)
    for i in tl.static_range(K):
        best = tl.max(score, 1)
        expert = tl.min(tl.where(score == best[:, None], e[None, :], EP), 1)
        hit = e[None, :] == expert[:, None]
        here = (k == i)[None, :]
        experts_BK = tl.where(here, expert[:, None], experts_BK)
        weights_BK = tl.where(here, tl.sum(tl.where(hit, probs, 0.0), 1)[:, None], weights_BK)
        chosen += hit.to(tl.int32)
        score = tl.where(hit, float("-inf"), score)
    at = t.to(tl.int64)[:, None] * K + k[None, :]
    inside = (t < T)[:, None] & (k < K)[None, :]
    if PRUNE:
        if INHERIT:
            tl.store(weighed + at, experts_BK.to(tl.int64), mask=inside)
        experts_BK, chosen = replace(
            whole, experts_BK, chosen, slots, similarity, devices, group_size, E, K, EP, KP, B, SIMILAR
        )  # fmt: skip
        if not INHERIT:
            for i in tl.static_range(K):
                here = (k == i)[None, :]
                hit = e[None, :] == tl.sum(tl.where(here, experts_BK, 0), 1)[:, None]
                weights_BK = tl.where(here, tl.sum(tl.where(hit, probs, 0.0), 1)[:, None], weights_BK)
    if NORMALISE:
        weights_BK = weights_BK / tl.sum(weights_BK, 1)[:, None]
    tl.store(experts + at, experts_BK.to(tl.int64), mask=inside)
    tl.store(weights + at, weights_BK, mask=inside)
    there = (t < T)[:, None]
    first = sums + tl.program_id(0) * (2 * E + 1)
    tl.store(first + e, tl.sum(tl.where(there, probs, 0.0), 0), mask=e < E)
    tl.store(first + E + e, tl.sum(tl.where(there, chosen, 0), 0).to(tl.float32), mask=e < E)
    tl.store(first + 2 * E, tl.sum(tl.where(t < T, lse * lse, 0.0), 0))


@quick
@triton.jit
def _sum_kernel(sums, mean, z, loads, block_count, T, E: tl.constexpr, VP: tl.constexpr):
    """One program. Columns of sums [blocks, 2E + 1]: probabilities, counts, squared logsumexp."""
    v = tl.arange(0, VP)
    V: tl.constexpr = 2 * E + 1
    total = tl.zeros([VP], tl.float32)
    for first in range(0, block_count, 16):
        b = first + tl.arange(0, 16)
        inside = (b < block_count)[:, None] & (v < V)[None, :]
        total += tl.sum(tl.load(sums + b[:, None] * V + v[None, :], mask=inside, other=0.0), 0)
    tokens = T * 1.0
    tl.store(mean + v, total / tokens, mask=v < E)
    tl.store(loads + v - E, total.to(tl.int64), mask=(v >= E) & (v < 2 * E))
    tl.store(z + v - 2 * E, total / tokens, mask=v == 2 * E)


@quick
@triton.jit
def _backward_kernel(
    logits, experts, d_weights, d_mean, d_z, out, T,
    E: tl.constexpr, K: tl.constexpr, EP: tl.constexpr, KP: tl.constexpr, B: tl.constexpr, NORMALISE: tl.constexpr,
    WEIGHTS: tl.constexpr, MEAN: tl.constexpr, Z: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * B + tl.arange(0, B)
    e = tl.arange(0, EP)
    probs, lse = _softmax(logits, t, e, T, E)
    tokens = T * 1.0
    d_probs = tl.zeros([B, EP], tl.float32)
    if WEIGHTS:
        total = tl.zeros([B], tl.float32)
        dot = tl.zeros([B], tl.float32)
        for i in tl.static_range(K):
            at = t.to(tl.int64) * K + i
            hit = e[None, :] == tl.load(experts + at, mask=t < T, other=0)[:, None]
            d = tl.load(d_weights + at, mask=t < T, other=0.0)
            p = tl.sum(tl.where(hit, probs, 0.0), 1)
            total += p
            dot += d * p
            d_probs += tl.where(hit, d[:, None], 0.0)
        if NORMALISE:
            chosen = tl.zeros([B, EP], tl.int32)
            for i in tl.static_range(K):
                expert = tl.load(experts + t.to(tl.int64) * K + i, mask=t < T, other=0)
                chosen += (e[None, :] == expert[:, None]).to(tl.int32)
            # w = p / sum p: dp = (dw - sum dw w) / sum p
            d_probs = tl.where(chosen > 0, (d_probs - (dot / total)[:, None]) / total[:, None], 0.0)
    if MEAN:
        d_probs += (tl.load(d_mean + e, mask=e < E, other=0.0) / tokens)[None, :]
    d_logits = probs * (d_probs - tl.sum(probs * d_probs, 1)[:, None])
    if Z:
        d_logits += (2.0 * tl.load(d_z) / tokens * lse)[:, None] * probs
    inside = (t < T)[:, None] & (e < E)[None, :]
    tl.store(out + t.to(tl.int64)[:, None] * E + e[None, :], d_logits, mask=inside)


def _block(experts: int) -> dict[str, int]:
    """Tokens of a program: some 2,048 values in registers."""
    padded = power_of_2(experts)
    return {"EP": padded, "B": max(8, min(64, 2048 // padded))}


def route(
    logits_TE: Tensor, bias_E: Tensor, top_k: int, normalise: bool, pruning: Pruning | None = None
) -> Routing:  # fmt: skip
    """As the reference's, without gradients; fp32.

    Raises:
        ValueError: shapes or types that do not fit.
    """
    return forward(logits_TE, bias_E, top_k, normalise, pruning)[0]


def forward(
    logits_TE: Tensor, bias_E: Tensor, top_k: int, normalise: bool, pruning: Pruning | None
) -> tuple[Routing, Tensor]:
    """What `route` gives, and the experts [T, K] whose probabilities the weights are, for `backward`."""
    _check(logits_TE)
    tokens, experts = logits_TE.shape
    if bias_E.shape != (experts,) or bias_E.dtype != torch.float32 or not 0 < top_k <= experts:
        raise ValueError(f"{experts} experts, {top_k} a token, bias {bias_E.dtype} {tuple(bias_E.shape)}")
    if pruning is not None:
        _check_pruning(pruning, experts, top_k)
    inherit = pruning is not None and pruning.inherit
    block = _block(experts)
    blocks = -(-tokens // block["B"])
    choices = [(tokens, top_k)] * (1 + inherit)
    *kept, counts = parts(logits_TE, torch.int64, [*choices, (experts,)])
    weights, mean, z = parts(logits_TE, torch.float32, [(tokens, top_k), (experts,), ()])
    found = Routing(kept[0], weights, mean, z, counts)
    sums = logits_TE.new_empty(blocks, 2 * experts + 1)
    tables = (None, None) if pruning is None else (pruning.slots_E, pruning.similarity_EE)
    numbers = (0, 0) if pruning is None else (pruning.devices, pruning.group_size)
    if tokens:
        _forward_kernel[(blocks,)](
            logits_TE, bias_E, found.experts_TK, found.weights_TK, sums,
            *tables, kept[1] if inherit else None, tokens, *numbers,
            E=experts, K=top_k, KP=power_of_2(top_k), NORMALISE=normalise,
            PRUNE=pruning is not None, SIMILAR=tables[1] is not None, INHERIT=inherit, **block,
        )  # fmt: skip
    _sum_kernel[(1,)](
        sums,
        found.mean_prob_E,
        found.z,
        found.counts_E,
        blocks,
        max(tokens, 1),
        E=experts,
        VP=power_of_2(2 * experts + 1),
    )
    return found, kept[-1]


def _check_pruning(pruning: Pruning, experts: int, top_k: int) -> None:
    slots, similarity, size = pruning.slots_E, pruning.similarity_EE, pruning.group_size
    if slots.shape != (experts,) or slots.dtype != torch.int64 or experts % size:
        raise ValueError(f"{experts} experts in groups of {size}, slots {slots.dtype} {tuple(slots.shape)}")
    if pruning.devices * size < top_k:
        raise ValueError(f"{pruning.devices} devices of {size} experts do not hold {top_k}")
    if similarity is None:
        return
    if similarity.shape != (experts, experts) or similarity.dtype != torch.float32 or not similarity.is_contiguous():
        found = f"{similarity.dtype} {tuple(similarity.shape)}"
        raise ValueError(f"similarity must be contiguous fp32 [{experts}, {experts}], got {found}")


def backward(
    logits_TE: Tensor, experts_TK: Tensor, normalise: bool,
    d_weights_TK: Tensor | None, d_mean_E: Tensor | None, d_z: Tensor | None,
) -> Tensor:  # fmt: skip
    """Gradient of the logits [T, E] from those of weights, mean probabilities and z; None counts as zeros."""
    _check(logits_TE)
    (tokens, experts), top_k = logits_TE.shape, experts_TK.shape[1]
    out = torch.empty_like(logits_TE)
    given = [None if d is None else d.contiguous() for d in (d_weights_TK, d_mean_E, d_z)]
    block = _block(experts)
    if tokens:
        _backward_kernel[(-(-tokens // block["B"]),)](
            logits_TE, experts_TK, *given, out, tokens,
            E=experts, K=top_k, KP=power_of_2(top_k), NORMALISE=normalise,
            WEIGHTS=given[0] is not None, MEAN=given[1] is not None, Z=given[2] is not None, **block,
        )  # fmt: skip
    return out


def _check(logits_TE: Tensor) -> None:
    if logits_TE.dim() != 2 or logits_TE.dtype != torch.float32 or not logits_TE.is_contiguous():
        raise ValueError(f"logits must be contiguous fp32 [T, E], got {logits_TE.dtype} {tuple(logits_TE.shape)}")
