"""Selective activation checkpointing of a block's parts."""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def run(recompute: bool, function: Any, *inputs: Any) -> Any:
    """function(*inputs), computed again in backward in place of keeping what it keeps, if `recompute`."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return function(*inputs)
