"""A trained model in one process: from a checkpoint, without DeepSpeed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from occult_train import config as configs
from occult_train.checkpoint.logical import logical_tensors
from occult_train.checkpoint.placing import recorded
from occult_train.checkpoint.state import Weights, check_fits, larger_than_files
from occult_train.checkpoint.store import Checkpoint, open_checkpoint
from occult_train.config import Config
from occult_train.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from occult_train.errors import CheckpointError, DataError
from occult_train.hub import files as hub_files
from occult_train.hub.source import HubModel, open_model
from occult_train.models.config import ModelConfig
from occult_train.models.gpt import GPT, Runtime
from occult_train.moe.choose import Shape, Wanted, candidates
from occult_train.moe.offload import Places, offload, usual_budget
from occult_train.moe.similarity import FILE_NAME, SimilarityTables
from occult_train.parallel.grid import Grid
from occult_train.parallel.zero import is_expert


def checkpoint_config(checkpoint: Checkpoint) -> Config:
    """The configuration that a checkpoint was trained with."""
    return configs.load([str(checkpoint.folder / "config.yaml")])


def load_model(
    checkpoint: Checkpoint,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    runtime: Runtime | None = None,
    pruned: bool = True,
) -> GPT:
    """The model with the checkpoint's weights, in evaluation mode; without `runtime` all experts on this device.

    It routes as it was trained to, unless `pruned` is false: then each token goes to its best experts.
    """
    config = checkpoint_config(checkpoint)
    runtime = runtime or alone(checkpoint, config)
    runtime = runtime if pruned else replace(runtime, prune=None)
    model = fill_model(config.model, checkpoint, device, dtype, runtime)
    model.set_step(checkpoint.step)
    if runtime.prune is not None and runtime.prune.policy == "similarity":
        model.set_similarity(SimilarityTables.load(checkpoint.folder / FILE_NAME))
    return model


@torch.no_grad()
def fill_model(
    config: ModelConfig,
    checkpoint: Weights,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    runtime: Runtime | None = None,
) -> GPT:
    """As `load_model`, from anything that holds the weights of such a model."""
    if large := larger_than_files(config, checkpoint.entries):
        raise CheckpointError(f"checkpoint {checkpoint.folder}: its configuration {large}")
    with torch.device(device), _default_dtype(dtype):
        model = GPT(config, runtime)
    logical = logical_tensors(model, model.runtime.grid)
    check_fits(checkpoint, logical, ("param",))
    console = Console(stderr=True)
    hidden = not console.is_terminal or model.runtime.grid.rank > 0
    for tensor in track(logical, "reading", console=console, transient=True, disable=hidden):
        targets = tensor.parameter if tensor.expert else [tensor.parameter]
        for target, piece in zip(targets, tensor.pieces, strict=True):
            target.copy_(checkpoint.read(piece))
    for index, layer in model.moe_layers().items():
        bias = checkpoint.state.get("expert_bias", {}).get(str(index))
        if bias is not None:
            layer.router.expert_bias.copy_(torch.tensor(bias))
    return model.eval()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Parameters are made in this type; the balancing bias names its own."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def offload_experts(model: GPT, device: torch.device, budget: int = 0, ahead: bool = True) -> Places:
    """Move the model to the device, but for its routed experts; see moe/offload.

    Args:
        budget: bytes for experts on the device; 0 takes `usual_budget`.
    """
    layers = model.moe_layers()
    places = offload(layers, device, budget or usual_budget(layers), ahead)
    for parameter in model.parameters():
        if not is_expert(parameter):
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return places


def describe_offload(model: GPT, places: Places) -> str:
    """What lies where, and what copies are hidden behind."""
    total = sum(layer.num_experts for layer in model.moe_layers().values())
    text = (
        f"{total} experts ({total * places.expert_bytes / 1e9:,.2f} GB) in host memory, room for {places.held.size} "
        f"({places.nbytes / 1e9:,.2f} GB) on the device; "
    )
    if window := model.config.scmoe.window:
        return f"{text}tokens choose early, so copies run beside {', '.join(window)}"
    return f"{text}tokens choose right before their experts are computed, so every copy is waited for"


def describe_tally(places: Places) -> str:
    """How many experts were copied."""
    uses, fetched = places.tally.uses, places.tally.fetched
    return f"{fetched:,} of {uses:,} uses of experts were copied ({fetched * places.expert_bytes / 1e9:,.2f} GB)"


def alone(checkpoint: Checkpoint, config: Config) -> Runtime:
    """How the checkpoint's model runs in one process. Pruning is for the devices that it was trained with."""
    prune = config.moe.prune
    resolved = prune.resolved(config.parallel.expert) if prune.active else None
    return Runtime(placements=recorded(checkpoint), prune=resolved)


def serving_runtime(
    weights: Checkpoint | HubModel, grid: Grid, dispatcher: str, device: torch.device, dtype: torch.dtype
) -> Runtime:
    """How a model runs that is not trained: experts where the checkpoint has them, on a GPU with our kernels.

    Args:
        dispatcher: local, dedup or all_to_all; the last is plain torch on a GPU too.
    """
    config, way = weights_config(weights), None
    if device.type == "cuda" and dispatcher != "all_to_all":
        sizes = (config.hidden_size, config.intermediate_size, config.num_experts, config.num_experts_per_tok)
        way = candidates(Shape(*sizes, 1, dtype), grid, Wanted(transport="collective", overlap="none"))[0]
    as_trained = alone(weights, checkpoint_config(weights)) if isinstance(weights, Checkpoint) else Runtime()
    return replace(as_trained, grid=grid, dispatcher=dispatcher, way=way)


def run_tokenizer(checkpoint: Checkpoint, given: str = "") -> Tokenizer:
    """The tokenizer of a checkpoint's run, or the given one (`--tokenizer`).

    Raises:
        CheckpointError: the run has none.
        DataError: it cannot be read, or has ids that the model lacks.
    """
    folder = checkpoint.folder.parent.parent
    found = Path(given) if given else find_tokenizer(folder) or find_tokenizer(folder / hub_files.FOLDER)
    if found is None:
        raise CheckpointError(f"{folder}, the run of {checkpoint.folder.name}, has no tokenizer; name one: --tokenizer")
    tokenizer, known = load_tokenizer(found), checkpoint_config(checkpoint).model.vocab_size
    _check_vocabulary(tokenizer, found, checkpoint.folder, known)
    return tokenizer


def open_weights(path: str) -> Checkpoint | HubModel:
    """A checkpoint folder, the latest checkpoint of a run, or a Hugging Face folder.

    Raises:
        CheckpointError, ConfigError, DataError: missing, damaged, or not supported.
    """
    return open_model(Path(path)) if hub_files.is_model(Path(path)) else open_run(path)


def weights_config(weights: Checkpoint | HubModel) -> ModelConfig:
    """The model that the weights are of."""
    return weights.config.model if isinstance(weights, HubModel) else checkpoint_config(weights).model


def weights_dtype(weights: Checkpoint | HubModel) -> torch.dtype:
    """The type in which a GPU computes it: that of training, or of the files."""
    if isinstance(weights, HubModel):
        return weights.dtype
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return kinds.get(checkpoint_config(weights).train.precision, torch.float32)


def weights_tokenizer(weights: Checkpoint | HubModel, given: str = "") -> Tokenizer:
    """As `run_tokenizer`; a Hugging Face folder has its own."""
    if not isinstance(weights, HubModel):
        return run_tokenizer(weights, given)
    tokenizer, known = load_tokenizer(given or weights.folder), weights.config.model.vocab_size
    _check_vocabulary(tokenizer, given or weights.folder, weights.folder, known)
    return tokenizer


def open_run(path: str) -> Checkpoint:
    """A checkpoint folder, or the latest checkpoint of a run."""
    return open_checkpoint(Path(path))


def _check_vocabulary(tokenizer: Tokenizer, path: Path | str, model: Path, known: int) -> None:
    if tokenizer.vocab_size > known:
        raise DataError(
            f"tokenizer {path} has {tokenizer.vocab_size} ids, the model of {model} has model.vocab_size={known}"
        )
