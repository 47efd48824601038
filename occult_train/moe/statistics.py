"""Routing statistics of a model: what `occult profile` and training write, and what placement is solved from.

One safetensors file: for each MoE layer `layers.<index>.loads`, `.pairs` and `.sets` (`LayerStatistics`), with
similarity also `.logit_products`, and what they are of as metadata. Tensors of other names belong to later versions of
this program, and are left alone.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from occult_train.errors import StatisticsError, UserError
from occult_train.moe.collaboration import LayerStatistics
from occult_train.moe.sampling import pick, shares

FORMAT = "occult-statistics"
VERSION = 1
FILE_NAME = "statistics.safetensors"


@dataclass(frozen=True)
class RoutingStatistics:
    """How the experts of every layer were chosen together."""

    num_experts: int
    """E, of every layer."""
    top_k: int
    """K."""
    layers: dict[int, LayerStatistics]
    """By the layer's index in the model, ascending."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where they come from, as JSON values: checkpoint, corpus, steps and the like; for people, never computed with."""

    @property
    def has_similarity(self) -> bool:
        """Whether all layers have inner products of logits."""
        return all(layer.logit_products_EE is not None for layer in self.layers.values())

    @property
    def tokens(self) -> int:
        """Tokens counted, in the layer that counted most; layers only differ if files of different ones were merged."""
        return max(layer.tokens for layer in self.layers.values())

    def save(self, path: Path) -> None:
        """Write the file whole or not at all.

        Raises:
            OSError: the disk does not take it.
        """
        aside = path.with_name(path.name + ".writing")
        with aside.open("wb") as file:
            file.write(self.to_bytes())
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)

    def to_bytes(self) -> bytes:
        """The file's content."""
        tensors: dict[str, Tensor] = {}
        for index, layer in self.layers.items():
            tensors |= {f"layers.{index}.loads": layer.loads_E, f"layers.{index}.pairs": layer.pairs_EE}
            tensors[f"layers.{index}.sets"] = layer.sets_NK
            if layer.logit_products_EE is not None:
                tensors[f"layers.{index}.logit_products"] = layer.logit_products_EE
        about = {
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "tokens": {str(index): layer.tokens for index, layer in self.layers.items()},
            "provenance": self.provenance,
        }
        text = json.dumps(about)
        metadata = {"format": FORMAT, "version": str(VERSION), "about": text, "sha256": digest(text, tensors)}
        return safetensors.torch.save({n: t.contiguous() for n, t in tensors.items()}, metadata)

    @classmethod
    def load(cls, path: Path) -> "RoutingStatistics":
        """Read and verify a file.

        Raises:
            StatisticsError: it is missing, damaged, or something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise StatisticsError(
                        f"{path} holds no routing statistics (its format is {metadata.get('format')})"
                    )
                if metadata.get("version") != str(VERSION):
                    raise StatisticsError(
                        f"statistics {path} have version {metadata.get('version')}, this program reads {VERSION}"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except OSError as error:
            raise StatisticsError(f"statistics {path} cannot be read: {error.strerror or error}") from None
        except SafetensorError as error:
            raise StatisticsError(f"statistics {path} are damaged, or no safetensors file: {error}") from None
        if metadata.get("sha256") != digest(metadata.get("about", ""), tensors):
            raise StatisticsError(f"statistics {path} are damaged: the checksum does not match")
        return cls._parse(path, metadata.get("about", ""), tensors)

    @classmethod
    def _parse(cls, path: Path, text: str, tensors: dict[str, Tensor]) -> "RoutingStatistics":
        layers = {}
        try:
            about: dict[str, Any] = json.loads(text)
            for index, tokens in sorted((int(index), int(tokens)) for index, tokens in about["tokens"].items()):
                loads, pairs, sets = (tensors[f"layers.{index}.{name}"] for name in ("loads", "pairs", "sets"))
                products = tensors.get(f"layers.{index}.logit_products")
                layers[index] = LayerStatistics(tokens, loads, pairs, sets, products)
            found = cls(int(about["num_experts"]), int(about["top_k"]), layers, dict(about["provenance"]))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise StatisticsError(f"statistics {path} cannot be understood: {error!r}") from None
        try:
            found.check()
        except ValueError as error:
            raise StatisticsError(f"statistics {path} contradict themselves: {error}") from None
        return found

    def check(self) -> None:
        """Raise ValueError unless every layer's counts fit together, whoever made them."""
        if not self.layers:
            raise ValueError("no layer")
        for index, layer in self.layers.items():
            try:
                _check_layer(layer, self.num_experts, self.top_k)
            except ValueError as error:
                raise ValueError(f"layer {index}: {error}") from None

    def check_model(self, layers: list[int], num_experts: int, top_k: int, name: str) -> None:
        """Raise StatisticsError, naming `name` (a file), unless they are of a model of this shape."""
        for what, mine, its in (
            ("model.num_experts", self.num_experts, num_experts),
            ("model.num_experts_per_tok", self.top_k, top_k),
            ("experts in layers", sorted(self.layers), sorted(layers)),
        ):
            if mine != its:
                raise StatisticsError(f"statistics {name} are of another model: {what} {mine} there, {its} here")


def merge(parts: list[RoutingStatistics], sample: int | None = None, seed: int = 0) -> RoutingStatistics:
    """The statistics of all parts' tokens together: counts add up, and the samples become one uniform one.

    Args:
        parts: of one model, over disjoint sets of tokens.
        sample: the most K-sets to keep a layer; None keeps as many as a uniform sample can have (`sampling.shares`).
        seed: of the draw.

    Raises:
        UserError: nothing to merge.
        StatisticsError: parts of different models.
    """
    if not parts:
        raise UserError("no statistics to merge")
    first = parts[0]
    for number, part in enumerate(parts[1:], start=2):
        name = f"number {number} of those to merge"
        part.check_model(list(first.layers), first.num_experts, first.top_k, name)
        if part.has_similarity != first.has_similarity:
            with_it, without = ("the first", name) if first.has_similarity else (name, "the first")
            raise StatisticsError(f"statistics {with_it} hold similarity, {without} none")
    layers = {index: merge_layers([part.layers[index] for part in parts], sample, seed) for index in first.layers}
    provenance = first.provenance if len(parts) == 1 else {"merged": [part.provenance for part in parts]}
    return RoutingStatistics(first.num_experts, first.top_k, layers, provenance)


def merge_layers(parts: list[LayerStatistics], sample: int | None = None, seed: int = 0) -> LayerStatistics:
    """`merge` for one layer."""
    counts = shares([p.tokens for p in parts], [len(p.sets_NK) for p in parts], sample, seed)
    products = [part.logit_products_EE for part in parts if part.logit_products_EE is not None]
    return LayerStatistics(
        tokens=sum(part.tokens for part in parts),
        loads_E=torch.stack([part.loads_E for part in parts]).sum(dim=0),
        pairs_EE=torch.stack([part.pairs_EE for part in parts]).sum(dim=0),
        sets_NK=torch.cat([pick(p.sets_NK, n, seed, i) for i, (p, n) in enumerate(zip(parts, counts, strict=True))]),
        logit_products_EE=torch.stack(products).sum(dim=0) if len(products) == len(parts) else None,
    )


def _check_layer(layer: LayerStatistics, experts: int, top_k: int) -> None:
    loads, pairs, sets = layer.loads_E, layer.pairs_EE, layer.sets_NK
    for name, tensor, dtype, shape in (
        ("loads", loads, torch.int64, (experts,)),
        ("pairs", pairs, torch.int64, (experts, experts)),
        ("sets", sets, torch.int16, (len(sets), top_k)),
    ):
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{name} are {tensor.dtype} {list(tensor.shape)} in place of {dtype} {list(shape)}")
    if int(loads.sum()) != layer.tokens * top_k or bool((loads < 0).any()):
        raise ValueError(f"loads sum to {int(loads.sum())}, {layer.tokens} tokens choose {layer.tokens * top_k}")
    if not torch.equal(pairs, pairs.T) or bool(pairs.diagonal().any()) or bool((pairs < 0).any()):
        raise ValueError("pairs are not symmetric counts with a zero diagonal")
    if not torch.equal(pairs.sum(dim=1), loads * (top_k - 1)):
        raise ValueError("pairs do not add up to the loads")
    if layer.logit_products_EE is not None:
        _check_products(layer.logit_products_EE, experts)
    if len(sets) > layer.tokens:
        raise ValueError(f"{len(sets)} sets sampled of {layer.tokens} tokens")
    known = (sets >= 0) & (sets < experts)
    if not (bool(known.all()) and bool((sets.diff(dim=1) > 0).all())):
        raise ValueError(f"sets are not ascending choices out of {experts} experts")


def _check_products(products: Tensor, experts: int) -> None:
    if products.dtype != torch.float64 or tuple(products.shape) != (experts, experts):
        raise ValueError(
            f"logit products are {products.dtype} {list(products.shape)} in place of torch.float64 {[experts, experts]}"
        )
    symmetric = torch.equal(products, products.T) and bool(products.isfinite().all())
    if not symmetric or bool((products.diagonal() < 0).any()):
        raise ValueError("logit products are not a symmetric matrix of finite numbers with squared norms as diagonal")


def digest(about: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of a text, then of each tensor's name and bytes."""
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
