"""What checkpoints cost the steps beside them: one run that saves now and then, on this machine.

    python -m occult_train.tools.bench.saving corpus checkpoint.background=true checkpoint.buffer_gib=0.1

Steps that ended while a checkpoint was copied or written are compared with the others of the same run. For a share of
steps that tells something, let checkpoint.interval be several times the steps that a checkpoint takes.
"""

import itertools
import tempfile
from pathlib import Path
from statistics import fmean, median
from typing import Annotated

import typer

from occult_train import runlog
from occult_train.checkpoint.store import MANIFEST
from occult_train.errors import UserError
from occult_train.launcher.plan import Options
from occult_train.launcher.train import launch

SETTINGS = [
    *("model.hidden_size=256", "model.intermediate_size=512", "model.num_hidden_layers=4"),
    *("model.num_attention_heads=4", "model.num_experts=16", "model.num_experts_per_tok=2", "train.precision=fp32"),
    *("data.sequence_length=128", "train.global_batch_size=4", "train.micro_batch_size=2", "train.steps=81"),
    *("eval.interval=0", "eval.sequences=2", "monitor.interval=1", "checkpoint.keep=0", "checkpoint.interval=20"),
]
WARM_UP = 5
"""Steps that do not count."""


def step_times(run: Path) -> tuple[list[list[float]], list[float]]:
    """Seconds of steps beside each checkpoint, and of all others.

    A save begins with the end of its step, and ends with its manifest. The last save, after which nothing is trained,
    does not count.
    """
    ended = {line["step"]: line["time"] for line in runlog.read(run / "log.jsonl") if line["kind"] == "step"}
    written = {int(path.parent.name[5:]): path.stat().st_mtime for path in run.glob(f"checkpoints/step-*/{MANIFEST}")}
    beside: dict[int, list[float]] = {step: [] for step in written if step < max(ended)}
    others = []
    for before, step in itertools.pairwise(sorted(ended)):
        seconds = ended[step] - ended[before]
        saved = [at for at in beside if at <= before and ended[before] < written[at]]
        if saved:
            beside[saved[-1]].append(seconds)
        elif before > WARM_UP:
            others.append(seconds)
    return list(beside.values()), others


def main(
    corpus: Annotated[str, typer.Argument(help="Made by `occult prepare`.")],
    settings: Annotated[list[str] | None, typer.Argument(help="As of `occult train`.")] = None,
    ranks: Annotated[int, typer.Option(help="Of one host. On CPUs fewer than cores leave some to the writers.")] = 2,
) -> None:
    """Train, and print what the steps took."""
    with tempfile.TemporaryDirectory(prefix="occult-saving-") as folder:
        run = [*SETTINGS, f"parallel.expert={ranks}", f"data.path={corpus}", *(settings or []), f"output={folder}/run"]
        if code := launch(run, Options(num_gpus=ranks)):
            raise typer.Exit(code)
        beside, others = step_times(Path(folder, "run"))
        size = sum(p.stat().st_size for p in sorted(Path(folder, "run", "checkpoints").glob("step-*"))[-1].iterdir())
    print(f"a checkpoint has {size / 1e6:,.0f} MB")
    print(f"{len(others)} steps without: {fmean(others):.3f} s, median {median(others):.3f} s")
    for steps in beside:
        print(f"{len(steps)} steps beside one: {fmean(steps):.3f} s, the first {steps[0]:.3f} s")
    everything = [seconds for steps in beside for seconds in steps]
    print(f"all of those: {fmean(everything):.3f} s, {fmean(everything) / fmean(others):.3f} times the others")
    lost = sum(everything) - len(everything) * fmean(others)
    print(f"a checkpoint costs {lost / len(beside):.2f} s of training")


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
