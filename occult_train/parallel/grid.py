"""Which ranks share what.

All ranks are data parallel. Consecutive `expert` ranks form an expert-parallel group, over which one set of experts is
spread; ranks that hold the same experts form an expert-data-parallel group, over which those experts' gradients are
reduced.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups


@dataclass(frozen=True)
class Grid:
    """This rank's place. `expert_group` and `world_group` are None in a single process without torch.distributed."""

    rank: int = 0
    world_size: int = 1
    expert_size: int = 1
    expert_rank: int = 0
    expert_group: Any = None
    expert_data_group: Any = None
    expert_data_rank: int = 0
    per_node: int = 0
    """Consecutive ranks of the expert-parallel group that share a node; 0 for all of them."""
    inside_group: Any = None
    """The ranks of this one's node, where the group has several nodes of several ranks."""
    across_group: Any = None
    """The ranks of this one's place in every node of the group, likewise."""

    @property
    def node_size(self) -> int:
        """Ranks of the expert-parallel group on a node."""
        return self.per_node or self.expert_size

    @property
    def nodes(self) -> int:
        """Over which the expert-parallel group is spread."""
        return self.expert_size // self.node_size

    @property
    def group_name(self) -> str:
        """DeepSpeed's name of the expert-parallel group."""
        return f"ep_size_{self.expert_size}"

    @classmethod
    def create(cls, expert_size: int, ranks_of_host: int = 0) -> "Grid":
        """Make (or find) DeepSpeed's expert groups. Collective; needs an initialised torch.distributed.

        Args:
            expert_size: ranks over which one set of experts is spread.
            ranks_of_host: how many ranks this host has; 0 if nobody knows. Nodes are told apart where all hosts have
                as many, and whole hosts make up an expert-parallel group.

        Raises:
            ValueError: the world is not a multiple of expert_size.
        """
        world = dist.get_world_size()
        if world % expert_size:
            raise ValueError(f"{world} ranks are not divisible by expert_size={expert_size}")
        name = f"ep_size_{expert_size}"
        if name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(expert_size)
        expert_group = groups._get_expert_parallel_group(name)
        data_group = groups._get_expert_data_parallel_group(name)
        per_node = _per_node(expert_size, ranks_of_host)
        inside, across = _node_groups(expert_size, per_node)
        return cls(
            rank=dist.get_rank(),
            world_size=world,
            expert_size=expert_size,
            expert_rank=dist.get_rank(expert_group),
            expert_group=expert_group,
            expert_data_group=data_group,
            expert_data_rank=dist.get_rank(data_group),
            per_node=per_node,
            inside_group=inside,
            across_group=across,
        )


def _per_node(expert_size: int, ranks_of_host: int) -> int:
    """Ranks of an expert-parallel group on a node, the same answer on all ranks; 0 for all of them."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
    bounds = torch.tensor([ranks_of_host, -ranks_of_host], device=device)
    dist.all_reduce(bounds, dist.ReduceOp.MAX)
    most, least = int(bounds[0]), -int(bounds[1])
    return most if 0 < least == most < expert_size and expert_size % most == 0 else 0


_found_groups: dict[tuple[int, int], tuple[Any, Any]] = {}
"""Groups of `_node_groups`, which torch would make anew for each caller."""


def _node_groups(expert_size: int, per_node: int) -> tuple[Any, Any]:
    """This rank's groups inside its node and across nodes. Collective: all ranks make all groups."""
    if per_node < 2:
        return None, None
    key = (expert_size, per_node)
    if key not in _found_groups:
        mine: list[Any] = [None, None]
        for first in range(0, dist.get_world_size(), expert_size):
            ranks = range(first, first + expert_size)
            sets = [(0, ranks[i : i + per_node]) for i in range(0, expert_size, per_node)]
            sets += [(1, ranks[i::per_node]) for i in range(per_node)]
            for kind, members in sets:
                group = dist.new_group(list(members))
                if dist.get_rank() in members:
                    mine[kind] = group
        _found_groups[key] = (mine[0], mine[1])
    return _found_groups[key]
