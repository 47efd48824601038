"""How the parts of a block are run: as they are, computed again in backward, or as CUDA graphs."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from occult_train.models.graphs import Graphs

Run = Callable[..., Any]
"""run(function, *inputs) gives function(*inputs)."""


def runner(recompute: bool, graphs: Graphs | None) -> Run:
    """Selective checkpointing if `recompute`; else graphs if there are any.

    Raises:
        ValueError: both.
    """
    if recompute and graphs is not None:
        raise ValueError("CUDA graphs keep what activation checkpointing would compute again")
    return _recomputed if recompute else _called if graphs is None else graphs.run


def _called(function: Any, *inputs: Any) -> Any:
    return function(*inputs)


def _recomputed(function: Any, *inputs: Any) -> Any:
    """function(*inputs), computed again in backward in place of keeping what it keeps."""
    if torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return function(*inputs)
