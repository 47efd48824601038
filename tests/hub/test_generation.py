"""Continuing with every family's model as its own code does, and through the command as a user types it."""

import sys
from pathlib import Path

import making
import pytest
import torch
import transformers

from occult_train.generation import Ending, Sampling, generate
from occult_train.hub.source import open_model
from occult_train.inference import fill_model
from occult_train.launcher import cli
from occult_train.models.cache import KVCache
from occult_train.tools.import_ import import_model

PROMPTS = [[5, 9, 2, 77, 120, 3, 8], [64], [33, 1, 2, 3]]
LENGTH = 12


@pytest.mark.parametrize("name", making.NAMES)
def test_cached_logits_are_the_family_s(name: str, tmp_path: Path) -> None:
    theirs = making.make(name, tmp_path)
    model = making.ours(tmp_path)
    ids = torch.randint(theirs.vocab_size, (2, 17), generator=torch.Generator().manual_seed(5))
    cache = KVCache(model.config, [0, 0], 17, model.lm_head.weight.data)
    got = torch.cat([model.predict(piece, cache, last=False) for piece in ids.split([9, 1, 1, 5, 1], dim=1)], dim=1)
    with torch.no_grad():
        assert making.difference(got, theirs.logits(ids)) < 1e-5


@pytest.mark.parametrize("name", making.CONFIGS)
def test_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """In one batch of ours, one by one in theirs."""
    making.make(name, tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    made = generate(making.ours(tmp_path), PROMPTS, Sampling(), Ending(LENGTH))
    for prompt, tokens in zip(PROMPTS, made, strict=True):
        theirs = reference.generate(
            torch.tensor([prompt]), max_new_tokens=LENGTH, min_new_tokens=LENGTH, do_sample=False, eos_token_id=None
        )
        assert theirs[0, len(prompt) :].tolist() == tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder, and its import as `run` beside it."""
    folder = tmp_path_factory.mktemp("generate")
    making.make("olmoe", folder / "hf")
    making.add_tokenizer(folder / "hf")
    import_model(open_model(folder / "hf"), folder / "run")
    (folder / "prompts.txt").write_text("def main\n\nimport größe\nx\n")
    (folder / "none.txt").write_text("\n")
    return folder


def occult(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["occult", "generate", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capfd.readouterr()
    return int(str(ended.value.code)), out, err


def test_folder_run_and_ranks_say_the_same(
    model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A single text is streamed; in a batch it is the same text."""
    monkeypatch.chdir(model)
    common = ["--length", "15", "--top-k", "40", "--top-p", "0.9", "--seed", "3"]
    code, text, err = occult(["hf", "--prompt", "def main", *common], monkeypatch, capfd)
    assert (code, text[:8]) == (0, "def main"), err
    assert len(text) > 12
    for where in (["run"], ["run", "--ep", "2", "--dispatcher", "all_to_all"]):
        assert occult([*where, "--prompt", "def main", *common], monkeypatch, capfd) == (0, text, err)
    code, batch, _ = occult(["hf", "--prompts", "prompts.txt", *common], monkeypatch, capfd)
    assert code == 0
    assert batch.startswith("--- 1 of 3\n" + text + "--- 2 of 3\nimport größe")
    assert occult(["run", "--prompts", "prompts.txt", "--ep", "2", *common], monkeypatch, capfd)[1] == batch


def test_experts_in_host_memory_make_the_same_text(
    model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """12 experts a layer of 11,520 bytes each, 3 layers; what is said of it does not mix with the text."""
    monkeypatch.chdir(model)
    prompt = ["--prompt", "def main", "--length", "15", "--seed", "3"]
    code, text, err = occult(["hf", *prompt], monkeypatch, capfd)
    assert (code, err) == (0, "")
    code, same, err = occult(["run", *prompt, "--offload-experts", "--expert-budget", "0.00015"], monkeypatch, capfd)
    assert (code, same) == (0, text), err
    first, last = err.splitlines()
    assert first.startswith("36 experts (0.00 GB) in host memory, room for 13 (0.00 GB) on the device; tokens choose")
    assert first.endswith("so every copy is waited for")
    fetched, uses = (int(last.split(" of ")[i].split()[0]) for i in (0, 1))
    assert 0 < fetched <= uses
    small = ["hf", *prompt, "--offload-experts", "--expert-budget", "0.00003"]
    message = "--expert-budget=3e-05 has room for 2 experts (0.0 MB), and a token needs 3 experts (0.0 MB) in a layer"
    assert occult(small, monkeypatch, capfd) == (2, "", f"error: {message}\n")


def test_half_precision_is_filled_as_it_is_rounded(model: Path) -> None:
    opened = open_model(model / "hf")
    whole = fill_model(opened.config.model, opened).state_dict()
    half = fill_model(opened.config.model, opened, dtype=torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert {layer.router.expert_bias.dtype for layer in half.moe_layers().values()} == {torch.float32}
    assert all(torch.equal(tensor, whole[name].bfloat16()) for name, tensor in half.state_dict().items())


def test_a_prompt_begins_as_the_family_s_tokenizer_lets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Mixtral's puts a token before each text: what comes of it is what transformers makes of its tokenizer's ids."""
    making.make("mixtral", tmp_path)
    making.add_tokenizer(tmp_path, begins=True)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    ids = words("def main", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == words.bos_token_id
    theirs = [
        reference.generate(start, max_new_tokens=LENGTH, do_sample=False, eos_token_id=None)[0].tolist()
        for start in (ids, ids[:, 1:])
    ]
    assert theirs[0][ids.shape[1] :] != theirs[1][ids.shape[1] - 1 :], "it matters"
    command = [str(tmp_path), "--prompt", "def main", "--temperature", "0", "--length", str(LENGTH)]
    code, text, err = occult(command, monkeypatch, capfd)
    assert (code, text) == (0, words.decode(theirs[0][1:]) + "\n"), err


@pytest.mark.parametrize(
    "words, message",
    [
        ("hf --top-p 0", "--top-p=0.0 must be above 0 and at most 1"),
        ("hf --prompts nowhere", "--prompts=nowhere cannot be read: No such file or directory"),
        ("hf --prompts none.txt", "--prompts=none.txt holds no text"),
        ("hf --ep 5", "--ep=5 does not divide the model's 12 experts"),
        ("hf --ep 2 --dispatcher dedupe", "--dispatcher=dedupe is not one of dedup, all_to_all"),
        (
            "hf --ep 2 --dispatcher hierarchical",
            "--dispatcher=hierarchical is not one of dedup, all_to_all; it sends one copy per node, and this runs on "
            "one",
        ),
        ("hf --expert-budget 1", "--expert-budget=1 needs --offload-experts"),
        (
            "hf --ep 2 --offload-experts",
            "--offload-experts keeps all experts in one process, so --ep=2 cannot spread them",
        ),
        ("nowhere", "checkpoint nowhere does not exist"),
    ],
)
def test_a_mistake_is_one_line(
    model: Path, words: str, message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(model)
    assert occult(words.split(), monkeypatch, capfd) == (2, "", f"error: {message}\n")
