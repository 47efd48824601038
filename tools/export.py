"""`occult export`: a checkpoint as a Hugging Face model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import save_file

from occult_train.checkpoint.store import Checkpoint, write_durably
from occult_train.config import Config
from occult_train.data.tokenizer import CONFIG, SentencePieceTokenizer, Tokenizer
from occult_train.errors import ConfigError, UserError, writing
from occult_train.inference import checkpoint_config, load_model, open_run, run_tokenizer
from occult_train.models.huggingface import Family, family_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MARK = "occult_export.json"
"""Which run and dtype; a folder with it may be written again."""
LOGITS_TOLERANCE = 1e-4
"""‖ours − theirs‖/‖theirs‖ of fp32 logits; measured 1e-6 on the demo model."""


def command(
    checkpoint: Annotated[str, typer.Argument(help="A run's folder or a checkpoint.")],
    output: Annotated[Path, typer.Option(help="Folder to write; it must not hold another model.")],
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16, or auto: what it was trained in.")] = "auto",
    shard_size: Annotated[float, typer.Option(help="Largest weight file in GB.", min=0.001)] = 5.0,
    tokenizer: Annotated[str, typer.Option(help="Tokenizer file, if not the run's.")] = "",
    verify: Annotated[bool, typer.Option(help="Load it with transformers and compare logits.")] = False,
) -> None:
    """Write CHECKPOINT in Hugging Face format, experts under their own ids."""
    opened = open_run(checkpoint)
    export(opened, output, dtype, int(shard_size * 1e9), run_tokenizer(opened, tokenizer))
    print(f"exported {opened.folder} to {output}")
    if verify:
        error = compare_logits(opened, output)
        print(f"transformers' logits agree with ours to {error:.1e} (fp32, ‖ours − theirs‖/‖theirs‖)")
        if not error <= LOGITS_TOLERANCE:
            raise UserError(f"{output} is not the model of {opened.folder}: logits differ by {error:.1e}")


def export(checkpoint: Checkpoint, output: Path, dtype: str, shard_bytes: int, tokenizer: Tokenizer) -> None:
    """Write the model, its config and its tokenizer.

    Raises:
        ConfigError: no family holds the model, an unknown dtype, or a balancing bias, which no family's router has.
        UserError: the output folder holds something else, or cannot be written.
    """
    config = checkpoint_config(checkpoint)
    family = family_of(config.model)
    name = config.train.precision if dtype == "auto" else dtype
    if name not in DTYPES:
        raise ConfigError(f"--dtype={dtype} is not one of auto, {', '.join(DTYPES)}")
    if any(b != 0 for bias in checkpoint.state.get("expert_bias", {}).values() for b in bias):
        raise ConfigError(f"{family.architecture} cannot hold the balancing bias of moe.balance={config.moe.balance}")
    _check_output(output)
    with writing(f"--output={output}"):
        output.mkdir(parents=True, exist_ok=True)
        # first, so that an export that was cut short can be made again
        write_durably(output / MARK, json.dumps({"run": config.output, "dtype": name}, indent=1))
        _write_weights(checkpoint, family, output, DTYPES[name], shard_bytes)
        _write_configs(family, config, output, name, tokenizer.eod_id)
        _write_tokenizer(tokenizer, output)


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output} is a file")
    if output.exists() and any(output.iterdir()) and not (output / MARK).exists():
        raise UserError(f"--output={output} is not empty and was not made by `occult export`")


def _shards(checkpoint: Checkpoint, limit: int) -> Iterator[list[str]]:
    """Names of the weights, cut where the next one would make a file larger than the limit (fp32 bytes)."""
    shard: list[str] = []
    size = 0
    for name, entry in checkpoint.entries.items():
        if "/" in name:  # a moment of Adam
            continue
        if shard and size + entry.nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += entry.nbytes
    yield shard


def _write_weights(checkpoint: Checkpoint, family: Family, output: Path, dtype: torch.dtype, limit: int) -> None:
    for stale in output.glob("model*.safetensors*"):
        stale.unlink()
    shards = list(_shards(checkpoint, limit))
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    where: dict[str, str] = {}
    total = 0
    for file, names in zip(track(files, "exporting", disable=len(files) < 4), shards, strict=True):
        tensors = {family.to_hub(name): checkpoint.read(name).to(dtype) for name in names}
        try:
            save_file(tensors, output / file, metadata={"format": "pt"})
        except SafetensorError as error:  # it has a class of its own for a full disk
            raise OSError(f"{file}: {error}") from None
        where |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    write_durably(output / "model.safetensors.index.json", json.dumps(index, indent=1))


def _write_tokenizer(tokenizer: Tokenizer, output: Path) -> None:
    tokenizer.save(output)
    config = tokenizer.transformers_config() if isinstance(tokenizer, SentencePieceTokenizer) else None
    if config is not None:
        write_durably(output / CONFIG, json.dumps(config, indent=1))


def _write_configs(family: Family, config: Config, output: Path, dtype: str, eos: int) -> None:
    names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    hub: dict[str, Any] = family.hub_config(config.model)
    hub |= {"dtype": names[dtype], "eos_token_id": eos, "bos_token_id": None, "pad_token_id": None, "use_cache": True}
    write_durably(output / "config.json", json.dumps(hub, indent=1))
    write_durably(output / "generation_config.json", json.dumps({"eos_token_id": eos}, indent=1))


@torch.no_grad()
def compare_logits(checkpoint: Checkpoint, folder: Path) -> float:
    """‖ours − theirs‖/‖theirs‖ of fp32 logits on random tokens, ours rounded to the export's dtype first."""
    from transformers import AutoModelForCausalLM

    stored = DTYPES[json.loads((folder / MARK).read_text())["dtype"]]
    ours = load_model(checkpoint)
    for parameter in ours.parameters():
        parameter.copy_(parameter.to(stored).to(torch.float32))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    length = min(128, ours.config.max_position_embeddings)
    tokens = torch.randint(ours.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    expected = theirs(tokens).logits
    return float((ours(tokens) - expected).norm() / expected.norm())
