"""`occult profile`: count how a trained model's experts are chosen together."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from occult_train import distributed
from occult_train.checkpoint.store import Checkpoint
from occult_train.errors import UserError, writing
from occult_train.inference import checkpoint_config, open_run
from occult_train.moe.collaboration import LayerStatistics, mean_devices
from occult_train.moe.collecting import DEFAULT_SAMPLE
from occult_train.moe.statistics import RoutingStatistics
from occult_train.moe.statistics import merge as merge_statistics
from occult_train.moe.trace import read_trace
from occult_train.parallel.grid import Grid
from occult_train.profiling import Profile, Wanted

DEVICES = (2, 4, 8)


def command(
    checkpoint: Annotated[str, typer.Argument(help="A run's folder or a checkpoint.")] = "",
    data: Annotated[str, typer.Option(help="Corpus to read. [default: the run's own]")] = "",
    part: Annotated[str, typer.Option(help="Part of the corpus: valid (held out) or train.")] = "valid",
    tokens: Annotated[int, typer.Option(help="Tokens to count; 0 takes all of the part.", min=0)] = 1_000_000,
    output: Annotated[
        Path | None, typer.Option(help="File to write. [default: statistics-PART.safetensors in the run's folder]")
    ] = None,
    sample: Annotated[int, typer.Option(help="Tokens whose whole choice is kept.", min=1)] = DEFAULT_SAMPLE,
    batch: Annotated[int, typer.Option(help="Sequences at a time. [default: the run's micro-batch]", min=0)] = 0,
    expert: Annotated[int, typer.Option(help="Ranks that share the experts, if torchrun starts some.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of the sample.", min=0)] = 0,
    trace: Annotated[str, typer.Option(help="In place of a checkpoint: Megatron-Core's routing trace (folder).")] = "",
    experts: Annotated[int, typer.Option(help="Experts of a layer, with --trace.", min=0)] = 0,
    similarity: Annotated[
        bool, typer.Option(help="Also how alike experts are, for moe.prune.policy=similarity.")
    ] = False,
    merge: Annotated[
        list[Path] | None, typer.Option(help="Statistics of other text to add; several, or no checkpoint, as well.")
    ] = None,
) -> None:
    """Run CHECKPOINT over a corpus and write routing statistics, from which `occult place` makes a placement.

    One process uses one device. For more: torchrun --nproc-per-node=N -m occult_train.launcher.cli profile ...
    """
    if checkpoint and trace:
        raise UserError(f"{checkpoint} and --trace={trace} are two things to profile; name one")
    if not (checkpoint or trace or merge):
        raise UserError("name a checkpoint or a run, or in its place --trace=FOLDER, or --merge=FILE to add files up")
    if trace and not experts:
        raise UserError(f"--trace={trace} does not say how many experts there are: --experts")
    if not checkpoint and output is None:
        raise UserError("without a checkpoint there is no folder to write to: --output")
    if similarity and not checkpoint:
        raise UserError("--similarity needs a checkpoint: neither traces nor files of choices hold router logits")
    others = [(str(path), RoutingStatistics.load(path)) for path in merge or []]
    counted = [(trace, read_trace(Path(trace), experts, sample, seed))] if trace else []
    if checkpoint:
        grid = _join(expert)
        opened = open_run(checkpoint)
        output = output or opened.folder.parent.parent / f"statistics-{part}.safetensors"
        _check_early(opened, others, similarity, output)
        statistics = _profile(opened, Wanted(data, part, tokens, sample, batch, similarity), grid, seed)
        distributed.shutdown()
        if grid.rank:
            return
        counted = [(checkpoint, statistics)]
    assert output is not None
    _finish(_merged(counted + others, sample, seed), output)


def _check_early(
    checkpoint: Checkpoint, others: list[tuple[str, RoutingStatistics]], similarity: bool, output: Path
) -> None:
    """Refuse before the work what would be refused after it."""
    model = checkpoint_config(checkpoint).model
    for name, part in others:
        part.check_model(model.moe_layers, model.num_experts, model.num_experts_per_tok, name)
        if part.has_similarity != similarity:
            raise UserError(
                f"--merge={name} holds {'' if part.has_similarity else 'no '}similarity; --similarity is {similarity}"
            )
    with writing(f"--output={output}"):
        output.parent.mkdir(parents=True, exist_ok=True)


def _profile(checkpoint: Checkpoint, wanted: Wanted, grid: Grid, seed: int) -> RoutingStatistics:
    """Run the model over the text, with a progress bar on a terminal."""
    console = Console(stderr=True, quiet=grid.rank > 0, highlight=False, soft_wrap=True)
    profile = Profile(checkpoint, wanted, grid, console.print)

    def follow(rounds: Iterator[int]) -> Iterator[int]:
        columns = (TextColumn("profiling"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
            yield from bar.track(rounds, total=profile.rounds)

    return profile.run(seed, follow)


def _merged(parts: list[tuple[str, RoutingStatistics]], sample: int, seed: int) -> RoutingStatistics:
    (_, first), *rest = parts
    for name, part in rest:
        part.check_model(list(first.layers), first.num_experts, first.top_k, name)
    return merge_statistics([part for _, part in parts], sample, seed)


def _join(expert: int) -> Grid:
    """This process's place among those of torchrun or mpirun; alone without either."""
    if not any(name in os.environ for name in ("WORLD_SIZE", *distributed.MPI_VARIABLES)):
        if expert != 1:
            raise UserError(f"--expert={expert} needs as many ranks, and this is one process (see --help)")
        return Grid()
    distributed.initialize()
    distributed.set_deepspeed_log(False)
    ranks = torch.distributed.get_world_size()
    if ranks % expert:
        raise UserError(f"--expert={expert} does not divide {ranks} ranks")
    return Grid.create(expert)


def _finish(statistics: RoutingStatistics, output: Path) -> None:
    with writing(f"--output={output}"):
        output.parent.mkdir(parents=True, exist_ok=True)
        statistics.save(output)
    Console().print(table(statistics))
    print(f"wrote {output}")


def table(statistics: RoutingStatistics) -> Table:
    """A row a layer: C_T with experts in their order, load, and the two experts most often chosen together."""
    experts = statistics.num_experts
    devices = [d for d in DEVICES if d <= experts and experts % d == 0]
    title = f"{statistics.tokens:,} tokens, {experts} experts, {statistics.top_k} a token, placed contiguously"
    made = Table(title=title)
    c_t = [f"C_T at D={d}" if d == devices[0] else f"D={d}" for d in devices]
    for name in ("layer", *c_t, "load max/mean", "closest pair", "share"):
        made.add_column(name, justify="right")
    for index, layer in statistics.layers.items():
        where = torch.arange(experts)
        c_t = [f"{mean_devices(layer.sets_NK, where // (experts // d)):.3f}" for d in devices]
        made.add_row(str(index), *c_t, *_load_and_pair(layer))
    return made


def _load_and_pair(layer: LayerStatistics) -> tuple[str, str, str]:
    first, second = divmod(int(layer.pairs_EE.argmax()), len(layer.loads_E))
    ratio = float(layer.loads_E.max() / layer.loads_E.double().mean())
    share = int(layer.pairs_EE[first, second]) / max(layer.tokens, 1)
    return f"{ratio:.2f}", f"{first} + {second}", f"{share:.1%}"
