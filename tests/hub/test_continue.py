"""Training on from a Hugging Face model: on four ranks, with experts placed at random, and through the trainer."""

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import making
import pytest
import torch
import torch.distributed as dist
import transformers

from occult_train.checkpoint import state
from occult_train.checkpoint.store import open_checkpoint
from occult_train.config import load, to_yaml
from occult_train.data.loader import Batches, build_datasets
from occult_train.data.sentencepiece_training import train_sentencepiece
from occult_train.data.tokenizer import load_tokenizer
from occult_train.engine import build_engine
from occult_train.errors import ConfigError, DataError
from occult_train.hub import files as hub_files
from occult_train.hub.source import open_model
from occult_train.inference import run_tokenizer
from occult_train.moe.placement import Placement, to_json
from occult_train.parallel.grid import Grid
from occult_train.testing import run_distributed
from occult_train.tools.export import export, verify_export
from occult_train.tools.import_ import import_model
from occult_train.tools.prepare import prepare
from occult_train.trainer import run

RANKS = 4
LENGTH = 13
STAGES = dict(zip(making.MAIN, (1, 3, 2, 0, 3), strict=True))


def settings(name: str, folder: Path) -> list[str]:
    """Of a run that begins with a model in `folder/name/hub`."""
    return [
        f"model.from_pretrained={folder}/{name}/hub",
        f"moe.placement={folder}/{name}/placement.json",
        f"zero.stage={STAGES[name]}",
        f"data.sequence_length={LENGTH}",
        f"parallel.expert={RANKS}",
        f"output={folder}/{name}/run",
        "train.precision=fp32",
        "train.global_batch_size=8",
        "train.micro_batch_size=2",
        "deepspeed.zero_optimization.stage3_param_persistence_threshold=40",  # else a model this small stays whole
    ]


def batch(vocab_size: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.randint(vocab_size, (2, LENGTH + 1), generator=torch.Generator().manual_seed(100 + rank))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def begin(rank: int, folder: Path) -> dict[str, tuple[float, int]]:
    """For each family: read the model, compute one loss, save. Returns losses and bytes that this rank has read."""
    results = {}
    for name in making.MAIN:
        config = load(settings(name, folder))
        grid = Grid.create(config.parallel.expert)
        engine = build_engine(config, grid)
        model = open_model(Path(config.model.from_pretrained))
        state.load(engine, grid, model)
        ids, labels = batch(config.model.vocab_size, rank)
        engine.module.train()
        loss = float(engine(ids, labels).detach())
        state.save(engine, grid, folder / name / "run" / "checkpoints", 1, {}, to_yaml(config), keep=1)
        results[name] = (loss, model.bytes_read)
    return results


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, making.Theirs], list[dict[str, Any]]]:
    folder, made, rng = tmp_path_factory.mktemp("begun"), {}, random.Random(3)
    for name in making.MAIN:
        made[name] = making.make(name, folder / name / "hub")
        shape = open_model(folder / name / "hub").config.model
        slots = list(range(shape.num_experts))
        placements = {i: Placement(tuple(rng.sample(slots, len(slots)))) for i in shape.moe_layers}
        (folder / name / "placement.json").write_text(to_json(placements))
    return folder, made, run_distributed(begin, RANKS, folder, timeout=300)


@pytest.mark.parametrize("name", making.MAIN)
def test_first_loss_is_theirs_on_every_rank(name: str, begun: tuple[Any, dict[str, making.Theirs], Any]) -> None:
    _, made, ranks = begun
    for rank, results in enumerate(ranks):
        expected = made[name].loss(*batch(made[name].vocab_size, rank))
        assert results[name][0] == pytest.approx(float(expected.detach()), rel=1e-5), rank


@pytest.mark.parametrize("name", making.MAIN)
def test_each_rank_reads_its_own_experts_alone(name: str, begun: tuple[Any, dict[str, making.Theirs], Any]) -> None:
    _, made, ranks = begun
    experts = sum(t.nbytes for n, t in made[name].saved.items() if ".experts." in n)
    rest = sum(t.nbytes for n, t in made[name].saved.items() if ".experts." not in n)
    assert experts > 0
    for results in ranks:
        assert results[name][1] == rest + experts // RANKS


@pytest.mark.parametrize("name", making.MAIN)
def test_bits_come_back_from_four_ranks_and_another_placement(
    name: str, begun: tuple[Path, dict[str, making.Theirs], Any], tmp_path: Path
) -> None:
    """The checkpoint that training saved, exported: the tensors that the model began with, under their names."""
    folder, made, _ = begun
    checkpoint = open_checkpoint(folder / name / "run")
    assert checkpoint.state["placement"] != {str(i): list(range(12)) for i in range(3)}
    vocabulary = train_sentencepiece(["the cat sat on the mat and saw seven dogs run home\n" * 3], 290)
    export(checkpoint, tmp_path / "hf", "auto", 10**9, vocabulary)
    again = making.read_all(tmp_path / "hf")
    assert again.keys() == made[name].saved.keys()
    assert all(torch.equal(again[n], tensor) for n, tensor in made[name].saved.items())


# --- through the trainer


class Case(NamedTuple):
    """A model with a tokenizer, a corpus in its ids, and three runs."""

    folder: Path
    theirs: making.Theirs


def run_all(_rank: int, folder: Path) -> None:
    """Train from the model, from its import, and on from the first run when the model is gone."""
    common = [f"data.path={folder}/corpus", "data.sequence_length=32", "parallel.expert=2", "train.precision=fp32"]
    common += ["train.global_batch_size=8", "train.micro_batch_size=2", "monitor.interval=1", "eval.interval=0"]
    common += ["optimizer.lr=1e-3", "scheduler.warmup_steps=0", "eval.sequences=1", "checkpoint.interval=0"]
    run(load([f"model.from_pretrained={folder}/model", f"output={folder}/direct", "train.steps=1", *common]))
    imported = [f"{folder}/imported/config.yaml", f"checkpoint.resume={folder}/imported", f"output={folder}/resumed"]
    run(load([*imported, "train.steps=1", *common]))
    if dist.get_rank() == 0:
        (folder / "model").rename(folder / "moved")
    dist.barrier()
    run(load([f"{folder}/direct/config.yaml", "train.steps=2"]))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("trainer")
    made = making.make("qwen2_moe", folder / "model")
    making.add_tokenizer(folder / "model")
    (folder / "model" / "generation_config.json").write_text(json.dumps(GENERATION))
    rng = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "seven", "dogs", "run", "home"]
    texts = [json.dumps({"text": " ".join(rng.choice(words) for _ in range(200))}) for _ in range(12)]
    (folder / "text.jsonl").write_text("\n".join(texts))
    source = str(folder / "model" / "tokenizer.json")
    prepare([str(folder / "text.jsonl")], folder / "corpus", tokenizer=source, workers=1, valid_fraction=0.1)
    import_model(open_model(folder / "model"), folder / "imported")
    run_distributed(run_all, 2, folder, timeout=300)
    return Case(folder, made)


GENERATION = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "eos_token_id": [7, 9], "pad_token_id": 7}
"""How its makers let the model write, which is no setting of ours."""


def losses(run: Path) -> list[float]:
    records = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "step"]


def test_the_first_logged_loss_is_theirs(case: Case) -> None:
    config = load([f"{case.folder}/direct/config.yaml"])
    data, _ = build_datasets(config.data, config.train.seed, vocab_size=257)
    rows = next(Batches(data, consumed_samples=0, micro_batch_size=8, rank=0, world_size=1))
    logits = case.theirs.logits(rows["input_ids"]).flatten(0, 1)
    expected = float(torch.nn.functional.cross_entropy(logits, rows["labels"].flatten()).detach())
    assert losses(case.folder / "direct")[0] == pytest.approx(expected, rel=1e-5)
    assert losses(case.folder / "resumed")[0] == pytest.approx(expected, rel=1e-5)


def test_the_family_s_balancing_loss_comes_along(case: Case) -> None:
    for name in ("direct", "resumed"):
        moe = load([f"{case.folder}/{name}/config.yaml"]).moe
        assert (moe.balance, moe.aux_loss, moe.aux_loss_coef, moe.z_loss_coef) == ("aux_loss", "pooled", 0.05, 0.0)


def test_the_run_goes_on_without_the_folder_it_began_with(case: Case) -> None:
    assert not (case.folder / "model").exists()
    assert len(losses(case.folder / "direct")) == 2
    assert open_checkpoint(case.folder / "direct").step == 2
    assert open_checkpoint(case.folder / "direct").has_optimizer


def test_what_was_trained_goes_back_with_its_tokenizer_and_numbers(case: Case, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(case.folder / "direct")
    export(checkpoint, tmp_path / "hf", "fp32", 10**9, run_tokenizer(checkpoint))
    compared = verify_export(checkpoint, tmp_path / "hf")
    assert compared.logits < 1e-5
    assert compared.differing == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "hf" / name).read_bytes() == (case.folder / "moved" / name).read_bytes()
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert {key: getattr(settings, key) for key in GENERATION} == GENERATION
    text = "saw <b>seven</b>\n\tdogs, größer 🙂"
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert words(text)["input_ids"] == load_tokenizer(case.folder / "corpus").encode(text)
    before, after = (json.loads((p / "config.json").read_text()) for p in (case.folder / "moved", tmp_path / "hf"))
    changed = {key: value for key, value in after.items() if before.get(key) != value}
    assert changed == {"rope_theta": 10000.0, "sliding_window": None}, "what transformers 4 and 5 call the same"
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "Qwen2MoeForCausalLM" in card
    assert f"{losses(case.folder / 'direct')[1]:.4f}" in card
    assert "the weights of model" in card
    again = open_model(tmp_path / "hf")
    assert all(torch.equal(again.read(name), checkpoint.read(name)) for name in again.entries)


def test_a_corpus_in_other_ids_is_refused(case: Case, tmp_path: Path) -> None:
    words = train_sentencepiece(["the cat sat on the mat and saw seven dogs run home\n" * 3], 290)
    path = words.save(tmp_path)
    with pytest.raises(DataError, match=r"made with tokenizer .*tokenizer.model, model.from_pretrained=x"):
        hub_files.check_same_tokenizer(case.folder / "moved", path, "model.from_pretrained=x")
    hub_files.check_same_tokenizer(case.folder / "moved", case.folder / "corpus" / "tokenizer.json", "x")


def test_settings_that_contradict_the_model_are_refused(case: Case) -> None:
    moved = case.folder / "moved"
    with pytest.raises(ConfigError, match=r"model.num_experts=6 was given, but model.from_pretrained=.*moved has 12"):
        load([f"model.from_pretrained={moved}", "data.sequence_length=32", "model.num_experts=6"])
    with pytest.raises(ConfigError, match=r"model.from_pretrained=.*gone is not a folder|gone: .*is not a folder"):
        load([f"model.from_pretrained={case.folder}/gone"])
    config = load([f"model.from_pretrained={moved}", "data.sequence_length=32", "moe.aux_loss_coef=0.5"])
    assert (config.moe.aux_loss_coef, config.moe.aux_loss, config.model.hidden_size) == (0.5, "pooled", 48)
