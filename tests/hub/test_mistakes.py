"""Damaged, mislabelled and unsupported models: one line that names what is wrong, and nothing half done."""

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import making
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from occult_train.checkpoint.store import find_latest, open_checkpoint
from occult_train.errors import ConfigError, DataError, UserError
from occult_train.hub.source import open_model
from occult_train.models.config import ModelConfig
from occult_train.models.families import family_of
from occult_train.tools.export import export
from occult_train.tools.import_ import import_model

FILE = "model.safetensors"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.make("olmoe", tmp_path_factory.mktemp("good") / "model").folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "model")
    return tmp_path / "model"


def config(**changes: Any) -> Callable[[Path], None]:
    """A spoiler that changes keys of config.json; None takes one away."""

    def spoil(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))

    return spoil


def weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """A spoiler that changes the tensors."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / FILE)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FILE)

    return spoil


def content(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """A spoiler that changes the weight file's bytes."""
    return lambda folder: (folder / FILE).write_bytes(change((folder / FILE).read_bytes())) and None


def header(old: str, new: str) -> Callable[[Path], None]:
    """A spoiler that replaces text of the file's header, of the same length."""
    assert len(old) == len(new)
    return content(lambda data: data.replace(old.encode(), new.encode(), 1))


def index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    """A spoiler that gives the folder an index, and changes it."""

    def spoil(folder: Path) -> None:
        where = dict.fromkeys(load_file(folder / FILE), "part.safetensors")
        (folder / FILE).rename(folder / "part.safetensors")
        change(where)
        (folder / f"{FILE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))

    return spoil


def _nan(tensors: dict[str, Tensor]) -> None:
    tensors[EXPERT][3, 4] = float("nan")


def _two(folder: Path) -> None:
    (folder / f"{FILE}.index.json").write_text('{"weight_map": {}}')


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "model is not a Hugging Face model: it has no config.json"),
    "config is junk": (lambda f: (f / "config.json").write_text('{"a"'), "config.json is damaged: Expecting"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json is damaged: it holds no object"),
    "another family": (config(model_type="llama"), "model_type=llama is not one of olmoe, mixtral, qwen2_moe"),
    "two families": (
        config(architectures=["MixtralForCausalLM"]),
        r"model_type=olmoe has the architecture OlmoeForCausalLM, not \['MixtralForCausalLM'\]",
    ),
    "a key is gone": (config(hidden_size=None), r"config.json \(olmoe\) has no hidden_size, which is not supported"),
    "a key is text": (config(num_experts="12"), "has num_experts='12', which is no int"),
    "a key is a list": (config(rope_scaling="yarn"), r"config.json \(olmoe\) is damaged: TypeError"),
    "a key is no number": (config(rms_norm_eps=float("nan")), "has rms_norm_eps=nan, which is no float"),
    "two rotations": (config(rope_theta=7.0), r"has two values of rope_theta, \[7.0, 10000.0\]"),
    "rope scaling": (
        config(rope_scaling={"type": "yarn", "factor": 4.0}),
        "has scaled or partial rotary positions: .*rope_scaling={'type': 'yarn', 'factor': 4.0}, which is not",
    ),
    "quantized": (config(quantization_config={"bits": 4}), "has quantization_config={'bits': 4}"),
    "other activation": (config(hidden_act="gelu"), "has hidden_act=gelu"),
    "dropout": (config(attention_dropout=0.1), "has attention_dropout=0.1"),
    "impossible": (
        config(num_experts_per_tok=13),
        "num_experts_per_tok=13 must lie between 1 and model.num_experts",
    ),
    "negative coefficient": (config(router_aux_loss_coef=-1), "has router_aux_loss_coef=-1"),
    "fewer experts": (
        config(num_experts=11),
        "tensors 9 extra: model.layers.0.mlp.experts.11.down_proj.weight, .* and 5 more; "
        r"3 of another shape: model.layers.0.mlp.gate.weight is \[12, 48\] and should be \[11, 48\]",
    ),
    "more layers": (
        config(num_hidden_layers=4),
        r"tensors 45 missing: model.layers.3.input_layernorm.weight.* more$",
    ),
    "wider experts": (config(intermediate_size=21), "108 of another shape: .* and 104 more"),
    "no weights": (lambda f: (f / FILE).unlink(), "has no weights: neither model.safetensors nor"),
    "pickled weights": (
        lambda f: (f / FILE).rename(f / "pytorch_model.bin"),
        "pytorch_model.bin is not read, save it as safetensors",
    ),
    "empty file": (content(lambda data: b""), "model.safetensors is cut short, or no safetensors file"),
    "a text file": (content(lambda data: b"version https://git-lfs"), "is cut short, or no safetensors file"),
    "cut in the header": (content(lambda data: data[:1000]), "is cut short, or no safetensors file"),
    "cut in the data": (
        content(lambda data: data[:-4]),
        "is cut short or damaged: it has .* bytes, and its tensors end",
    ),
    "longer": (content(lambda data: data + b"    "), "is cut short or damaged"),
    "header is junk": (header('{"', "}}"), "is damaged: its header cannot be understood"),
    "a tensor renamed": (
        header(EXPERT, EXPERT.replace("2.up", "2.op")),
        "tensors 1 missing: model.layers.1.mlp.experts.2.up_proj.weight; "
        "1 extra: model.layers.1.mlp.experts.2.op_proj.weight",
    ),
    "shape and bytes differ": (
        header('"shape":[257,48]', '"shape":[257,84]'),
        r"shape \[257, 84\] lies in 49344 bytes",
    ),
    "transposed": (
        weights(lambda t: t.update({EXPERT: t[EXPERT].T})),
        rf"1 of another shape: {EXPERT} is \[48, 20\] and should be \[20, 48\]",
    ),
    "a tensor more": (weights(lambda t: t.update(x=torch.ones(1))), "tensors 1 extra: x$"),
    "integers": (weights(lambda t: t.update({EXPERT: t[EXPERT].to(torch.int8)})), "is of type I8; only F32, BF16, F16"),
    "no numbers": (weights(_nan), rf"{EXPERT} holds values that are no numbers"),
    "index and single": (_two, "holds both model.safetensors and model.safetensors.index.json"),
    "index is junk": (
        lambda f: [index(len)(f), (f / f"{FILE}.index.json").write_text("{}")],
        "index.json is damaged: KeyError",
    ),
    "index names another file": (
        index(lambda where: where.update({EXPERT: "other.safetensors"})),
        "disagree about|other.safetensors, which model.safetensors.index.json names, is missing",
    ),
    "index misses a tensor": (
        index(lambda where: where.pop(EXPERT)),
        f"part.safetensors and model.safetensors.index.json disagree about {EXPERT}",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_models_are_refused_in_one_line(name: str, folder: Path, tmp_path: Path) -> None:
    spoil, message = SPOILT[name]
    spoil(folder)
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        import_model(open_model(folder), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert find_latest(tmp_path / "run" / "checkpoints") is None


def test_an_import_that_failed_can_be_made_again(folder: Path, tmp_path: Path) -> None:
    whole = (folder / FILE).read_bytes()
    weights(_nan)(folder)
    with pytest.raises(DataError):
        import_model(open_model(folder), tmp_path / "run")
    (folder / FILE).write_bytes(whole)
    import_model(open_model(folder), tmp_path / "run")
    assert open_checkpoint(tmp_path / "run").step == 0
    with pytest.raises(UserError, match=r"--output=.*/run is not empty"):
        import_model(open_model(folder), tmp_path / "run")
    with pytest.raises(UserError, match=r"--output=.*/config.json is a file"):
        import_model(open_model(folder), folder / "config.json")
    with pytest.raises(UserError, match=r"--output=.*/model is not empty"):
        import_model(open_model(folder), folder)


def test_a_flipped_bit_in_an_export_is_found(folder: Path, tmp_path: Path) -> None:
    import_model(open_model(folder), tmp_path / "run")
    export(open_checkpoint(tmp_path / "run"), tmp_path / "hf", "bf16", 10**9, None)
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"is damaged: lm_head.weight is not what occult_export.json says was written"):
        import_model(open_model(tmp_path / "hf"), tmp_path / "again")


def test_a_tied_model_with_a_head_of_its_own_is_refused(folder: Path) -> None:
    config(tie_word_embeddings=True)(folder)
    with pytest.raises(DataError, match=r"ties the embedding to the head .* but the two differ"):
        open_model(folder)
    weights(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(folder)
    assert "lm_head.weight" not in open_model(folder).entries


def test_buffers_of_old_files_are_no_surprise(folder: Path) -> None:
    before = open_model(folder).entries.keys()
    weights(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))(folder)
    assert open_model(folder).entries.keys() == before


def test_keys_that_mean_nothing_here_are_named(folder: Path) -> None:
    config(routed_scaling_factor=2.5)(folder)
    assert [r.rpartition("/")[2] for r in open_model(folder).config.remarks()] == [
        "config.json: routed_scaling_factor=2.5 is not known and not used"
    ]


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("mixtral", {"sliding_window": 95}, "attention over a window, sliding_window=95"),
        ("mixtral", {"router_jitter_noise": 0.01}, "router_jitter_noise=0.01"),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 32}, "a window, sliding_window=32"),
        ("qwen2_moe", {"layer_types": ["linear_attention"] * 3}, "layer_types=.'linear_attention'."),
        ("qwen2_moe", {"mlp_only_layers": 3}, r"config.json .qwen2_moe. is damaged: TypeError"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, "leaves no layer with experts"),
        ("deepseek", {"routed_scaling_factor": 16.0}, "routed_scaling_factor=16.0"),
        ("deepseek", {"scoring_func": "sigmoid"}, "scoring_func=sigmoid"),
    ],
)
def test_what_a_family_may_do_and_we_do_not(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    making.make(name, tmp_path)
    config(**changes)(tmp_path)
    with pytest.raises(ConfigError, match=message):
        open_model(tmp_path)


def test_windows_that_never_matter_are_taken(tmp_path: Path) -> None:
    making.make("mixtral", tmp_path)
    config(sliding_window=96)(tmp_path)
    assert open_model(tmp_path).config.model.max_position_embeddings == 96


@pytest.mark.parametrize(
    "changes, reasons",
    [
        (
            {"shared_expert_intermediate_size": 8},
            ["Olmoe.* cannot hold model.shared_expert_intermediate_size=8"],
        ),
        (
            {"qk_norm": "none", "dense_layers": [1], "dense_intermediate_size": 9, "attention_bias": "qkv"},
            ["Mixtral.* model.attention_bias=qkv", "Deepseek.* cannot hold model.attention_bias=qkv"],
        ),
        (
            {"qk_norm": "none", "shared_expert_intermediate_size": 1024, "shared_expert_gate": True, "clip_qkv": 1.0},
            ["Qwen2.* cannot hold model.clip_qkv=1.0", "Deepseek.* cannot hold model.shared_expert_gate=true"],
        ),
        (
            {"qk_norm": "none", "dense_layers": [0, 5], "dense_intermediate_size": 9},
            [r"Deepseek.* cannot hold model.dense_layers=\[0, 5\] .it has them first"],
        ),
        (
            {"qk_norm": "head", "head_dim": 64, "shared_expert_intermediate_size": 8},
            ["Qwen3.* cannot hold model.sha"],
        ),
    ],
)
def test_what_no_family_holds_is_named(changes: dict[str, Any], reasons: list[str]) -> None:
    for reason in reasons:
        with pytest.raises(ConfigError, match=reason):
            family_of(ModelConfig(vocab_size=64, **changes))


def test_typed_mistakes_are_one_line_and_exit_code_2(folder: Path, tmp_path: Path) -> None:
    content(lambda data: data[:-4])(folder)
    words = [
        sys.executable,
        "-m",
        "occult_train.launcher.cli",
        "import",
        str(folder),
        "--output",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {folder}/{FILE} is cut short or damaged")
    assert struct.unpack("<Q", (folder / FILE).read_bytes()[:8])[0] > 0
