"""`occult place`: which experts should share a device, and what that saves."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from occult_train import config as configs
from occult_train.errors import ConfigError, PlacementError, StatisticsError, UserError, writing
from occult_train.moe.placement import Placement, read, to_json
from occult_train.moe.solver import METHODS, NODE_COST
from occult_train.moe.statistics import FILE_NAME, RoutingStatistics
from occult_train.tools.place_figure import draw
from occult_train.tools.place_report import Compared, Step, Wanted, compare, device_table, sentences

DEVICES = "2,4,8,16"


@dataclass(frozen=True)
class Source:
    """Where statistics come from."""

    statistics: Path
    run: Path | None
    """The run's folder, if there is one."""
    config: configs.Config | None
    """Of the run."""


def command(
    source: Annotated[str, typer.Argument(help="Routing statistics, or a run or checkpoint that has some.")],
    devices: Annotated[str, typer.Option(help="Numbers of devices to compare.")] = DEVICES,
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}, or a placement file.")] = "hypergraph",
    load_bound: Annotated[float, typer.Option(help="Largest device's load over the mean at most; inf: any.")] = 1.1,
    nodes: Annotated[int, typer.Option(help="Nodes that the devices are on.", min=1)] = 1,
    node_cost: Annotated[float, typer.Option(help="Of reaching a further node; a device costs 1.", min=0)] = NODE_COST,
    for_devices: Annotated[
        int,
        typer.Option(
            help="Devices that --output, --figure and --apply are for.", show_default="parallel.expert", min=0
        ),
    ] = 0,
    output: Annotated[Path | None, typer.Option(help="Placement to write, for moe.placement=FILE.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Picture of collaborations before and after (png, pdf).")] = None,
    held_out: Annotated[Path | None, typer.Option(help="Statistics of other text, to judge by.")] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Set it in the checkpoint that was named.")] = False,
    hidden: Annotated[int, typer.Option(help="Model width, for bytes.", show_default="the run's", min=0)] = 0,
    step_tokens: Annotated[int, typer.Option(help="Tokens of a step, for bytes.", show_default="the run's", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same placement.", min=0)] = 0,
) -> None:
    """Compare placements of experts by how many devices a token needs (C_T), and write the chosen one."""
    found = find(source)
    statistics = RoutingStatistics.load(found.statistics)
    other = RoutingStatistics.load(held_out) if held_out else None
    if other is not None:
        other.check_model(list(statistics.layers), statistics.num_experts, statistics.top_k, str(held_out))
    counts, left_out = device_counts(devices, statistics.num_experts, nodes, devices == DEVICES)
    chosen_for = target(for_devices, found, counts, bool(output or figure or apply))
    counts = sorted({*counts, chosen_for} - {0})
    own = _own(method, statistics)
    wanted = Wanted("file" if own else method, load_bound, nodes, node_cost, seed, own)
    if apply and found.run is None:
        raise UserError(f"--apply needs a checkpoint or a run; {source} holds statistics only")
    results = _solve(statistics, other, counts, wanted)
    console = Console(width=None if Console().is_terminal else 120)
    step = step_of(found, hidden, step_tokens)
    experts = f"{statistics.num_experts} experts, {statistics.top_k} a token"
    print(f"{found.statistics}: {statistics.tokens:,} tokens, {experts}")
    for count in counts:
        console.print(device_table([r for r in results if r.devices == count], wanted, step, held_out is not None))
    for line in (*left_out, *sentences(results, wanted, statistics.top_k)):
        print(line)
    placements = {r.layer: r.chosen.placement for r in results if r.devices == chosen_for}
    _write(statistics, placements, chosen_for, output, figure)
    if apply:
        from occult_train.checkpoint import placing

        placing.apply(Path(source), placements)
        print(f"applied to {source}: placed for {chosen_for} devices")


def _own(method: str, statistics: RoutingStatistics) -> dict[int, Placement] | None:
    """The placements of a file; None where the method is one of the solver's."""
    if method in METHODS:
        return None
    if not Path(method).is_file():
        raise PlacementError(f"--method={method} is none of {', '.join(METHODS)}, and no file")
    return read(Path(method), list(statistics.layers), statistics.num_experts)


def find(source: str) -> Source:
    """The statistics of a file, or of the run of a folder.

    Raises:
        StatisticsError: there are none.
    """
    path = Path(source)
    if not path.exists():
        raise StatisticsError(f"{source} does not exist")
    run = path.parent if path.is_file() else path
    if path.is_dir() and path.parent.name == "checkpoints":
        run = path.parent.parent
    try:
        config = configs.load([str(run / "config.yaml")]) if (run / "config.yaml").exists() else None
    except ConfigError:
        config = None  # of another version: its statistics are still good
    if path.is_file():
        return Source(path, None, config)
    files = [path / FILE_NAME, run / FILE_NAME, *sorted(run.glob("statistics-*.safetensors"))]
    existing = next((file for file in files if file.exists()), None)
    if existing is None:
        raise StatisticsError(f"{run} holds no routing statistics; count some: occult profile {run}")
    return Source(existing, run, config)


def device_counts(text: str, experts: int, nodes: int, default: bool) -> tuple[list[int], list[str]]:
    """Numbers of devices that were asked for, and sentences on those that are left out (of the default ones alone).

    Raises:
        UserError: not whole numbers, or they do not divide the experts.
    """
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--devices={text} is not a list of numbers such as {DEVICES}") from None
    reasons = [(c, f"does not divide {experts} experts" if c < 1 or experts % c else "") for c in counts]
    reasons = [(c, why or (f"is not a multiple of --nodes={nodes}" if c % nodes else "")) for c, why in reasons]
    wrong = [f"D={count} {why}" for count, why in reasons if why]
    if wrong and not default:
        raise UserError(f"--devices={text}: {wrong[0]}")
    return [count for count, why in reasons if not why], [f"{sentence}: left out" for sentence in wrong]


def target(asked: int, found: Source, counts: list[int], needed: bool) -> int:
    """For how many devices the placement is that is written; 0 if none is.

    Raises:
        UserError: it is needed, and neither given nor known.
    """
    known = asked or (found.config.parallel.expert if found.config and found.config.parallel.expert > 1 else 0)
    if not needed:
        return 0
    if not known and len(counts) == 1:
        known = counts[0]
    if not known:
        raise UserError(
            "--output, --figure and --apply need --for-devices, as no run with parallel.expert > 1 is known"
        )
    return known


def step_of(found: Source, hidden: int, tokens: int) -> Step | None:
    """What makes bytes of rows; None if that is not known."""
    if found.config is not None:
        config = found.config
        hidden = hidden or config.model.hidden_size
        tokens = tokens or config.train.global_batch_size * config.data.sequence_length
        return Step(tokens, hidden, 4 if config.train.precision == "fp32" else 2)
    return Step(tokens, hidden, 2) if hidden and tokens else None


def _solve(
    statistics: RoutingStatistics, held_out: RoutingStatistics | None, counts: list[int], wanted: Wanted
) -> list[Compared]:
    """Every layer at every number of devices, under a progress bar."""
    console = Console(stderr=True)
    tasks = [(count, layer) for count in counts for layer in statistics.layers]

    def solved() -> Iterator[Compared]:
        shown = track(tasks, "placing", console=console, transient=True, disable=not console.is_terminal)
        for count, layer in shown:
            other = held_out.layers[layer] if held_out else None
            yield compare(layer, statistics.layers[layer], other, count, wanted)

    return list(solved())


def _write(
    statistics: RoutingStatistics,
    placements: dict[int, Placement],
    devices: int,
    output: Path | None,
    figure: Path | None,
) -> None:
    if output:
        with writing(f"--output={output}"):
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(to_json(placements))
        print(f"wrote {output}, placed for {devices} devices: train with moe.placement={output}")
    if figure:
        with writing(f"--figure={figure}"):
            figure.parent.mkdir(parents=True, exist_ok=True)
            draw(statistics.layers, placements, devices, figure)
        print(f"wrote {figure}")
