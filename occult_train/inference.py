"""A trained model in one process: from a checkpoint, without DeepSpeed."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from occult_train import config as configs
from occult_train.checkpoint.logical import logical_tensors
from occult_train.checkpoint.placing import recorded
from occult_train.checkpoint.state import Weights, check_fits
from occult_train.checkpoint.store import Checkpoint, open_checkpoint
from occult_train.config import Config
from occult_train.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from occult_train.errors import CheckpointError, DataError
from occult_train.hub import files as hub_files
from occult_train.models.config import ModelConfig
from occult_train.models.gpt import GPT, Runtime
from occult_train.moe.similarity import FILE_NAME, SimilarityTables


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
    with torch.device(device):
        model = GPT(config, runtime)
    logical = logical_tensors(model, model.runtime.grid)
    check_fits(checkpoint, logical, ("param",))
    for tensor in logical:
        parts = [checkpoint.read(piece) for piece in tensor.pieces]
        tensor.parameter.copy_(torch.stack(parts) if tensor.expert else parts[0])
    for index, layer in model.moe_layers().items():
        bias = checkpoint.state.get("expert_bias", {}).get(str(index))
        if bias is not None:
            layer.router.expert_bias.copy_(torch.tensor(bias))
    for parameter in model.parameters():  # not model.to(dtype): the balancing bias stays fp32
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def alone(checkpoint: Checkpoint, config: Config) -> Runtime:
    """How the checkpoint's model runs in one process. Pruning is for the devices that it was trained with."""
    prune = config.moe.prune
    resolved = prune.resolved(config.parallel.expert) if prune.active else None
    return Runtime(placements=recorded(checkpoint), prune=resolved)


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
    if tokenizer.vocab_size > known:
        raise DataError(
            f"tokenizer {found} has {tokenizer.vocab_size} ids, the model of {checkpoint.folder} has "
            f"model.vocab_size={known}"
        )
    return tokenizer


@torch.no_grad()
def generate(
    model: GPT, prompt: list[int], length: int, temperature: float, seed: int, stop: int | None, vocab_size: int = 0
) -> list[int]:
    """Continue `prompt` by up to `length` tokens; temperature 0 takes the likeliest token each time.

    The last max_position_embeddings tokens are what the model sees.

    Args:
        stop: a token that ends the text, not returned.
        vocab_size: ids from it on (a padded vocabulary's) are never chosen; 0 allows all.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device)
    generator.manual_seed(seed)
    tokens = list(prompt)
    for _ in range(length):
        window = torch.tensor([tokens[-model.config.max_position_embeddings :]], device=device)
        token = int(_pick(model(window)[0, -1, : vocab_size or None].float(), temperature, generator))
        if token == stop:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def _pick(logits_V: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits_V.argmax()
    return torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator)


def open_run(path: str) -> Checkpoint:
    """A checkpoint folder, or the latest checkpoint of a run."""
    return open_checkpoint(Path(path))
