"""`occult import`: a Hugging Face model as a checkpoint, weights alone."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress

from occult_train.checkpoint import store
from occult_train.checkpoint.shards import Entry, ShardWriter
from occult_train.checkpoint.store import write_durably
from occult_train.config import Config, to_yaml
from occult_train.errors import UserError, writing
from occult_train.hub import files as hub_files
from occult_train.hub.source import HubModel, open_model
from occult_train.hub.verify import compare
from occult_train.inference import load_model

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_OWN = {"checkpoints", hub_files.FOLDER, "config.yaml"}
"""What an import that was cut short leaves behind."""
SHARD_BYTES = 5 * 10**9
"""Largest weight file that is written, but for a tensor that is larger."""


def command(
    model: Annotated[Path, typer.Argument(help="Folder of a Hugging Face model.")],
    output: Annotated[Path, typer.Option(help="Run folder to write; it must not hold another run.")],
    verify: Annotated[bool, typer.Option(help="Load both and compare logits and chosen experts.")] = False,
) -> None:
    """Write MODEL as a checkpoint that trains, resumes and exports like any other. AdamW's moments are not in it."""
    opened = open_model(model)
    for remark in opened.config.remarks():
        print(remark)
    folder = import_model(opened, output)
    shape = opened.config.model
    print(f"imported {model} ({opened.config.family.model_type}, {shape.num_params():,} parameters) to {folder}")
    if verify:
        print(compare(load_model(store.open_checkpoint(folder)), model).check(model))


def import_model(model: HubModel, output: Path) -> Path:
    """Write the checkpoint, one tensor in memory at a time. Returns its folder.

    Raises:
        UserError: the output folder holds something else, or cannot be written.
        DataError: a weight file is damaged.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output} is a file")
    root = output / "checkpoints"
    if output.exists() and (store.find_latest(root) or not {p.name for p in output.iterdir()} <= _OWN):
        raise UserError(f"--output={output} is not empty; name a new folder")
    with writing(f"--output={output}"):
        folder = store.begin(root, 0)
        try:
            entries = _write_tensors(model, folder)
            yaml = to_yaml(_config(model, output))
            (folder / "config.yaml").write_text(yaml)
            files = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
            manifest = {"state": _state(model), "tensors": entries, "files": files}
            hub_files.keep(model.folder, output)
            write_durably(output / "config.yaml", yaml)
            return store.commit(root, 0, manifest, keep=0)
        except BaseException:
            store.remove_partial(root)
            raise


def _write_tensors(model: HubModel, folder: Path) -> dict[str, dict[str, object]]:
    shards = _shards(model)
    entries: dict[str, dict[str, object]] = {}
    with Progress() as progress:
        task = progress.add_task(f"reading {model.folder.name}", total=len(model.entries))
        for number, names in enumerate(shards):
            shapes = {name: model.entries[name].shape for name in names}
            writer = ShardWriter(folder / f"model-{number:05d}.safetensors", shapes)
            try:
                for name in names:
                    writer.write(name, model.read(name))
                    progress.advance(task)
                writer.close()
            except BaseException:
                writer.abandon()
                raise
            entries |= {name: entry.to_json() for name, entry in writer.entries.items()}
    return entries


def _shards(model: HubModel) -> list[list[str]]:
    """Names in the model's order, cut where the next tensor would make a file too large."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, source in model.entries.items():
        nbytes = Entry("", source.shape, 0, "").nbytes
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _config(model: HubModel, output: Path) -> Config:
    """Settings of a run that continues the model as it is."""
    config, settings = Config(output=str(output)), model.config.settings()
    config.model = dataclasses.replace(model.config.model)
    for name, value in settings["moe"].items():
        setattr(config.moe, name, value)
    config.train.precision = PRECISIONS[model.dtype]
    config.data.sequence_length = min(config.data.sequence_length, config.model.max_position_embeddings)
    return config


def _state(model: HubModel) -> dict[str, Any]:
    """What a checkpoint says beside tensors, of a run that has not begun."""
    imported = {"folder": str(model.folder), "family": model.config.family.model_type}
    return {"step": 0, "consumed_samples": 0, "adam_step": 0, "imported": imported}
