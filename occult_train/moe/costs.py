"""What a placement costs by a layer's statistics, as `occult place` tells it.

N sampled tokens, E experts, K experts a token, D devices.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from occult_train.moe.collaboration import LayerStatistics
from occult_train.moe.placement import Placement
from occult_train.moe.solver import device_of, load_ratio


@dataclass(frozen=True)
class Cost:
    """Of one layer on D devices."""

    c_t: float
    """Devices a token needs, mean over the sampled tokens; NaN without any."""
    c_t_error: float
    """Standard error of that mean."""
    nodes: float
    """Nodes a token needs."""
    intra_share: float
    """Share of collaborations inside one device, by the counts of pairs; NaN with one expert a token."""
    load: float
    """Load of the fullest device over the mean."""


def cost(statistics: LayerStatistics, placement: Placement, devices: int, nodes: int = 1) -> Cost:
    """Costs of a placement; devices d·D/nodes to (d+1)·D/nodes − 1 are one node."""
    device_E = device_of(placement, devices)
    c_t, error = mean_and_error(groups_of_tokens(statistics.sets_NK, device_E, devices))
    reached, _ = mean_and_error(groups_of_tokens(statistics.sets_NK, device_E // (devices // nodes), nodes))
    together_EE = device_E[:, None] == device_E[None, :]
    pairs = int(statistics.pairs_EE.sum())
    intra = int(statistics.pairs_EE[together_EE].sum()) / pairs if pairs else math.nan
    return Cost(c_t, error, reached, intra, load_ratio(device_E, statistics.loads_E, devices))


def groups_of_tokens(sets_NK: Tensor, group_E: Tensor, groups: int) -> Tensor:
    """How many groups (devices or nodes) each token's experts are in [N] int64."""
    used_NG = torch.zeros(sets_NK.shape[0], groups, dtype=torch.bool)
    return used_NG.scatter_(1, group_E[sets_NK.long()], True).sum(dim=1)


def mean_and_error(values_N: Tensor) -> tuple[float, float]:
    """Mean and its standard error; NaN where there are too few values for them."""
    count = values_N.numel()
    mean = float(values_N.double().mean())
    return mean, float(values_N.double().std()) / math.sqrt(count) if count > 1 else math.nan


def rows_moved(c_t: float, devices: int) -> float:
    """Rows that leave a token's rank in one of the four exchanges of a step, for tokens spread evenly over ranks."""
    return c_t * (devices - 1) / devices
