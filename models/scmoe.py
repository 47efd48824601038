"""Blocks whose routed experts read an earlier representation through a shortcut (ScMoE, arXiv 2404.05019).

B batch, S sequence, H width. Of a dense block l and a shortcut block l+1, each sub-layer under a norm of its own:

    a_l   = h_{l-1} + Attn_l(h_{l-1})
    h_l   = a_l + MLP_l(a_l)
    a_l+1 = h_l + Attn_l+1(h_l)
    h_l+1 = a_l+1 + SE(a_l+1) + MoE(s)              scmoe, s = h_l (pos1), a_l (pos2) or h_{l-1} (pos3)
    h_l+1 = a_l+1 + MoE(a_l+1) + MoE(a_l)           dgmoe

With experts in every block there is no dense block l, and s = h_l. What the paper leaves open: the shortcut and the
current representation have norms of their own; weights are softmax over all experts' logits, then the best; the gate
of cg1 and cg2 reads the current representation as SE does, normed; the two choices of dgmoe share one router.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from occult_train.kernels.gating.autograd import gated
from occult_train.models.attention import AttendingBlock, Extend, Positions
from occult_train.models.config import ModelConfig
from occult_train.models.norm import BranchNorm, RMSNorm
from occult_train.models.recompute import Run
from occult_train.moe.layer import MoELayer, SwiGLU
from occult_train.moe.losses import LayerRouting
from occult_train.moe.overlap import Schedule, run_window

Shared = tuple[Tensor, Tensor | None]
"""h_l+1 but for the routed experts' output [B, S, H], and that one's weight [B, S, 1] or None."""


class DenseBlock(Protocol):
    """What a pair needs of its first block."""

    def attend(self, h: Tensor, at: Positions, extend: Extend | None = None) -> Tensor:
        """h + Attn(h)."""

    def feed(self, a: Tensor) -> tuple[Tensor, LayerRouting | None]:
        """a + MLP(a), and no routing."""


class ShortcutBlock(AttendingBlock):
    """The second block of a pair, as the steps that `run_pair` puts in order.

    Its experts' way is `route` (as early as the shortcut is known), `moe`, then `join` (after `attend` and `share`).
    """

    def __init__(self, config: ModelConfig, moe: MoELayer, run: Run) -> None:
        """moe: without a shared expert of its own; dual for dgmoe."""
        super().__init__(config, run)
        self.before, self.combine = config.scmoe.before, config.scmoe.combine
        self.dual = config.scmoe.block == "dgmoe"
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.shortcut_norm = RMSNorm(hidden, eps)
        self.moe = moe
        self.mlp_norm = BranchNorm(hidden, eps)
        self.shared_expert = None if self.dual else SwiGLU(hidden, config.shared_expert_intermediate_size)
        ways = config.scmoe.gate_size
        self.combine_gate = nn.Linear(hidden, ways, bias=False) if ways else None

    def route(self, shortcut: Tensor, current: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The inputs of `moe`: normed rows and their logits.

        Args:
            shortcut: s, [B, S, H].
            current: a_l+1 of dgmoe, whose rows [2B, S, H] are those of s, then these.
        """
        return self.run(self._route, shortcut, current)

    def share(self, a: Tensor) -> Shared:
        """From a_l+1 what does not wait for the routed experts."""
        return self.run(self._share, a)

    def join(self, shared: Shared, routed: Tensor) -> Tensor:
        """h_l+1 from what `share` gave and the experts' output for what `route` gave."""
        h, weight = shared
        return h + (routed if weight is None else weight * routed)

    def _route(self, shortcut: Tensor, current: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.shortcut_norm(shortcut)
        if current is not None:
            x = torch.cat((x, self.mlp_norm(current)[1]))
        return x, self.moe.router(x.flatten(0, 1))

    def _share(self, a: Tensor) -> Shared:
        assert self.shared_expert is not None
        a, x = self.mlp_norm(a)
        shared = self.shared_expert(x)
        if self.combine_gate is None:
            return a + shared, None
        gate = self.combine_gate(x)
        if self.combine == "cg1":
            return gated(shared, gate, a), None
        share = gate.softmax(dim=-1)
        return a + share[..., :1] * shared, share[..., 1:]


def run_pair(
    dense: DenseBlock | None,
    block: ShortcutBlock,
    h: Tensor,
    at: Positions,
    schedule: Schedule,
    extends: tuple[Extend | None, Extend | None] = (None, None),
) -> tuple[Tensor, LayerRouting]:
    """A dense block and a shortcut block: [B, S, H] -> [B, S, H], and the experts' routing.

    Tokens are routed as soon as the shortcut is known. When their experts are computed changes no bit.

    Args:
        dense: None with experts in every block.
        h: h_{l-1}; h_l without a dense block.
        schedule: of the window.
        extends: where the two attentions keep keys and values, if they do.
    """
    steps: list[Callable[[Any], Any]] = [lambda h: block.attend(h, at, extends[1]), block.share]
    first = block.before if dense is not None else 0
    if dense is not None:
        steps = [lambda h: dense.attend(h, at, extends[0]), lambda a: dense.feed(a)[0], *steps]
    if block.dual:
        return _run_dual(block, h, steps[:-1])
    for step in steps[:first]:
        h = step(h)
    chosen = block.moe.choose(*block.route(h))
    shared, routed_TH = run_window(schedule, block.moe, chosen, h, steps[first:])
    return block.join(shared, routed_TH.view_as(h)), chosen.routing


def _run_dual(block: ShortcutBlock, h: Tensor, steps: list[Callable[[Any], Any]]) -> tuple[Tensor, LayerRouting]:
    """Of dgmoe: the experts read what comes last, too, so they come after all else."""
    a = [h]
    for step in steps:
        a.append(step(a[-1]))
    routed, routing = block.moe(*block.route(a[block.before], a[-1]))
    earlier, current = routed.chunk(2)
    return a[-1] + current + earlier, routing
