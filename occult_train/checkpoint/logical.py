"""The logical tensors of a model on this rank: which there are, and who writes them."""

import math
from dataclasses import dataclass

from torch import nn

from occult_train.parallel.grid import Grid
from occult_train.parallel.zero import STATES, full_shape, is_expert

KINDS = ("param", *STATES)


@dataclass(frozen=True)
class Logical:
    """A parameter, its logical pieces here, and which of them this rank writes.

    A dense parameter is one piece; a stack of experts is one piece an expert, `<name>.<expert id>`.
    """

    parameter: nn.Parameter
    pieces: tuple[str, ...]
    shape: tuple[int, ...]
    """Of each piece."""
    writes: tuple[bool, ...]
    expert: bool

    @property
    def kinds(self) -> tuple[str, ...]:
        """What there is of it: the weights, and moments unless it is frozen."""
        return KINDS if self.parameter.requires_grad else KINDS[:1]

    @property
    def nbytes_of_all_ranks(self) -> int:
        """Size in a checkpoint, in fp32."""
        shape = self.parameter.ds_autoep_uc_meta["logical_shape"] if self.expert else ()  # type: ignore[attr-defined]
        return 4 * len(self.kinds) * math.prod(self.shape) * math.prod(shape[:1])


def key(kind: str, piece: str) -> str:
    """Name in the checkpoint: the piece itself for master weights, `exp_avg/<piece>` for a moment."""
    return piece if kind == "param" else f"{kind}/{piece}"


def logical_tensors(model: nn.Module, grid: Grid) -> list[Logical]:
    """All parameters in the model's order, the same on every rank. Writing is spread evenly over the holders."""
    found, load = [], [0] * grid.world_size
    for name, parameter in model.named_parameters():
        shape = full_shape(parameter)
        if is_expert(parameter):
            ids = parameter.ds_autoep_uc_meta["local_experts"]  # type: ignore[attr-defined]
            holders = grid.world_size // grid.expert_size
            writes = tuple(i % holders == grid.expert_data_rank for i in range(len(ids)))
            found.append(Logical(parameter, tuple(f"{name}.{e}" for e in ids), shape[1:], writes, True))
        else:
            writer = load.index(min(load))
            load[writer] += math.prod(shape)
            found.append(Logical(parameter, (name,), shape, (writer == grid.rank,), False))
    return found
