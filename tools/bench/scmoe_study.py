"""Train shortcut-connected experts and what they are compared with, again and again in one process, a CSV line a run.

python -m occult_train.tools.bench.scmoe_study CORPUS RUNS.csv [--seeds 3] [--share I/N] [--seconds S] [path=value ...]

CORPUS is made by `occult prepare`. Settings change those of configs/scmoe/study.yaml, which is the top-2 model; all
variants have its parameters and FLOPs (`variants`). A run's seed, 1 to --seeds, is of the initial weights and of the
order of the text. What the CSV has is not run again, nothing is begun that would not end within --seconds, and the same
command goes on. --share 2/4 makes every fourth run from the second on, for four processes with a CSV each; several may
share a GPU. The table: `python -m occult_train.tools.bench.scmoe_report *.csv`.
"""

import argparse
import gc
import hashlib
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from occult_train import distributed
from occult_train.config import Config, load, to_yaml
from occult_train.data.loader import build_datasets, resolve_vocab
from occult_train.data.samples import GPTDataset
from occult_train.engine import build_engine
from occult_train.errors import UserError
from occult_train.models.config import ModelConfig
from occult_train.parallel.grid import Grid
from occult_train.tools.bench.study import device_name, held_out_loss, make_runs, parse_share, read_rows, train

CONFIG = "configs/scmoe/study.yaml"
Run = tuple[str, int]
"""Variant and seed."""


@dataclass(frozen=True)
class Row:
    """A run."""

    study: str
    """Digest of the settings that all runs share."""
    variant: str
    seed: int
    steps: int
    tokens: int
    passes: float
    """How often the text was read."""
    params: int
    active_params: int
    flops_token: int
    """Of a token's forward pass."""
    loss: float
    """Held-out, in nats."""
    step_ms: float
    """While other runs may have shared the GPU."""
    device: str


def variants(model: ModelConfig) -> dict[str, list[str]]:
    """By name, what makes each of the top-2 model.

    With E experts of width F there, one routed expert of (E-2)/(E-1) F and a shared one of E/(E-1) F have its
    parameters and FLOPs, but for the router, norms and gates of a few rows. dgmoe chooses one of its experts twice.

    Raises:
        UserError: these widths are no whole numbers.
    """
    experts, width = model.num_experts, model.intermediate_size
    if width % (experts - 1):
        raise UserError(
            f"model.intermediate_size={width} must be a multiple of model.num_experts={experts} less 1 for all "
            "variants to have equal parameters"
        )
    part, top1 = width // (experts - 1), "model.num_experts_per_tok=1"
    shared = [
        *(top1, f"model.intermediate_size={(experts - 2) * part}"),
        f"model.shared_expert_intermediate_size={experts * part}",
    ]
    shortcuts = {
        f"scmoe {position} {combine}": [
            *shared,
            *("model.scmoe.block=scmoe", f"model.scmoe.position={position}", f"model.scmoe.combine={combine}"),
        ]
        for position in ("pos1", "pos2", "pos3")
        for combine in ("add", "cg1")
    }
    return {"top-2": [], "shared expert": shared, **shortcuts, "dgmoe": [top1, "model.scmoe.block=dgmoe"]}


class Study:
    """The variants' runs on one text."""

    def __init__(self, arguments: list[str], grid: Grid) -> None:
        """arguments: as `load` takes them."""
        self.arguments, self.grid = arguments, grid
        config = load(arguments)
        self.variants = variants(config.model)
        config.output = config.data.path = ""
        self.digest = hashlib.sha256(to_yaml(config).encode()).hexdigest()[:12]

    def run(self, variant: str, seed: int) -> Row:
        """Train one, and its held-out loss."""
        config = self._config(variant, seed)
        data, valid = build_datasets(config.data, seed, vocab_size=config.model.vocab_size)
        assert isinstance(data, GPTDataset)
        engine = build_engine(config, self.grid, say=lambda line: None)
        seconds = train(engine, config, data)
        loss = held_out_loss(engine.module, config, valid)
        engine.destroy()
        del engine
        gc.collect()  # an engine and its parts refer to one another
        torch.cuda.empty_cache()
        model, length, steps = config.model, config.data.sequence_length, config.train.steps
        samples = steps * config.train.global_batch_size
        passes = round(samples / data.samples_per_epoch, 3)
        size = model.num_params(), model.active_params(), model.flops_per_token(length)
        how = (self.digest, variant, seed, steps, samples * length, passes, *size)
        return Row(*how, loss, 1000 * seconds, device_name())

    def left(self, path: Path, seeds: int, share: tuple[int, int]) -> list[Run]:
        """The runs to make that the CSV lacks: all variants with one seed before the next.

        Args:
            share: (i, n), every n-th from the i-th on, counted from 1.

        Raises:
            UserError: the CSV is of other settings.
        """
        done = read_rows(Row, path)
        others = {row.study for row in done} - {self.digest}
        if others:
            raise UserError(f"{path} has runs of the settings {others.pop()}, these are {self.digest}; name another")
        wanted = [(variant, seed) for seed in range(1, seeds + 1) for variant in self.variants]
        made = {(row.variant, row.seed) for row in done}
        return [run for run in wanted[share[0] - 1 :: share[1]] if run not in made]

    def _config(self, variant: str, seed: int) -> Config:
        config = load([*self.arguments, *self.variants[variant], f"train.seed={seed}"])
        config.model.vocab_size = resolve_vocab(config.data, config.model.vocab_size)
        return config


def main() -> None:
    """Make the runs that are left and that there is time for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus")
    parser.add_argument("output", type=Path)
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=parse_share, default=(1, 1))
    parser.add_argument("--seconds", type=float, default=math.inf)
    given = parser.parse_intermixed_args()
    begun = time.perf_counter()
    distributed.prepare_environment()
    distributed.initialize()
    distributed.set_deepspeed_log(False)
    study = Study([CONFIG, f"data.path={given.corpus}", *given.settings], Grid.create(1))
    runs = study.left(given.output, given.seeds, given.share)
    print(f"{len(runs)} runs to make; set up in {time.perf_counter() - begun:.0f} s", flush=True)
    for (variant, seed), row, seconds in make_runs(runs, study.run, given.output, begun + given.seconds):
        size = f"{row.params:,} parameters, {row.active_params:,} of a token, {row.flops_token:,} FLOPs"
        times = f"{row.step_ms:.1f} ms a step, {seconds:.0f} s"
        print(f"{variant} seed {seed}: loss {row.loss:.4f}, {times}; {size}", flush=True)
    distributed.shutdown()


if __name__ == "__main__":
    main()
