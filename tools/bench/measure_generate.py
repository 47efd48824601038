"""`occult bench generate`: prompts and single steps behind them, ours and the peers', on the same model."""

import importlib.metadata
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from occult_train.config import Config, load
from occult_train.generation import Ending, Sampling, generate
from occult_train.models.cache import KVCache
from occult_train.models.gpt import GPT, Runtime
from occult_train.models.init import init_weights
from occult_train.moe.choose import Shape, Wanted, candidates
from occult_train.parallel.grid import Grid
from occult_train.tools.bench.peers import convert_to_autoep
from occult_train.tools.bench.shapes import (
    CHECKED,
    GENERATE_SYSTEMS,
    GenerateTask,
    parse_system,
    pruning,
    read_value,
)
from occult_train.tools.bench.step_systems import hub_model
from occult_train.tools.bench.timing import Clock, Times

LIMITS = {torch.bfloat16: 0.1, torch.float32: 1e-4}
"""‖got − ours‖/‖ours‖ of their last logits, against our plain model with all experts on each rank. In bf16, experts as
good as equal swap places now and then."""


class Ours:
    """Our model and `generate`; `dispatcher` is dedup (kernels on a GPU) or all_to_all (K copies, plain torch), and
    `prune` keeps each token's experts on so many ranks."""

    def __init__(self, config: Config, options: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        self.grid = Grid.create(config.parallel.expert)
        name = options.get("dispatcher", "dedup") if self.grid.expert_size > 1 else "local"
        way = None
        if device.type == "cuda" and name != "all_to_all":
            m = config.model
            shape = Shape(m.hidden_size, m.intermediate_size, m.num_experts, m.num_experts_per_tok, 1, dtype)
            way = candidates(shape, self.grid, Wanted(transport="collective", overlap="none"))[0]
        runtime = Runtime(grid=self.grid, dispatcher=name, way=way, prune=pruning(options, config.parallel.expert))
        self.model = our_model(config, runtime, device, dtype)

    def prompts(self, ids_BS: Tensor) -> Tensor:
        """Logits [B, V] behind the prompts, whose keys and values are kept for steps to come. Collective."""
        batch, length = ids_BS.shape
        cache = KVCache(self.model.config, [0] * batch, length + 1, self.model.lm_head.weight)
        return self.model.predict(ids_BS, cache)[:, -1]

    def make(self, ids_BS: Tensor, new: int) -> Any:
        """`new` likeliest tokens behind each prompt. Collective."""
        prompts = [row for row in ids_BS.tolist() for _ in range(self.grid.expert_size)]  # rank r takes every r-th
        return generate(self.model, prompts, Sampling(), Ending(new))


class Transformers:
    """Hugging Face's model, whole on each rank, and its `generate`."""

    def __init__(self, config: Config, options: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        self.model: Any = hub_model(config, dtype).eval()
        self.convert(config, options)

    def convert(self, config: Config, options: dict[str, Any]) -> None:
        """Change it before it is used."""

    def prompts(self, ids_BS: Tensor) -> Tensor:
        """As ours."""
        return self.model(input_ids=ids_BS, use_cache=True, logits_to_keep=1).logits[:, -1]

    def make(self, ids_BS: Tensor, new: int) -> Any:
        """As ours."""
        return self.model.generate(
            ids_BS,
            attention_mask=torch.ones_like(ids_BS),
            **{"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "use_cache": True},
            **{"eos_token_id": None, "pad_token_id": 0},
        )


class AutoEP(Transformers):
    """The same with its expert layers replaced by DeepSpeed's; options are keys of `expert_parallel`."""

    def convert(self, config: Config, options: dict[str, Any]) -> None:
        """Spread the experts. Collective."""
        convert_to_autoep(self.model, Grid.create(config.parallel.expert), options)
        self.model.eval()


SYSTEMS: dict[str, Callable[..., Any]] = {"ours": Ours, "autoep": AutoEP, "transformers": Transformers}


def our_model(config: Config, runtime: Runtime, device: torch.device, dtype: torch.dtype) -> GPT:
    """With the weights that training would start with."""
    with torch.device(device):
        model = GPT(config.model, runtime)
    init_weights(model, config.train.seed)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


_kept: dict[str, tuple[Any, float]] = {}


@torch.no_grad()
def measure(task: GenerateTask) -> dict[str, Any]:
    """A row of results, the same on every rank; with `error` and no numbers where the logits are wrong. Collective."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = load(list(task.settings))
    system, error = _system(task.system, config, device, dtype)
    row = _description(task, config) | {"error_logits": error}
    if not error < LIMITS[dtype]:
        return row | {"error": f"not right: logits are off by {error:.1e}"}
    ids = _tokens(config, device, (task.batch, task.prompt))
    clock = Clock(device)
    if task.new == 0:
        system.prompts(ids)
        times = clock.measure(lambda i: system.prompts(ids), task.seconds)
        tokens = task.batch * task.prompt
    else:
        times = step_times(lambda new: system.make(ids, new), task.new, task.seconds, device)
        tokens = task.batch
    if times.median <= 0:
        return row | {"error": f"{task.new} steps take less than the prompts' time varies by; raise --new or --seconds"}
    row |= {"ms": times.median, "p10": times.p10, "p90": times.p90, "repetitions": times.repetitions}
    return row | {"tokens_per_second": tokens / times.median * 1000}


def step_times(make: Callable[[int], Any], new: int, seconds: float, device: torch.device) -> Times:
    """Of one step: what `new` more tokens take beyond the first, which the prompts give. Collective.

    Args:
        make: generates so many tokens.
        seconds: of repetitions.
    """
    make(2)
    found: list[float] = []
    started = time.monotonic()
    going = True
    while going:
        first, all_of_them = (_timed(make, count, device) for count in (1, 1 + new))
        found.append((all_of_them - first) / new * 1000)
        going = len(found) < 3 or _largest(time.monotonic() - started, device) < seconds
    return Times.of(found)


def _timed(make: Callable[[int], Any], count: int, device: torch.device) -> float:
    """Seconds of the slowest rank."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    started = time.perf_counter()
    make(count)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return _largest(time.perf_counter() - started, device)


def _system(name: str, config: Config, device: torch.device, dtype: torch.dtype) -> tuple[Any, float]:
    """The system of this process, and how far its logits are off on the worst rank. One system at a time."""
    if name not in _kept:
        _kept.clear()
        kind, given = parse_system(name, GENERATE_SYSTEMS)
        options = {key: read_value(value) for key, value in given.items()}
        ids = _tokens(config, device, CHECKED)
        plain = Runtime(prune=pruning(options, config.parallel.expert) if kind == "ours" else None)
        expected = our_model(config, plain, device, dtype)(ids)[:, -1].float()
        system = SYSTEMS[kind](config, options, device, dtype)
        got = system.prompts(ids).float()
        _kept[name] = (system, _largest(float((got - expected).norm() / expected.norm()), device))
    return _kept[name]


def _tokens(config: Config, device: torch.device, size: tuple[int, int]) -> Tensor:
    """Random token ids of this rank."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    return torch.randint(config.model.vocab_size, size, generator=generator).to(device)


def _largest(value: float, device: torch.device) -> float:
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return float(shared)


def _description(task: GenerateTask, config: Config) -> dict[str, Any]:
    return {
        **{"system": task.system, "shape": task.shape, "layers": config.model.num_hidden_layers},
        **{"stage": task.stage, "batch": task.batch, "prompt": task.prompt, "ranks": dist.get_world_size()},
        "p2p": "off" if os.environ.get("NCCL_P2P_DISABLE") == "1" else "on",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in ("deepspeed", "transformers")},
    }
