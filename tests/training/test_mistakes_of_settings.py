"""Settings that only a rank can judge: refused in one line before the first step, and nothing is lost.

One process tries them all. That such an error ends all ranks with exit code 2 is tested with the launcher.
"""

import re
from pathlib import Path

import pytest
from small_runs import train
from test_mistakes_typed import contents

from occult_train.errors import UserError
from occult_train.testing import run_distributed

CORPORA = [
    ("data.path=nowhere", r"data\.path=nowhere does not exist, neither as a folder nor as nowhere\.bin and \.idx"),
    ("data.path=", r"data\.path is empty; name a folder made by `occult prepare`, or a \.bin/\.idx prefix"),
    ("data.path=empty", r"data\.path=empty has no corpus\.json: not finished or not a corpus; .*"),
    ("data.path=broken", r"broken\.idx is not a Megatron index: .*"),
    ("data.path=short model.vocab_size=64", r"short\.bin has 9 tokens, fewer than the 33 of one sample .*"),
    ("data.path= data.blend.corpus=0", r"data\.blend has the weight 0\.0; weights must be positive"),
    ("data.valid_path=nowhere", r"data\.valid_path=nowhere does not exist, .*"),
]
VOCABULARIES = [
    ("data.tokenizer=other", r"wrong tokenizer for the corpus data\.path=corpus: other/tokenizer\.model has .*"),
    ("data.path=unlike", r"wrong tokenizer for the corpus data\.path=unlike: unlike/tokenizer\.model has .*"),
    (
        "data.path= data.blend.corpus=1 data.blend.other=1",
        r"data\.blend=corpus and data\.blend=other were made with .*",
    ),
    ("data.valid_path=other", r"data\.path=corpus and data\.valid_path=other were made with different tokenizers"),
    ("data.path=pair", r"model\.vocab_size=0 stands for the tokenizer's size, and pair comes without a .*"),
    ("model.vocab_size=100", r"model\.vocab_size=100 is smaller than the 300 ids of the tokenizer of corpus .*"),
    ("data.path=pair model.vocab_size=256", r"pair\.bin holds the token id \d+, beyond model\.vocab_size=256"),
    ("data.valid_path=pair", r"pair\.bin holds the token id \d+, beyond model\.vocab_size=320"),
]
PLACEMENTS = [
    ("moe.placement=nowhere.json", r"moe\.placement=nowhere\.json cannot be read: No such file or directory"),
    ("moe.placement=a.yaml", r"moe\.placement=a\.yaml is not a placement file: .*"),
    ("moe.placement=sixteen.json", r"moe\.placement=sixteen\.json has num_experts=16, the model has \S+=8"),
]
CHECKPOINTS = [
    ("checkpoint.resume=nowhere", r"checkpoint\.resume=nowhere \(auto, none, .*\): checkpoint nowhere does not exist"),
    ("checkpoint.resume=foreign", r"checkpoint\.resume=foreign .*: checkpoint foreign is not of occult_train.*"),
    ("checkpoint.resume=run model.hidden_size=48", r"checkpoint run/\S+ is of another model: .* \[320, 32\] there .*"),
    ("checkpoint.resume=run model.num_hidden_layers=3", r"checkpoint run/\S+ is of another model: it has no \S+"),
    ("output=damaged", r"checkpoint damaged/\S+: \S+ in model-00000\.safetensors is damaged .*"),
    ("output=cut", r"checkpoint cut/\S+ is damaged: optimizer-00000\.safetensors has \d+ bytes in place of \d+"),
    ("output=junk", r"checkpoint junk/\S+ is damaged: checkpoint\.json cannot be understood .*"),
]
MISTAKES = [*CORPORA, *VOCABULARIES, *PLACEMENTS, *CHECKPOINTS]
KEPT = ("corpus", "other", "run/checkpoints", "damaged/checkpoints", "cut/checkpoints", "junk/checkpoints")


def refuse_all(_rank: int, folder: str) -> list[str | int]:
    """For each of MISTAKES the message with which it is refused; a step counter where training went on."""
    import os

    from occult_train import trainer

    os.chdir(folder)
    steps = [0]
    finish = trainer.Trainer._log

    def counted(self: trainer.Trainer, *args: object) -> None:
        steps[0] += 1
        finish(self, *args)  # type: ignore[arg-type]

    trainer.Trainer._log = counted  # type: ignore[method-assign]
    messages: list[str | int] = []
    for words, _ in MISTAKES:
        try:
            train(0, ["parallel.expert=1", "data.path=corpus", "output=new", "train.steps=2", *words.split()])
            messages.append("not refused")
        except UserError as error:
            messages.append(str(error))
    return [*messages, steps[0]]


@pytest.fixture(scope="module")
def refused(mess: Path) -> tuple[dict[str, str], int, bool]:
    """Messages by settings, steps trained on the way, and whether what was there is untouched."""
    (mess / "new").mkdir()
    before = [contents(mess / name) for name in KEPT]
    ((*messages, steps),) = run_distributed(refuse_all, 1, str(mess), timeout=300)
    same = before == [contents(mess / name) for name in KEPT]
    return {words: message for (words, _), message in zip(MISTAKES, messages, strict=True)}, steps, same


@pytest.mark.parametrize("words, message", MISTAKES, ids=[words for words, _ in MISTAKES])
def test_settings_that_cannot_work_are_refused_in_one_line(
    refused: tuple[dict[str, str], int, bool], words: str, message: str
) -> None:
    assert re.fullmatch(message, refused[0][words]), refused[0][words]


def test_they_are_refused_before_the_first_step_and_nothing_is_lost(
    refused: tuple[dict[str, str], int, bool],
) -> None:
    assert refused[1:] == (0, True)
