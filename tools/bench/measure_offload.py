"""`occult bench offload`: generation with experts on the device, and in host memory with and without copies ahead."""

import zlib
from typing import Any

import torch
from torch import Tensor

from occult_train.config import Config, load
from occult_train.errors import UserError
from occult_train.generation import Ending, Sampling, generate
from occult_train.inference import offload_experts
from occult_train.models.cache import KVCache
from occult_train.models.gpt import GPT, Runtime
from occult_train.moe.choose import Shape, Wanted, candidates
from occult_train.moe.offload import Places
from occult_train.parallel.grid import Grid
from occult_train.parallel.zero import is_expert
from occult_train.tools.bench.measure_generate import LIMITS, our_model, step_times
from occult_train.tools.bench.shapes import AHEAD, RESIDENT, SINGLY, OffloadTask
from occult_train.tools.bench.timing import Clock

WHOLE = 1 << 62
"""A budget that all experts fit in."""
CHECKED = (1, 4)
"""Sequences and tokens whose logits must be right; few, since they need as many experts at once."""
DRAWN = Sampling(temperature=1.0)
"""Tokens are drawn: of a random model the likeliest ones soon repeat, and so do the experts."""


class Subject:
    """The model of this process, first with all experts on the device, then as `become` says."""

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype) -> None:
        self.device, way = device, None
        if device.type == "cuda":
            m = config.model
            shape = Shape(m.hidden_size, m.intermediate_size, m.num_experts, m.num_experts_per_tok, 1, dtype)
            way = candidates(shape, Grid(), Wanted(transport="collective", overlap="none"))[0]
        self.model: GPT = our_model(config, Runtime(way=way), device, dtype)
        self.mode, self.error = RESIDENT, 0.0
        self.places: Places | None = None
        self.checked = self.tokens(*CHECKED)
        self.right = self.prompts(self.checked)

    def become(self, mode: str, budget: int) -> None:
        """Keep experts as the mode says, and compare logits with those of before.

        Raises:
            UserError: the budget is too small.
            ValueError: experts have left the device, and shall be resident again.
        """
        if mode == self.mode:
            return
        if mode == RESIDENT:
            raise ValueError("resident comes first")
        self.places = None  # its room is free before there is another
        self.places = offload_experts(self.model, self.device, WHOLE if mode == SINGLY else budget, mode == AHEAD)
        self.mode = mode
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.error = float((self.prompts(self.checked) - self.right).norm() / self.right.norm())

    def tokens(self, batch: int, length: int) -> Tensor:
        """Random ids, always the same."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.model.config.vocab_size, (batch, length), generator=generator).to(self.device)

    def prompts(self, ids_BS: Tensor) -> Tensor:
        """Logits [B, V] behind prompts, fp32."""
        batch, length = ids_BS.shape
        cache = KVCache(self.model.config, [0] * batch, length + 1, self.model.lm_head.weight)
        return self.model.predict(ids_BS, cache)[:, -1].float()

    def weights_bytes(self) -> int:
        """Of the model on the device."""
        sizes = [(p.numel() * p.element_size(), is_expert(p)) for p in self.model.parameters()]
        experts = sum(size for size, expert in sizes if expert) if self.places is None else self.places.nbytes
        return sum(size for size, expert in sizes if not expert) + experts


_kept: dict[tuple[str, ...], Subject] = {}


@torch.no_grad()
def measure(task: OffloadTask) -> dict[str, Any]:
    """A row of results; with `error` and no numbers where the logits are wrong or the budget is too small."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if task.settings not in _kept:
        _kept[task.settings] = Subject(load(list(task.settings)), device, dtype)
    subject = _kept[task.settings]
    row = _description(task, subject.model)
    try:
        subject.become(task.mode, task.budget)
        row |= {"weights_bytes": subject.weights_bytes(), "error_logits": subject.error}
        if not subject.error < LIMITS[dtype]:
            return row | {"error": f"not right: logits are off by {subject.error:.1e}"}
        return row | _measure(task, subject, device)
    except UserError as error:
        return row | {"error": str(error)}


def _measure(task: OffloadTask, subject: Subject, device: torch.device) -> dict[str, Any]:
    ids = subject.tokens(task.batch, task.prompt)
    prompts = ids.tolist()
    made: list[list[int]] = []

    def make(new: int) -> None:
        made[:] = generate(subject.model, prompts, DRAWN, Ending(new))

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    make(1 + task.new)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    drawn, before = zlib.crc32(repr(made).encode()), _tally(subject)
    if task.new:
        times = step_times(make, task.new, task.seconds, device)
    else:
        times = Clock(device).measure(lambda _: subject.prompts(ids), task.seconds)
    if times.median <= 0:
        return {"error": f"{task.new} steps take less than the prompts' time varies by; raise --new or --seconds"}
    uses, fetched = (after - earlier for after, earlier in zip(_tally(subject), before, strict=True))
    return {
        **{"ms": times.median, "p10": times.p10, "p90": times.p90, "repetitions": times.repetitions},
        "tokens_per_second": task.batch * (1 if task.new else task.prompt) / times.median * 1000,
        "peak_bytes": peak,
        "copied": fetched / uses if uses else None,
        "made": drawn,
    }


def _tally(subject: Subject) -> tuple[int, int]:
    tally = subject.places.tally if subject.places else None
    return (tally.uses, tally.fetched) if tally else (0, 0)


def _description(task: OffloadTask, model: GPT) -> dict[str, Any]:
    return {
        **{"system": task.mode, "stage": task.stage, "batch": task.batch, "prompt": task.prompt},
        "parameters": model.config.num_params(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
    }
