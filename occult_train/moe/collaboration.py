"""How far tokens spread over devices: Occult's C_T and the collaborations of experts.

T tokens, E experts, K experts a token, N sampled tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from occult_train.moe.sampling import Seed, reservoir_draw

EXACT_IN_FP32 = 2**24
"""Up to here fp32 counts without a gap."""


@dataclass(frozen=True)
class CollaborationCounts:
    """Sums over tokens of what a meter saw; add counts of ranks before taking the ratios."""

    tokens: float
    devices: float
    """|devices(t)|."""
    pairs: float
    """Ordered pairs of experts chosen by one token."""
    intra_pairs: float
    """Those of them on one device."""
    remote_devices: float
    """Devices other than home: the rows that a deduplicated dispatch sends."""
    remote_experts: float
    """Chosen experts on devices other than home: the rows that K copies would send."""

    @property
    def c_t(self) -> float:
        """Mean number of devices a token needs."""
        return self.devices / max(self.tokens, 1.0)

    @property
    def intra_share(self) -> float:
        """Share of collaborations inside one device."""
        return self.intra_pairs / max(self.pairs, 1.0)


@dataclass(frozen=True)
class LayerStatistics:
    """How one layer's experts were chosen together: what placement is solved from. E experts, K a token, all on CPU."""

    tokens: int
    """Tokens counted."""
    loads_E: Tensor
    """[E] int64: times that an expert was chosen."""
    pairs_EE: Tensor
    """[E, E] int64, symmetric, zero diagonal: times that two experts were chosen by one token."""
    sets_NK: Tensor
    """[N, K] int16: a uniform sample of the tokens' whole choices, each in ascending order of expert."""
    logit_products_EE: Tensor | None = None
    """[E, E] fp64, symmetric: inner products of the experts' columns of router logits, squared norms on the diagonal;
    None if they were not asked for."""

    @classmethod
    def of(
        cls, tokens: int, products_EE: Tensor, sets_NK: Tensor, logit_products_EE: Tensor | None = None
    ) -> "LayerStatistics":
        """From C^T C of the choices as zeros and ones C [T, E], whose diagonal are the loads, and X^T X of logits X."""
        pairs_EE = products_EE.to("cpu", torch.int64, copy=True)
        loads_E = pairs_EE.diagonal().clone()
        if logit_products_EE is not None:  # a matrix product need not be symmetric to the last bit
            logit_products_EE = ((logit_products_EE + logit_products_EE.T) / 2).cpu()
        return cls(tokens, loads_E, pairs_EE.fill_diagonal_(0), sets_NK.cpu(), logit_products_EE)


class CollaborationMeter:
    """Sums `CollaborationCounts` of one layer while `enabled`; costs nothing otherwise."""

    FIELDS = 6

    def __init__(self, home: int, devices: int) -> None:
        self.home, self.devices = home, devices
        self.enabled = False
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add(self, device_TK: Tensor) -> None:
        """Count tokens whose K experts live on devices [T, K]."""
        if not self.enabled:
            return
        tokens, k = device_TK.shape
        experts_TD = device_TK.new_zeros(tokens, self.devices).scatter_add(1, device_TK, torch.ones_like(device_TK))
        used_TD = experts_TD > 0
        size = device_TK.new_tensor(tokens)
        parts = [
            size,
            used_TD.sum(),
            size * k * (k - 1),
            (experts_TD * (experts_TD - 1)).sum(),
            used_TD.sum() - used_TD[:, self.home].sum(),
            experts_TD.sum() - experts_TD[:, self.home].sum(),
        ]
        sums = torch.stack(parts).to(torch.float64)
        self._sums = sums if self._sums is None else self._sums + sums

    def drain(self, device: torch.device) -> Tensor:
        """The six sums in the order of `CollaborationCounts` [6] fp64, and start again from zero."""
        sums = torch.zeros(self.FIELDS, dtype=torch.float64, device=device) if self._sums is None else self._sums
        self._sums = None
        return sums


class RoutingCounter:
    """Counts how one layer's experts are chosen, exactly and without making the host wait: some six small kernels a
    micro-batch, the largest of them a product of T·E² multiplications.

    Args:
        experts: E.
        top_k: K.
        sample: N, whole choices to keep.
        seed: of the sample; counters of one seed that see equally many tokens sample the same ones.
    """

    def __init__(self, experts: int, top_k: int, sample: int, seed: Seed) -> None:
        self.experts, self.top_k, self.sample, self.seed = experts, top_k, sample, seed
        self.tokens = 0
        """Counted so far."""
        self._sums: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def add(self, experts_TK: Tensor) -> None:
        """Count tokens with their chosen experts [T, K] int64, each expert at most once a token."""
        pairs_EE, sets_NK = self._sums_on(experts_TK.device)
        for part_TK in experts_TK.split(EXACT_IN_FP32):
            pairs_EE += _products(part_TK, self.experts)
        items, places = reservoir_draw(self.seed, self.tokens, len(experts_TK), self.sample, experts_TK.device)
        sets_NK.index_copy_(0, places, experts_TK.index_select(0, items).to(sets_NK.dtype))
        self.tokens += len(experts_TK)

    STATE = ("tokens", "pairs", "sets")

    def state(self, device: torch.device) -> dict[str, Tensor]:
        """Everything counted, on the host: tokens [1], pairs [E, E], and the places of the reservoir in use."""
        pairs_EE, sets_NK = self._sums_on(device)
        return {"tokens": torch.tensor([self.tokens]), "pairs": pairs_EE.cpu(), "sets": sets_NK[: self.tokens].cpu()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave, moved to the layer's device."""
        pairs_EE, sets_NK = self._sums_on(state["pairs"].device)
        pairs_EE.copy_(state["pairs"])
        sets_NK[: len(state["sets"])] = state["sets"]
        self.tokens = int(state["tokens"])

    def pairs(self, device: torch.device) -> Tensor:
        """[E, E] int64: times that two experts were chosen together; on the diagonal, times that each was chosen."""
        return self._sums_on(device)[0].to(torch.int64)

    def sets(self, device: torch.device) -> Tensor:
        """[min(N, tokens), K] int16: the sample, each choice in ascending order."""
        return self._sums_on(device)[1][: self.tokens].sort(dim=1).values

    def _sums_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Products in fp64, which counts exactly up to 2^53, and the reservoir."""
        if self._sums is None:
            pairs_EE = torch.zeros(self.experts, self.experts, dtype=torch.float64, device=device)
            sets_NK = torch.zeros(self.sample, self.top_k, dtype=torch.int16, device=device)
            self._sums = pairs_EE, sets_NK
        return self._sums


def _products(experts_TK: Tensor, experts: int) -> Tensor:
    """C^T C [E, E] in fp32 of the choices as zeros and ones C [T, E]; exact for up to `EXACT_IN_FP32` tokens."""
    kind = torch.bfloat16 if experts_TK.is_cuda else torch.float32  # sums are in fp32 either way
    chosen_TE = torch.zeros(len(experts_TK), experts, dtype=kind, device=experts_TK.device).scatter_(1, experts_TK, 1)
    if kind == torch.float32:
        return chosen_TE.T @ chosen_TE
    return torch.mm(chosen_TE.T, chosen_TE, out_dtype=torch.float32)


def mean_devices(sets_NK: Tensor, expert_to_device: Tensor) -> float:
    """C_T of sampled choices [N, K] where expert e lives on device expert_to_device[e] [E]; NaN without a choice."""
    device_NK = expert_to_device[sets_NK.long()].sort(dim=1).values
    return float(1 + (device_NK.diff(dim=1) != 0).sum(dim=1).double().mean())
