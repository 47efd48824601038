"""What studies share that train again and again in one process: a run's steps, its held-out loss, a CSV of runs."""

import csv
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

from occult_train.config import Config
from occult_train.data.loader import Batches, Samples
from occult_train.data.samples import NOT_COUNTED, HeldOut
from occult_train.engine import learning_rate, set_learning_rate
from occult_train.errors import UserError

UNTIMED = 10
"""First steps of a run, which compile and warm up."""
RowType = TypeVar("RowType")
RunType = TypeVar("RunType", bound=tuple[Any, ...])


def device_name() -> str:
    """The GPU's name, or CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def train(engine: Any, config: Config, data: Samples) -> float:
    """All steps of one rank, each with its learning rate. Returns the mean seconds of a step, the first few left out.

    A micro-batch is read while the device computes the one before.

    Raises:
        UserError: zero.stage is 0, where gradients would not be clipped.
    """
    if config.zero.stage == 0:
        raise UserError("zero.stage=0 does not clip gradients here; use zero.stage=1")
    micro, device = config.train.micro_batch_size, engine.device
    batches = Batches(data, consumed_samples=0, micro_batch_size=micro, rank=0, world_size=1)
    untimed = min(UNTIMED, config.train.steps - 1)
    engine.module.train()
    batch = _on(device, next(batches))
    started = time.perf_counter()
    for step in range(config.train.steps):
        if step == untimed:
            _wait()
            started = time.perf_counter()
        set_learning_rate(engine, learning_rate(config, step))
        for _ in range(config.accumulation_steps(1)):
            engine.backward(engine(**batch))
            batch = _on(device, next(batches))
            engine.step()
        engine.module.finish_step()
    _wait()
    return (time.perf_counter() - started) / (config.train.steps - untimed)


@torch.no_grad()
def held_out_loss(model: Any, config: Config, data: HeldOut) -> float:
    """Mean loss in nats over the first eval.sequences held-out sequences."""
    total, micro = min(config.eval.sequences or len(data), len(data)), config.train.micro_batch_size
    device = model.lm_head.weight.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    for first in range(0, total, micro):
        rows = [data[i] for i in range(first, min(first + micro, total))]
        batch = _on(device, {name: torch.stack([row[name] for row in rows]) for name in rows[0]})
        counted = (batch["labels"] != NOT_COUNTED).sum()
        sums += torch.stack((model(**batch).double() * counted, counted.double()))
    return float(sums[0] / sums[1])


def read_rows(kind: type[RowType], path: Path) -> list[RowType]:
    """The runs of a CSV, whose columns are the fields of the dataclass `kind`; none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        types = get_type_hints(kind)
        return [kind(**{name: types[name](value) for name, value in line.items()}) for line in csv.DictReader(file)]


def append(path: Path, row: Any) -> None:
    """Add a run, a dataclass, to a CSV, which has a head from the first one on."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(row)])
        if new:
            writer.writeheader()
        writer.writerow(asdict(row))


def parse_share(text: str) -> tuple[int, int]:
    """`2/4` as (2, 4).

    Raises:
        ValueError: it is no such share.
    """
    first, count = map(int, text.split("/"))
    if not 1 <= first <= count:
        raise ValueError(text)
    return first, count


def make_runs(
    runs: list[RunType], run: Callable[..., Any], path: Path, until: float
) -> Iterator[tuple[RunType, Any, float]]:
    """Make runs, each `run(*its values)` a row that is appended to the CSV, as long as the longest so far would end
    before `until` (of time.perf_counter). Yields the run, its row and its seconds."""
    longest = 0.0
    for number, each in enumerate(runs):
        started = time.perf_counter()
        if started + longest > until:
            print(f"{len(runs) - number} runs are left; the same command goes on")
            return
        row = run(*each)
        append(path, row)
        seconds = time.perf_counter() - started
        longest = max(longest, seconds)
        yield each, row, seconds


def _on(device: torch.device, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch on the device, without waiting for what that computes."""
    if device.type == "cpu":
        return batch
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
