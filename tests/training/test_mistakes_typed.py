"""Commands that cannot work: one line that names the setting and the values, exit code 2, before any rank starts."""

import hashlib
import re
import sys
from pathlib import Path

import pytest

from occult_train.launcher import cli

COMMAND_LINE = [
    ("trian a.yaml", r"No such command 'trian'\. Did you mean 'train'; see `occult --help`"),
    ("train a.yaml --gpus 3", r"No such option: --gpus .*; see `occult train --help`"),
    ("train a.yaml --num-gpus many", r"Invalid value for '--num-gpus': .* valid integer.*; see `occult train --help`"),
    ("train a.yaml --master-port 99999", r"Invalid value for '--master-port': .* 65535; see .*"),
    ("train", r"Missing argument 'CONFIG\.yaml\|path=value'; see `occult train --help`"),
    ("export run", r"Missing option '--output'; see `occult export --help`"),
    ("generate run --length 0", r"Invalid value for '--length': .*; see `occult generate --help`"),
]
CONFIGS = [
    ("nowhere.yaml", r"config file nowhere\.yaml does not exist"),
    ("broken.yaml", r"config file broken\.yaml is not valid YAML: .*line 1, column 8.*"),
    ("list.yaml", r"config file list\.yaml must hold keys and values"),
    ("corpus", r"argument 'corpus' is neither a \.yaml file nor an override like train\.steps=100"),
    ("a.yaml train.step=3", r"unknown setting train\.step; did you mean train\.steps\?"),
    ("a.yaml modle.num_experts=8", r"unknown setting modle; did you mean model\?"),
    ("a.yaml train.steps=many", r"train\.steps: Value 'many' .* could not be converted to Integer"),
    ("a.yaml moe.dispatcher=dedupe", r"moe\.dispatcher=dedupe is not one of .*; did you mean dedup\?"),
    ("a.yaml train.steps=-5", r"train\.steps=-5 must be at least 1"),
    ("a.yaml train.seed=99999999999999999999", r"train\.seed=9{20} needs more than 64 bits"),
    ("a.yaml optimizer.lr=nan", r"optimizer\.lr=nan must be finite"),
    ("a.yaml output=", r"output is empty"),
]
COMBINATIONS = [
    ("model.num_experts_per_tok=9", r"model\.num_experts_per_tok=9 must lie between 1 and model\.num_experts=8"),
    ("parallel.expert=3", r"model\.num_experts=8 is not divisible by parallel\.expert=3"),
    ("--num-gpus 3", r"3 ranks are not divisible by parallel\.expert=2"),
    ("train.global_batch_size=9", r"\S+batch_size=9 is not divisible by train\.micro_batch_size=2 times 2 ranks"),
    ("data.sequence_length=65", r"data\.sequence_length=65 is longer than model\.max_position_embeddings=64"),
    ("moe.dispatcher=local", r"moe\.dispatcher=local needs parallel\.expert=1, which is 2"),
    ("data.blend.b=1", r"data\.path=corpus and data\.blend=\{'b': 1\.0\} cannot both be given; .*"),
    ("data.blend={b:1}", r"data\.blend\.b:1 has no weight; write .*, with a space after each colon"),
    ("zero.stage=0 train.precision=bf16", r"zero\.stage=0 with train\.precision=bf16: .*; use zero\.stage=1, or .*"),
    ("deepspeed.bf16.enabled=true", r"deepspeed\.bf16=.*True.* is set by train\.precision; use that"),
    ("output=a.yaml", r"output=a\.yaml cannot be written: Not a directory"),
    ("output=/proc/run", r"output=/proc/run cannot be written: No such file or directory"),
]
HOSTS = [
    ("--hostfile nowhere", r"hostfile nowhere cannot be read: No such file or directory"),
    ("--hostfile hosts.typo", r"hosts\.typo:2: 'node8 slot=2' is not of the form HOST slots=N, e\.g\. .*"),
    ("--hostfile hosts", r"host node7 cannot be reached by ssh .*Could not resolve hostname node7.*"),
    ("--hostfile hosts --include node9", r"--include=node9: there is no host node9 among localhost, node7"),
    ("--hostfile hosts --include node7:4", r"--include=node7:4: host node7 has no slot 4, it has 2"),
    ("--hostfile hosts --num-gpus 4", r"--num-gpus=4 but host localhost has 2 slots"),
    ("--num-nodes 2", r"several nodes need --hostfile"),
    ("--deepspeed-args=--nonsense", r"--deepspeed-args: unrecognized arguments: --nonsense"),
]
PREPARE = [
    ("", r"no source given; name files or folders, or --stdlib"),
    ("nowhere --output new", r"source nowhere does not exist"),
    ("empty --output new", r"source folder empty holds no text file .*"),
    ("binary --output new", r"source folder binary holds no text: its 1 files are binary"),
    ("binary/weights.txt --output new", r"source binary/weights\.txt is not a text file: it holds NUL bytes"),
    ("text --output new --tokenizer none.model", r"tokenizer none\.model does not exist"),
    ("text --output new --tokenizer a.yaml", r"a\.yaml is not a sentencepiece model"),
    ("text --output a.yaml", r"--output=a\.yaml cannot be written: File exists"),
    ("text --output corpus", r"corpus holds a corpus of other text or settings; --overwrite replaces it"),
]
RUNS = [
    ("export nowhere --output new", r"checkpoint nowhere does not exist"),
    ("export empty --output new", r"checkpoint empty is incomplete or empty: there is no checkpoint\.json"),
    ("export run --output a.yaml", r"--output=a\.yaml is a file"),
    ("export run --output text", r"--output=text is not empty and was not made by `occult export`"),
    ("export run --output /proc/new", r"--output=/proc/new cannot be written: No such file or directory"),
    ("export run --output new --dtype fp8", r"--dtype=fp8 is not one of auto, fp32, bf16, fp16"),
    ("export run --output new --tokenizer other", r"tokenizer other has 350 ids, .* has model\.vocab_size=320"),
    ("generate damaged", r"checkpoint damaged/\S+: \S+ in model-00000\.safetensors is damaged \(its checksum .*"),
    ("generate run --tokenizer other", r"tokenizer other has 350 ids, .* has model\.vocab_size=320"),
    ("generate run --tokenizer none.model", r"tokenizer none\.model does not exist"),
    ("generate bare", r"bare, the run of step-0+1, has no tokenizer; name one: --tokenizer"),
    ("report text", r"text is not the folder of a run: text/log\.jsonl cannot be read"),
    ("report logless", r"logless/log\.jsonl:1 is damaged; repair that line or remove the file"),
]
MISTAKES = [
    *COMMAND_LINE,
    *((f"train {words}", message) for words, message in CONFIGS),
    *((f"train a.yaml {words}", message) for words, message in (*COMBINATIONS, *HOSTS)),
    *((f"prepare {words}", message) for words, message in PREPARE),
    *RUNS,
]


def contents(folder: Path) -> dict[str, str]:
    """Every file and its hash."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("words, message", MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_command_that_cannot_work_is_one_line(
    mess: Path, words: str, message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(mess)
    monkeypatch.setenv("PATH", str(mess / "bin"), prepend=":")
    monkeypatch.setattr(sys, "argv", ["occult", *words.split()])
    before = contents(mess)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capfd.readouterr()
    assert (ended.value.code, out) == (2, ""), err
    assert re.fullmatch(f"error: {message}\n", err), err
    assert contents(mess) == before, "something was written or lost"
