"""`occult export`: a checkpoint as a Hugging Face model."""

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from occult_train.checkpoint.store import Checkpoint, write_durably
from occult_train.config import Config
from occult_train.data.tokenizer import CONFIG, SentencePieceTokenizer, Tokenizer, find_tokenizer, load_tokenizer
from occult_train.errors import ConfigError, UserError, writing
from occult_train.hub import files as hub_files
from occult_train.hub import routing
from occult_train.hub.card import card
from occult_train.hub.source import NOTE
from occult_train.hub.verify import Comparison, compare
from occult_train.hub.writing import check_whole, write_weights
from occult_train.inference import checkpoint_config, load_model, open_run, run_tokenizer
from occult_train.models import families
from occult_train.models.families import OCCULT, Family, family_of
from occult_train.models.families.occult import PRUNING

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def command(
    checkpoint: Annotated[str, typer.Argument(help="A run's folder or a checkpoint.")],
    output: Annotated[Path, typer.Option(help="Folder to write; it must not hold another model.")],
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16, or auto: what it was trained in.")] = "auto",
    shard_size: Annotated[float, typer.Option(help="Largest weight file in GB.", min=0.001)] = 5.0,
    tokenizer: Annotated[str, typer.Option(help="Tokenizer file, if not the run's.")] = "",
    pruned: Annotated[
        bool, typer.Option("--pruned", help="Route as it was trained, by a modelling file beside the weights.")
    ] = False,
    verify: Annotated[bool, typer.Option(help="Load it with transformers, compare logits and chosen experts.")] = False,
) -> None:
    """Write CHECKPOINT in Hugging Face format, experts under their own ids.

    Experts on a shortcut, and --pruned, need what no class of transformers has: the folder brings its own
    (trust_remote_code=True).
    """
    opened = open_run(checkpoint)
    words = None if _has_no_tokenizer(opened) and not tokenizer else run_tokenizer(opened, tokenizer)
    export(opened, output, dtype, int(shard_size * 1e9), words, pruned)
    print(f"exported {opened.folder} to {output}")
    config = checkpoint_config(opened)
    prune = config.moe.prune
    if pruned:
        print(f"it keeps {routing.describe(prune.resolved(config.parallel.expert), opened, config.model.moe_layers)}")
    elif prune.active:
        print(f"it routes unpruned, not as moe.prune.policy={prune.policy} of its training does; --pruned keeps that")
    if verify:
        print(verify_export(opened, output).check(output))


def _has_no_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether the run began with a Hugging Face model and neither has one that we read."""
    kept = hub_files.kept(checkpoint)
    return kept is not None and not find_tokenizer(kept) and not find_tokenizer(kept.parent)


def export(
    checkpoint: Checkpoint,
    output: Path,
    dtype: str,
    shard_bytes: int,
    tokenizer: Tokenizer | None,
    pruned: bool = False,
) -> None:
    """Write the model, its config, its tokenizer and its card.

    Args:
        tokenizer: None only for a model that came without one.
        pruned: route as in training, in our own family.

    Raises:
        ConfigError: no family holds the model, an unknown dtype, a balancing bias, which no other family's router has,
            or `pruned` of a model that is not.
        CheckpointError: its tensors are not those of the model, or damaged.
        UserError: the output folder holds something else, or cannot be written.
    """
    config = checkpoint_config(checkpoint)
    kept = hub_files.kept(checkpoint)
    before = hub_files.read_settings(kept, "config.json")
    if pruned:
        routing.check_pruned(config, checkpoint)
    own = pruned or config.model.scmoe.block != "none"
    family = OCCULT if own else family_of(config.model, str(before.get("model_type", "")))
    name = config.train.precision if dtype == "auto" else dtype
    if name not in DTYPES:
        raise ConfigError(f"--dtype={dtype} is not one of auto, {', '.join(DTYPES)}")
    if not own and routing.has_bias(checkpoint):
        raise ConfigError(f"{family.architecture} cannot hold the balancing bias of moe.balance={config.moe.balance}")
    check_whole(checkpoint, config.model)
    _check_output(output)
    note: dict[str, Any] = {"run": config.output, "step": checkpoint.step, "dtype": name}
    with writing(f"--output={output}"):
        output.mkdir(parents=True, exist_ok=True)
        # first, so that an export that was cut short can be made again
        write_durably(output / NOTE, json.dumps(note, indent=1))
        extra = routing.keys(checkpoint, config, pruned) if own else {}
        _write_configs(family, config, before, kept, output, name, tokenizer, extra)
        _write_tokenizer(tokenizer, kept, output)
        write_durably(output / "README.md", card(checkpoint, config, family, NAMES[name], pruned))
        beside = routing.tensors(checkpoint, config, pruned) if own else {}
        note["sha256"] = write_weights(checkpoint, config.model, family, output, DTYPES[name], shard_bytes, beside)
        write_durably(output / NOTE, json.dumps(note, indent=1))


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output} is a file")
    if output.exists() and any(output.iterdir()) and not (output / NOTE).exists():
        raise UserError(f"--output={output} is not empty and was not made by `occult export`")


def _write_tokenizer(tokenizer: Tokenizer | None, kept: Path | None, output: Path) -> None:
    """The tokenizer's files: those the model came with if it is still the same one, else ours."""
    for stale in hub_files.TOKENIZER_FILES:
        (output / stale).unlink(missing_ok=True)
    found = find_tokenizer(kept) if kept else None
    if kept and (tokenizer is None or (found and load_tokenizer(found).fingerprint() == tokenizer.fingerprint())):
        hub_files.copy_files(kept, output, hub_files.TOKENIZER_FILES)
        return
    assert tokenizer is not None
    tokenizer.save(output)
    config = tokenizer.transformers_config() if isinstance(tokenizer, SentencePieceTokenizer) else None
    if config is not None:
        write_durably(output / CONFIG, json.dumps(config, indent=1))


def _write_configs(
    family: Family,
    config: Config,
    before: dict[str, Any],
    kept: Path | None,
    output: Path,
    dtype: str,
    tokenizer: Tokenizer | None,
    extra: dict[str, Any],
) -> None:
    """config.json, with the keys `extra` too, and generation_config.json, on top of those that the model came with."""
    ids = {"eos_token_id": tokenizer.eod_id if tokenizer else None, "bos_token_id": None, "pad_token_id": None}
    hub: dict[str, Any] = {**ids, "use_cache": True}
    if before.get("model_type") == family.model_type:
        hub |= {key: value for key, value in before.items() if key not in ("torch_dtype", "transformers_version")}
    elif family is OCCULT:
        hub |= {key: before[key] for key in ids if key in before}
    else:
        kept = None
    hub |= family.hub_config(config.model) | extra | {"dtype": NAMES[dtype]}
    if config.moe.balance == "aux_loss":
        hub |= family.write_aux(config.moe.aux_loss, config.moe.aux_loss_coef)
    if family.modelling:
        module, name = family.modelling.removesuffix(".py"), family.architecture
        settings = name.replace("ForCausalLM", "Config")
        hub["auto_map"] = {"AutoConfig": f"{module}.{settings}", "AutoModelForCausalLM": f"{module}.{name}"}
    for stale in output.glob("modeling_*.py"):
        stale.unlink()
    if family.modelling:
        shutil.copyfile(Path(families.__file__).parent / family.modelling, output / family.modelling)
    write_durably(output / "config.json", json.dumps(hub, indent=1))
    generation = hub_files.read_settings(kept, "generation_config.json")
    generation = generation or {key: hub[key] for key in ids if hub.get(key) is not None}
    write_durably(output / "generation_config.json", json.dumps(generation, indent=1))


@torch.no_grad()
def verify_export(checkpoint: Checkpoint, folder: Path) -> Comparison:
    """Compare with what transformers loads, ours rounded to the export's dtype first."""
    stored = DTYPES[json.loads((folder / NOTE).read_text())["dtype"]]
    ours = load_model(checkpoint, pruned=bool(hub_files.read_settings(folder, "config.json").get(PRUNING)))
    for parameter in ours.parameters():
        parameter.copy_(parameter.to(stored).to(torch.float32))
    return compare(ours, folder)
