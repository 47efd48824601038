"""How alike the experts of a layer are, by what their router makes of the same tokens.

E experts, T tokens.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from occult_train.errors import StatisticsError
from occult_train.moe.statistics import RoutingStatistics, digest

FILE_NAME = "similarity.safetensors"
FORMAT = "occult-similarity"
BATCH = 4096
"""Tokens whose logits are widened to fp64 at a time."""


class LogitProducts:
    """Inner products of all pairs of a layer's router-logit columns over a stream of tokens, in fp64.

    Args:
        experts: E.
    """

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self._sum: Tensor | None = None

    @torch.no_grad()
    def add(self, logits_TE: Tensor) -> None:
        """Take in tokens."""
        total_EE = self.products(logits_TE.device)
        for part in logits_TE.split(BATCH):
            wide = part.double()
            total_EE += wide.T @ wide

    def products(self, device: torch.device) -> Tensor:
        """[E, E] fp64 so far; the diagonal are squared norms."""
        if self._sum is None:
            self._sum = torch.zeros(self.experts, self.experts, dtype=torch.float64, device=device)
        return self._sum


@dataclass(frozen=True)
class SimilarityTables:
    """How alike the experts of each layer are: cosines between the columns of router logits."""

    tables: dict[int, Tensor]
    """[E, E] fp32 by layer."""

    @classmethod
    def of(cls, statistics: RoutingStatistics, name: str) -> "SimilarityTables":
        """From statistics that came from `name`.

        Raises:
            StatisticsError: they hold no inner products.
        """
        tables = {}
        for index, layer in statistics.layers.items():
            if layer.logit_products_EE is None:
                raise StatisticsError(
                    f"statistics {name} hold no similarity; make them with `occult profile --similarity`"
                )
            tables[index] = cosines(layer.logit_products_EE)
        return cls(tables)

    def check_model(self, layers: list[int], experts: int, name: str) -> None:
        """Raise StatisticsError, naming `name`, unless they are of a model of this shape."""
        if sorted(self.tables) != sorted(layers):
            found = sorted(self.tables)
            raise StatisticsError(f"similarity {name} is of layers {found}, the model has experts in {layers}")
        for index, table in self.tables.items():
            if tuple(table.shape) != (experts, experts):
                raise StatisticsError(
                    f"similarity {name} is {list(table.shape)} in layer {index}, the model has {experts} experts"
                )

    def to_bytes(self) -> bytes:
        """The file that a checkpoint keeps."""
        tensors = {f"layers.{index}.similarity": table.cpu().contiguous() for index, table in self.tables.items()}
        text = json.dumps(sorted(self.tables))
        metadata = {"format": FORMAT, "layers": text, "sha256": digest(text, tensors)}
        return safetensors.torch.save(tensors, metadata)

    @classmethod
    def load(cls, path: Path) -> "SimilarityTables":
        """Read what `to_bytes` made.

        Raises:
            StatisticsError: missing, damaged, or something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except OSError as error:
            raise StatisticsError(f"similarity {path} cannot be read: {error.strerror or error}") from None
        except SafetensorError as error:
            raise StatisticsError(f"similarity {path} is damaged: {error}") from None
        text = metadata.get("layers", "")
        if metadata.get("format") != FORMAT or metadata.get("sha256") != digest(text, tensors):
            raise StatisticsError(f"similarity {path} is damaged: the checksum does not match")
        try:
            return cls({int(index): tensors[f"layers.{index}.similarity"] for index in json.loads(text)})
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise StatisticsError(f"similarity {path} cannot be understood: {error!r}") from None


def cosines(products_EE: Tensor) -> Tensor:
    """[E, E] fp32 from inner products [E, E] fp64, whose diagonal are squared norms; 0 beside a column of zeros."""
    norm_E = products_EE.diagonal().sqrt()
    scale_EE = norm_E[:, None] * norm_E[None, :]
    return torch.where(scale_EE > 0, products_EE / scale_EE, 0.0).to(torch.float32)
