"""How far tokens spread over devices: Occult's C_T and the collaborations of experts."""

from dataclasses import dataclass

import torch
from torch import Tensor


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
