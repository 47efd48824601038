"""Clusters as described in a file, and how experts are spread over them. The model itself is moe/links.py."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from occult_train.errors import ConfigError
from occult_train.moe.links import Cluster, Link, Shape


def load_cluster(path: Path) -> Cluster:
    """Read a YAML file with the fields of `Cluster`; those that are missing keep their defaults.

    Raises:
        ConfigError: it cannot be read, has unknown fields, or values that are no positive numbers.
    """
    try:
        raw = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise ConfigError(f"--cluster={path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--cluster={path} is no YAML: {error}") from None
    values = _known(raw, Cluster, str(path))
    per_node = values.get("devices_per_node", Cluster.devices_per_node)
    if not isinstance(per_node, int) or per_node < 1:
        raise ConfigError(f"--cluster={path}: devices_per_node={per_node} is no positive whole number")
    intra, inter = (_link(values.get(n, {}), getattr(Cluster, n), f"{path}: {n}") for n in ("intra", "inter"))
    return Cluster(per_node, intra, inter)


def _known(raw: Any, cls: type, where: str) -> dict[str, Any]:
    names = [f.name for f in fields(cls)]
    if not isinstance(raw, dict) or set(raw) - set(names):
        unknown = sorted(map(str, set(raw) - set(names))) if isinstance(raw, dict) else raw
        raise ConfigError(f"--cluster={where} has {unknown}; it knows {', '.join(names)}")
    return raw


def _link(raw: Any, default: Link, where: str) -> Link:
    values = {f.name: getattr(default, f.name) for f in fields(Link)} | _known(raw, Link, where)
    for name, value in values.items():
        least = 0 if name == "latency_us" else 1e-9
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < float("inf"):
            raise ConfigError(f"--cluster={where}: {name}={value} is no positive number")
    return Link(**values)


def spread(devices: int, experts: int, cluster: Cluster) -> Shape:
    """As many devices a set of experts as divide both devices and experts, on whole nodes or a part of one."""
    per_node = cluster.devices_per_node
    expert = next(d for d in range(min(devices, experts), 0, -1) if _fits(d, devices, experts, per_node))
    return Shape(devices, expert, min(expert, per_node))


def _fits(expert: int, devices: int, experts: int, per_node: int) -> bool:
    whole_nodes = expert % per_node == 0 or per_node % expert == 0 or devices <= per_node
    return devices % expert == 0 and experts % expert == 0 and whole_nodes


def pruned(used_ND: Tensor, most: int, seed: int = 0) -> Tensor:
    """Of the devices that a token needs, at most `most`, at random [N, D]: which ones its scores would open is not in
    the statistics."""
    order_ND = torch.rand(used_ND.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(~used_ND, -1.0)
    kept = order_ND.topk(min(most, used_ND.shape[1]), dim=1).indices
    return torch.zeros_like(used_ND).scatter_(1, kept, True) & used_ND
