"""An alpha-beta model of the all-to-alls of an expert-parallel layer.

A message of b bytes over a link takes latency + b/bandwidth; a device handles the messages of one link one after the
other, sends and receives at once, and uses both of its links at once. N sampled tokens, E experts, K experts a token,
D expert-parallel devices, G of them on a node; device d is on node d // G. Tokens are spread evenly over devices.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLE = 4096
"""Tokens by which uniform routing is judged."""


@dataclass(frozen=True)
class Link:
    """What one device has of a network."""

    latency_us: float
    """Of a message, in microseconds."""
    gigabytes_per_second: float
    """Each way."""

    def milliseconds(self, messages: float, nbytes: float) -> float:
        """Of messages one after the other with so many bytes in all."""
        if not messages:
            return 0.0
        return self.latency_us * messages / 1e3 + nbytes / self.gigabytes_per_second / 1e6


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal devices. The default: eight H100s a node, NVLink, a 400 Gb/s adapter each."""

    devices_per_node: int = 8
    intra: Link = Link(3.0, 380.0)
    """To a device of the same node."""
    inter: Link = Link(8.0, 45.0)
    """To a device of another node."""


@dataclass(frozen=True)
class Shape:
    """How experts are spread on so many devices of a cluster."""

    devices: int
    """In all."""
    expert: int
    """D: the devices over which one set of experts is spread; beyond it are further sets, each with its own
    all-to-all, which touch each other nowhere."""
    per_node: int
    """G."""

    @property
    def nodes(self) -> int:
        """That one set of experts is on."""
        return self.expert // self.per_node


def copies_share(sets_NK: Tensor, device_E: Tensor, devices: int) -> Tensor:
    """Experts that a token has on each device [D] fp64, mean: copies if each expert gets its own."""
    counts_D = torch.bincount(device_E[sets_NK.long()].flatten(), minlength=devices)
    return counts_D.double() / sets_NK.shape[0]


def used_devices(sets_NK: Tensor, device_E: Tensor, devices: int) -> Tensor:
    """Whether a token needs a device [N, D] bool."""
    used_ND = torch.zeros(sets_NK.shape[0], devices, dtype=torch.bool)
    return used_ND.scatter_(1, device_E[sets_NK.long()], True)


def flat_ms(share_D: Tensor, shape: Shape, cluster: Cluster, tokens: int, row_bytes: int) -> float:
    """One all-to-all in which each copy goes straight to its device.

    Args:
        share_D: [D] copies of a token that go to each device, mean.
        tokens: of a device.
        row_bytes: of a copy.
    """
    node_D = torch.arange(shape.expert) // shape.per_node
    on_node_D = torch.zeros(shape.nodes, dtype=torch.float64).index_add_(0, node_D, share_D)[node_D]
    local, remote = shape.per_node - 1, shape.expert - shape.per_node
    near = float(torch.maximum(on_node_D - share_D, local * share_D).max())
    far = float(torch.maximum(share_D.sum() - on_node_D, remote * share_D).max()) if remote else 0.0
    times = (
        cluster.intra.milliseconds(local, near * tokens * row_bytes),
        cluster.inter.milliseconds(remote, far * tokens * row_bytes),
    )
    return max(times)


def by_node_ms(used_ND: Tensor, shape: Shape, cluster: Cluster, tokens: int, row_bytes: int) -> float:
    """One all-to-all in which a node gets one copy of a token, on the device of the sender's number, which fans it out.

    The fan-out begins when all has arrived.
    """
    share_D = used_ND.double().mean(0)
    nodes, per_node = shape.nodes, shape.per_node
    reached_J = used_ND.view(-1, nodes, per_node).any(2).double().mean(0)
    far = float(torch.maximum(reached_J.sum() - reached_J, (nodes - 1) * reached_J).max())
    # of the D · tokens rows of all devices, a G-th of those that come to a node is on each of its devices
    sent_J = share_D.view(nodes, per_node).sum(1) / per_node
    others = shape.expert * (per_node - 1) / per_node
    near = others * float(torch.maximum(sent_J.max(), share_D.max()))
    first = cluster.inter.milliseconds(nodes - 1, far * tokens * row_bytes)
    return first + cluster.intra.milliseconds(per_node - 1, near * tokens * row_bytes)


def gain_by_node(shape: Shape, cluster: Cluster, experts: int, top_k: int, tokens: int, row_bytes: int) -> float:
    """How much sooner an all-to-all is expected to end that sends one copy a node than one that sends one a device:
    time of the latter over that of the former, for uniform routing.

    Args:
        tokens: of a device.
        row_bytes: of a copy.
    """
    sets_NK = torch.rand(SAMPLE, experts, generator=torch.Generator().manual_seed(0)).argsort(dim=1)[:, :top_k]
    device_E = torch.arange(experts) // (experts // shape.expert)
    used_ND = used_devices(sets_NK, device_E, shape.expert)
    flat = flat_ms(used_ND.double().mean(0), shape, cluster, tokens, row_bytes)
    return flat / by_node_ms(used_ND, shape, cluster, tokens, row_bytes)
