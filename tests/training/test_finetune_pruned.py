"""The paper's recipe as it is shipped: from an own run and from its export alike, on instructions, at a tiny size."""

import json
from pathlib import Path

import pytest
import torch
from small_runs import SMALL, records
from test_trainer import train_until

from occult_train.checkpoint.store import open_checkpoint
from occult_train.config import load
from occult_train.errors import ConfigError
from occult_train.inference import load_model
from occult_train.testing import run_distributed
from occult_train.tools.export import command as export
from occult_train.tools.prepare import prepare
from occult_train.tools.profile import command as profile

RECIPE = str(Path(__file__).parents[2] / "configs" / "finetune_pruned.yaml")
LINES = [{"prompt": f"{i}{' sat on' * (i % 4)}", "response": f" a mat and saw {i} dogs"} for i in range(120)]
GROUPS = 4


def train(_rank: int, arguments: list[str]) -> None:
    """A whole run of settings alone."""
    from occult_train.trainer import run

    run(load(arguments))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> Path:
    """A run of two steps with its experts placed, its export, instructions in its ids, and its similarity on them."""
    folder = tmp_path_factory.mktemp("recipe")
    slots = {str(layer): [3, 7, 0, 4, 1, 6, 2, 5] for layer in range(2)}
    (folder / "placement.json").write_text(json.dumps({"slot_to_expert": slots}))
    more = [f"data.path={corpus}", f"output={folder}/run", "train.steps=2", f"moe.placement={folder}/placement.json"]
    run_distributed(train, 2, [*SMALL, *more, "moe.aux_loss=pooled", "moe.z_loss_coef=0"], timeout=240)
    export(f"{folder}/run", folder / "hf")
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    source, words = [str(folder / "lines.jsonl")], str(folder / "run")
    prepare(source, folder / "answers", tokenizer=words, instructions=True, valid_fraction=0.2)
    profile(f"{folder}/run", data=f"{folder}/answers", tokens=0, output=folder / "similar", similarity=True)
    return folder


def settings(base: Path, start: str, output: str, steps: int) -> list[str]:
    """What a user types behind the recipe, and sizes."""
    return [
        *(RECIPE, f"model.from_pretrained={base}/{start}", f"data.path={base}/answers", f"output={base}/{output}"),
        *(f"moe.prune.similarity={base}/similar", f"moe.prune.groups={GROUPS}", "parallel.expert=2"),
        *("train.precision=fp32", "train.global_batch_size=8", "train.micro_batch_size=2", "data.sequence_length=32"),
        *("scheduler.warmup_steps=0", "optimizer.lr=0.03", "monitor.interval=1", f"train.steps={steps}"),
        *("checkpoint.interval=3", "eval.sequences=5", "eval.interval=3"),
    ]


@pytest.fixture(scope="module")
def tuned(base: Path) -> Path:
    run_distributed(train, 2, settings(base, "run", "tuned", 6), timeout=240)
    return base / "tuned"


def test_experts_and_routers_alone_are_learnt_from_the_run_s_weights(base: Path, tuned: Path) -> None:
    before, after = open_checkpoint(base / "run"), open_checkpoint(tuned)
    assert (before.step, after.step) == (2, 6)
    assert after.state["placement"] == before.state["placement"]
    assert after.state["consumed_samples"] == 6 * 8
    for name in (name for name in before.entries if "/" not in name):
        assert torch.equal(before.read(name), after.read(name)) != (".moe." in name), name
    assert records(tuned)[-1]["loss"] < records(tuned)[0]["loss"] - 0.3


def test_what_is_learnt_is_pruned(base: Path, tuned: Path) -> None:
    model, used = load_model(open_checkpoint(tuned)), []

    class Watch:
        def add(self, experts_TK: torch.Tensor) -> None:
            used.append(experts_TK)

    for layer in model.moe_layers().values():
        layer.counters.append(Watch())  # type: ignore[arg-type]
    model(torch.arange(60).view(2, 30))
    device = torch.tensor([[3, 7, 0, 4, 1, 6, 2, 5].index(expert) // 2 for expert in range(8)])
    for experts_TK in used:
        assert max(len(set(row)) for row in device[experts_TK].tolist()) == 2
        assert all(len(set(row)) == 3 for row in experts_TK.tolist())
    assert len(used) == 2


def test_a_hugging_face_folder_gives_the_same_run_also_when_it_stops(base: Path, tuned: Path) -> None:
    """It knows no placement, which is given then; the rest, down to the balancing loss, comes from the folder."""
    arguments = [*settings(base, "hf", "from-hf", 6), f"moe.placement={base}/placement.json"]
    run_distributed(train_until, 2, arguments, 2, timeout=240)
    assert open_checkpoint(base / "from-hf").step in (3, 4, 5)
    run_distributed(train, 2, arguments, timeout=240)
    ours, theirs = records(tuned), records(base / "from-hf")
    assert len(ours) == len(theirs) == 6 + 2
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", r"model\.from_pretrained has no value; name the folder of a Hugging Face model, or a run"),
        ("model.from_pretrained={base}/nowhere", r"{base}/nowhere is not a folder; models of the hub are downloaded"),
        ("model.from_pretrained={base}/answers", r"{base}/answers is not a Hugging Face model: it has no config\.json"),
        (
            "model.from_pretrained={base}/run moe.prune.groups=2 model.num_experts=4",
            r"num_experts=4 was given, .*run has 8",
        ),
        ("model.from_pretrained={base}/run", r"policy=similarity needs moe\.prune\.groups above 1, which is 0, with"),
        (
            "model.from_pretrained={base}/run parallel.expert=8",
            r"moe\.prune\.devices=2 leaves a token 2 experts \(2 times 1\), fewer than model\.num_experts_per_tok=3",
        ),
    ],
)
def test_mistakes_are_one_line(base: Path, words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("{base}", str(base))) as caught:
        load([RECIPE, "data.sequence_length=32", *words.replace("{base}", str(base)).split()])
    assert "\n" not in str(caught.value)


def test_the_model_s_balancing_and_no_more_of_its_settings_come_along(base: Path) -> None:
    config = load(settings(base, "run", "new", 6))
    assert (config.moe.aux_loss, config.moe.z_loss_coef, config.moe.placement) == ("pooled", 0.0, "auto")
    assert (config.train.trainable, config.optimizer.lr, config.model.num_experts) == ("moe", 0.03, 8)
    assert config.model.vocab_size == load([f"{base}/run/config.yaml"]).model.vocab_size > 0
