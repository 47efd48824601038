"""Functions that `run_tasks` runs on ranks in tests."""

import os
import time

import torch
import torch.distributed as dist


def misbehave(task: str) -> list[int]:
    """All ranks' numbers, unless the task is to do worse on one of them."""
    rank = dist.get_rank()
    if task == "raise" and rank == 1:
        raise ValueError("rank 1 does not like this")
    if task == "die" and rank == 0:
        os._exit(9)
    if task == "hang" and rank == 1:
        time.sleep(600)
    seen = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    seen[rank] = rank + 1
    dist.all_reduce(seen)
    return seen.tolist()
