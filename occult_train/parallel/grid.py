"""Which ranks share what.

All ranks are data parallel. Consecutive `expert` ranks form an expert-parallel group, over which one set of experts is
spread; ranks that hold the same experts form an expert-data-parallel group, over which those experts' gradients are
reduced.
"""

from dataclasses import dataclass
from typing import Any

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

    @property
    def group_name(self) -> str:
        """DeepSpeed's name of the expert-parallel group."""
        return f"ep_size_{self.expert_size}"

    @classmethod
    def create(cls, expert_size: int) -> "Grid":
        """Make (or find) DeepSpeed's expert groups. Collective; needs an initialised torch.distributed.

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
        return cls(
            rank=dist.get_rank(),
            world_size=world,
            expert_size=expert_size,
            expert_rank=dist.get_rank(expert_group),
            expert_group=expert_group,
            expert_data_group=data_group,
            expert_data_rank=dist.get_rank(data_group),
        )
