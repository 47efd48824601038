"""`occult simulate`: all-to-all times of an expert-parallel layer on clusters that are not at hand."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from occult_train.errors import UserError, writing
from occult_train.moe.collaboration import LayerStatistics
from occult_train.moe.links import Cluster, Shape, by_node_ms, copies_share, flat_ms, used_devices
from occult_train.moe.placement import Placement
from occult_train.moe.solver import METHODS, device_of, solve
from occult_train.moe.statistics import RoutingStatistics
from occult_train.moe.synthetic import clustered, statistics_of
from occult_train.tools.bench.results import write_csv
from occult_train.tools.bench.shapes import parse_shape
from occult_train.tools.place import find
from occult_train.tools.simulate_fit import fit
from occult_train.tools.simulate_model import load_cluster, pruned, spread

EXCHANGES = 4
"""Of a training step: dispatch, combine, and both backward."""
SYNTHETIC_TOKENS = 20_000


@dataclass(frozen=True)
class Asked:
    """What is simulated."""

    cluster: Cluster
    tokens: int
    """Of a device."""
    row_bytes: int
    method: str
    load_bound: float
    prune: tuple[int, ...]
    seed: int


def command(
    source: Annotated[str, typer.Argument(help="Routing statistics, or a run or checkpoint that has some.")] = "",
    shape: Annotated[str, typer.Option(help="Without statistics: a model's name or H,F,E,K.")] = "olmoe",
    clusters: Annotated[int, typer.Option(help="Without statistics: groups of experts used together.", min=1)] = 8,
    strength: Annotated[float, typer.Option(help="Without statistics: of the groups; 0 is uniform.", min=0)] = 2.5,
    layer: Annotated[int | None, typer.Option(help="One layer alone.", show_default="the mean of all")] = None,
    devices: Annotated[str, typer.Option(help="Numbers of devices.")] = "2,4,8,16,32,64,128,256,512,1024",
    cluster: Annotated[Path | None, typer.Option(help="YAML with devices_per_node, intra and inter.")] = None,
    per_node: Annotated[int, typer.Option(help="Devices of a node.", show_default="the description's, 8", min=0)] = 0,
    tokens: Annotated[int, typer.Option(help="Of a device, in a micro-batch.", min=1)] = 8192,
    hidden: Annotated[int, typer.Option(help="Model width.", show_default="the run's or the shape's", min=0)] = 0,
    value_bytes: Annotated[int, typer.Option(help="Bytes of an activation.", min=1)] = 2,
    method: Annotated[str, typer.Option(help=f"Of placing: {', '.join(METHODS)}.")] = "hypergraph",
    load_bound: Annotated[float, typer.Option(help="Of the placement.")] = 1.1,
    prune: Annotated[str, typer.Option(help="Devices that pruning leaves a token.")] = "1,2",
    csv: Annotated[Path | None, typer.Option(help="Write all columns there.")] = None,
    measure: Annotated[bool, typer.Option("--fit", help="Measure this machine first, and take it for a node.")] = False,
    ranks: Annotated[int, typer.Option(help="With --fit: ranks.", show_default="all GPUs, or 4 on CPU", min=0)] = 0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> int:
    """Expected all-to-all time of one layer in a training step, for several ways to dispatch and numbers of devices.

    A cluster is described as devices_per_node: 8, intra: {latency_us: 3, gigabytes_per_second: 380}, inter:
    {latency_us: 8, gigabytes_per_second: 45}, of a message and of one device each way; these are the defaults.
    """
    described = load_cluster(cluster) if cluster else Cluster()
    if per_node:
        described = replace(described, devices_per_node=per_node)
    code = 0
    if measure:
        fitted = fit(ranks)
        print(fitted.words())
        code = int(not fitted.agrees)
        described = replace(described, intra=fitted.link)
    layers, width = _layers(source, shape, clusters, strength, layer, hidden, seed)
    counts, most = _numbers("--devices", devices), _numbers("--prune", prune)
    asked = Asked(described, tokens, width * value_bytes, method, load_bound, tuple(most), seed)
    rows = list(_simulated(layers, counts, asked))
    experts = next(iter(layers.values())).loads_E.numel()
    Console(width=None if Console().is_terminal else 140).print(_table(rows, asked, experts))
    if any(row["devices"] > row["expert_parallel"] for row in rows):
        print(
            f"Where there are more devices than expert-parallel ones (at most {experts} experts, and whole nodes), "
            "further sets of experts work side by side: the time grows no more."
        )
    if csv:
        with writing(f"--csv={csv}"):
            write_csv(csv, list(rows[0]), rows)
        print(f"wrote {csv}")
    return code


def _numbers(name: str, text: str) -> list[int]:
    parts = [part for part in text.split(",") if part]
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts) or (not parts and name != "--prune"):
        raise UserError(f"{name}={text} is not a list of positive whole numbers such as 2,4")
    return [int(part) for part in parts]


def _layers(
    source: str, shape: str, clusters: int, strength: float, layer: int | None, hidden: int, seed: int
) -> tuple[dict[int, LayerStatistics], int]:
    """Statistics by layer, and the model's width."""
    if not source:
        made = parse_shape(shape)
        sets_TK = clustered(SYNTHETIC_TOKENS, made.experts, made.top_k, clusters, strength, skew=0.3, seed=seed)
        return {0: statistics_of(sets_TK, made.experts)}, hidden or made.hidden
    found = find(source)
    layers = RoutingStatistics.load(found.statistics).layers
    if layer is not None:
        if layer not in layers:
            raise UserError(f"--layer={layer} has no statistics in {found.statistics}; layers {list(layers)} have")
        layers = {layer: layers[layer]}
    if any(len(statistics.sets_NK) == 0 for statistics in layers.values()):
        raise UserError(f"{found.statistics} holds no sample of whole sets")
    if not hidden and found.config is None:
        raise UserError(f"{found.statistics} is of no run whose width is known; give --hidden")
    return layers, hidden or found.config.model.hidden_size  # type: ignore[union-attr]


def _simulated(layers: dict[int, LayerStatistics], counts: list[int], asked: Asked) -> Iterator[dict[str, Any]]:
    """A row for each number of devices, means over layers; devices with equal expert-parallel shape share the work."""
    console, known = Console(stderr=True), {}
    experts = next(iter(layers.values())).loads_E.numel()
    for count in track(counts, "placing", console=console, transient=True, disable=not console.is_terminal):
        shape = spread(count, experts, asked.cluster)
        if shape.expert not in known:
            parts = [times(statistics, shape, asked) for statistics in layers.values()]
            known[shape.expert] = {name: fmean(part[name] for part in parts) for name in parts[0]}
        yield {"devices": count, "expert_parallel": shape.expert, "nodes": shape.nodes, **known[shape.expert]}


def times(statistics: LayerStatistics, shape: Shape, asked: Asked) -> dict[str, float]:
    """C_T and milliseconds of a layer's exchanges in a training step, by way of dispatching."""
    contiguous = Placement.contiguous(statistics.loads_E.numel())
    placed, placed_on_nodes = (_place(statistics, shape, asked, nodes) for nodes in (1, shape.nodes))
    sets_NK, devices = statistics.sets_NK, shape.expert
    plain_ND, placed_ND, nodes_ND = (
        used_devices(sets_NK, device_of(p, devices), devices) for p in (contiguous, placed, placed_on_nodes)
    )
    copies_D = copies_share(sets_NK, device_of(contiguous, devices), devices)

    def flat(share_D: Tensor) -> float:
        return EXCHANGES * flat_ms(share_D, shape, asked.cluster, asked.tokens, asked.row_bytes)

    def by_node(used_ND: Tensor) -> float:
        return EXCHANGES * by_node_ms(used_ND, shape, asked.cluster, asked.tokens, asked.row_bytes)

    found = {
        "c_t": float(plain_ND.sum(1).double().mean()),
        "c_t_placed": float(placed_ND.sum(1).double().mean()),
        "copies_ms": flat(copies_D),
        "dedup_ms": flat(plain_ND.double().mean(0)),
        "placed_ms": flat(placed_ND.double().mean(0)),
        "node_ms": by_node(plain_ND),
        "node_placed_ms": by_node(nodes_ND),
    }
    for most in asked.prune:
        # fewer devices may not hold K experts
        possible = most * (statistics.loads_E.numel() // devices) >= sets_NK.shape[1]
        less_ND = pruned(placed_ND, most, asked.seed)
        found[f"pruned_{most}_ms"] = flat(less_ND.double().mean(0)) if possible else float("nan")
    return found


def _place(statistics: LayerStatistics, shape: Shape, asked: Asked, nodes: int) -> Placement:
    return solve(asked.method, statistics, shape.expert, load_bound=asked.load_bound, nodes=nodes, seed=asked.seed)


def _table(rows: list[dict[str, Any]], asked: Asked, experts: int) -> Table:
    link = asked.cluster.intra, asked.cluster.inter
    words = [f"{part.latency_us:g} us + {part.gigabytes_per_second:g} GB/s" for part in link]
    table = Table(
        title=f"ms of all-to-all a layer and training step; {asked.tokens:,} tokens a device, rows of "
        f"{asked.row_bytes:,} bytes\n"
        f"{asked.cluster.devices_per_node} devices a node; in it {words[0]}, between nodes {words[1]}",
        title_justify="left",
    )
    heads = {"devices": "devices", "expert_parallel": "expert-parallel", "nodes": "nodes"}
    heads |= {"c_t": "C_T", "c_t_placed": "placed", "copies_ms": "K copies", "dedup_ms": "dedup"}
    heads |= {"placed_ms": "dedup, placed", "node_ms": "by node", "node_placed_ms": "by node, placed"}
    heads |= {f"pruned_{most}_ms": f"placed, pruned to {most}" for most in asked.prune}
    for head in heads.values():
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in heads))
    return table


def _cell(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return "–" if value != value else f"{value:.3f}"
