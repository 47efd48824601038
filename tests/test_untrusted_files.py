"""Files that somebody else has made: none runs code, leaves its folder, or takes memory that it has no bytes for.

Each ends in one line, a UserError, before anything is read that it must not be.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from occult_train import inference
from occult_train.checkpoint import state, store
from occult_train.checkpoint.shards import ShardWriter
from occult_train.data.corpus import open_corpus
from occult_train.errors import DataError, UserError
from occult_train.hub import files as hub_files
from occult_train.hub.source import INDEX, SINGLE, open_model
from occult_train.hub.tensorfile import read_header
from occult_train.hub.verify import load_theirs
from occult_train.inside import inside
from occult_train.models.config import ModelConfig
from occult_train.moe import placement
from occult_train.moe.similarity import SimilarityTables
from occult_train.moe.statistics import RoutingStatistics
from occult_train.moe.trace import read_trace

OLMOE = {
    **{"model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "hidden_act": "silu", "rope_theta": 10000.0},
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_experts": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": 2, "norm_topk_prob": False},
    **{"max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "attention_bias": False},
    **{"clip_qkv": None, "router_aux_loss_coef": 0.01, "attention_dropout": 0.0, "initializer_range": 0.02},
}
SECRET = "the secret"
DEEP = "[" * 200_000
"""JSON that no parser of Python takes."""


class Runs:
    """What a pickle does that is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to be filled, beside a file that is not for others."""
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "given").mkdir()
    return tmp_path / "given"


def hub(folder: Path, weight_map: Any, **changes: Any) -> None:
    """A Hugging Face folder whose index says so."""
    (folder / "config.json").write_text(json.dumps(OLMOE | changes))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def one_line(act: Callable[[], object]) -> str:
    """What it is refused with."""
    with pytest.raises(UserError) as caught:
        act()
    text = str(caught.value)
    assert "\n" not in text
    assert SECRET not in text
    return text


# ---------------------------------------------------------------- names in files


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "..", ".", "", "a/b", "..\\secret", "a\0b", 7, None, ["a"]]
)
def test_an_index_names_files_beside_it_alone(folder: Path, name: object) -> None:
    hub(folder, {"lm_head.weight": name})
    text = one_line(lambda: open_model(folder))
    assert "is not the name of a file beside it" in text or "is damaged" in text


def test_a_link_out_of_the_folder_is_not_followed(folder: Path) -> None:
    (folder / "part.safetensors").symlink_to(folder.parent / "secret")
    hub(folder, {"lm_head.weight": "part.safetensors"})
    assert "is a link out of its folder" in one_line(lambda: open_model(folder))
    (folder / INDEX).unlink()
    (folder / SINGLE).symlink_to("../secret")
    assert "is a link out of its folder" in one_line(lambda: open_model(folder))
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to(SINGLE)
    one_line(lambda: open_model(folder))


def test_links_inside_a_folder_and_of_hugging_faces_cache_are_followed(tmp_path: Path) -> None:
    blob, snapshot = tmp_path / "blobs" / "0123", tmp_path / "snapshots" / "main" / "a"
    for path in (blob, snapshot):
        path.parent.mkdir(parents=True)
    blob.touch()
    snapshot.symlink_to("../../blobs/0123")
    assert inside(snapshot.parent, "a", "index", DataError) == snapshot
    (snapshot.parent / "b").symlink_to("a")
    assert inside(snapshot.parent, "b", "index", DataError).exists()
    (tmp_path / "link").symlink_to(snapshot.parent)
    assert inside(tmp_path / "link", "b", "index", DataError).exists()


def test_tokenizer_files_that_travel_on_are_no_links_out(folder: Path) -> None:
    (folder / "tokenizer_config.json").symlink_to(folder.parent / "secret")
    assert "is a link out" in one_line(lambda: hub_files.keep(folder, folder.parent / "run"))
    assert not list((folder.parent / "run").rglob("tokenizer_config.json"))


def test_a_corpus_has_its_tokenizer_beside_it(folder: Path) -> None:
    from occult_train.tools.prepare import prepare

    words = ["the", "cat", "sat", "on", "the", "mat", "and", "saw", "seven", "dogs", "run", "home"]
    for number in range(20):
        (folder / f"{number}.txt").write_text(" ".join(words[number % 9 :] * 30) + f" {number}\n")
    corpus = folder / "corpus"
    prepare([str(folder)], corpus, vocab_size=280, tokenizer=None, workers=1, valid_fraction=0.5)
    metadata = json.loads((corpus / "corpus.json").read_text())
    for name in ("../../secret", str(folder.parent / "secret")):
        (corpus / "corpus.json").write_text(json.dumps(metadata | {"tokenizer": name}))
        assert "is not the name of a file beside it" in one_line(lambda: open_corpus(corpus))


# ---------------------------------------------------------------- checkpoints


def checkpoint(root: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> Path:
    """A checkpoint of two tensors whose manifest, right checksum included, was changed."""
    folder = store.begin(root, 1)
    writer = ShardWriter(folder / "model-00000.safetensors", {"a": (2, 3), "b": (4,)})
    writer.write("a", torch.ones(2, 3))
    writer.write("b", torch.ones(4))
    writer.close()
    tensors = {name: entry.to_json() for name, entry in writer.entries.items()}
    manifest = {"state": {"step": 1}, "tensors": tensors, "files": {writer.path.name: writer.path.stat().st_size}}
    change(manifest)
    return store.commit(root, 1, manifest, 0)


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda m: m["tensors"]["a"].update(shape=[10**7, 10**7]), "does not fit into model-00000.safetensors, which"),
        (lambda m: m["tensors"]["a"].update(shape=[-(10**7), -(10**7)]), "cannot be understood"),
        (lambda m: m["tensors"]["a"].update(shape=[1e300]), "cannot be understood"),
        (lambda m: m["tensors"]["a"].update(offset=1 << 62), "does not fit into"),
        (lambda m: m["tensors"]["a"].update(offset=-8), "cannot be understood"),
        (lambda m: m["tensors"]["a"].update(file="../../../secret"), "cannot be understood"),
        (lambda m: m["files"].update({"../../../secret": len(SECRET)}), "is not the name of a file beside it"),
        (lambda m: m["files"].update({"/etc/passwd": 1}), "is not the name of a file beside it"),
        (lambda m: m["files"].update({"model-00000.safetensors": 1 << 60}), "bytes in place of"),
    ],
)
def test_a_manifest_names_bytes_that_are_there(folder: Path, change: Any, expected: str) -> None:
    made = checkpoint(folder / "checkpoints", change)
    assert expected in one_line(lambda: store.open_checkpoint(made))


def test_a_shard_that_is_a_link_out_of_its_checkpoint(folder: Path) -> None:
    made = checkpoint(folder)
    shutil.move(made / "model-00000.safetensors", folder.parent / "elsewhere")
    (made / "model-00000.safetensors").symlink_to(folder.parent / "elsewhere")
    assert "is a link out of its folder" in one_line(lambda: store.open_checkpoint(made))


def test_texts_of_a_checkpoint_are_beside_it(folder: Path) -> None:
    made = checkpoint(folder)
    body = store._body(json.loads((made / store.MANIFEST).read_text()))
    body["texts"] = {"../../secret": hashlib.sha256(SECRET.encode()).hexdigest()}
    (made / store.MANIFEST).write_text(store._manifest(body))
    assert "is not the name of a file beside it" in one_line(lambda: store.open_checkpoint(made))


@pytest.mark.parametrize("name", ["../other/step-00000001", "/tmp", "..", ""])
def test_latest_names_a_step_of_its_folder(folder: Path, name: str) -> None:
    checkpoint(folder.parent / "other")
    made = checkpoint(folder)
    (folder / "latest").write_text(name)
    assert store.find_latest(folder) == made


def test_a_configuration_that_is_larger_than_its_files_takes_no_memory(folder: Path) -> None:
    opened = store.open_checkpoint(checkpoint(folder))
    for field, value in (("hidden_size", 2**20), ("num_experts", 10**9), ("num_hidden_layers", 10**9)):
        model = ModelConfig(vocab_size=64, **{field: value})
        assert "its configuration describes" in one_line(lambda model=model: inference.fill_model(model, opened))
    assert (
        state.larger_than_files(ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1), opened.entries) == ""
    )


# ---------------------------------------------------------------- sizes in headers


def safetensors_file(path: Path, header: object, length: int | None = None, data: bytes = b"") -> None:
    """A file of that header, which says that it is so long."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


TERABYTES = {"a": {"dtype": "F32", "shape": [1 << 21, 1 << 21], "data_offsets": [0, 1 << 44]}}
OVERFLOWING = {"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 1 << 82]}}


@pytest.mark.parametrize(
    "header, length, expected",
    [
        ({}, 1 << 62, "is cut short, or no safetensors file"),
        ({}, 1 << 27, "is cut short, or no safetensors file"),
        (TERABYTES, None, "is cut short or damaged"),
        (OVERFLOWING, None, "is cut short or damaged"),
        ({"a": {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 4]}}, None, "cannot be understood"),
        ({"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, None, "is damaged"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-64, -60]}}, None, "is damaged"),
        (DEEP.encode(), None, "cannot be understood"),
    ],
)
def test_a_header_claims_no_more_than_its_file_has(
    folder: Path, header: object, length: int | None, expected: str
) -> None:
    safetensors_file(folder / SINGLE, header, length)
    assert expected in one_line(lambda: read_header(folder / SINGLE))


@pytest.mark.parametrize("load", [RoutingStatistics.load, SimilarityTables.load], ids=["statistics", "similarity"])
@pytest.mark.parametrize("header", [TERABYTES, OVERFLOWING, DEEP.encode()], ids=["terabytes", "overflow", "deep"])
def test_statistics_and_similarity_claim_no_more_than_they_have(folder: Path, load: Any, header: object) -> None:
    safetensors_file(folder / "s", header)
    assert "damaged" in one_line(lambda: load(folder / "s"))
    safetensors_file(folder / "s", {}, 1 << 62)
    assert "damaged" in one_line(lambda: load(folder / "s"))


@pytest.mark.parametrize("about", ["", "7", "[]", "{}", '{"tokens": 7}', '{"tokens": {"0": 5}}', DEEP])
def test_statistics_whose_description_is_nonsense(folder: Path, about: str) -> None:
    from occult_train.moe.statistics import FORMAT, VERSION, digest

    metadata = {"format": FORMAT, "version": str(VERSION), "about": about, "sha256": digest(about, {})}
    (folder / "s").write_bytes(save({}, metadata))
    assert "cannot be understood" in one_line(lambda: RoutingStatistics.load(folder / "s"))


@pytest.mark.parametrize("layers", ["", "7", '["x"]', "[0, 1]", DEEP])
def test_similarity_whose_description_is_nonsense(folder: Path, layers: str) -> None:
    from occult_train.moe.similarity import FORMAT
    from occult_train.moe.statistics import digest

    metadata = {"format": FORMAT, "layers": layers, "sha256": digest(layers, {})}
    (folder / "s").write_bytes(save({}, metadata))
    assert "cannot be understood" in one_line(lambda: SimilarityTables.load(folder / "s"))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 2**20},
        {"num_experts": 10**9},
        {"num_hidden_layers": 10**9},
        {"vocab_size": 2**40},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_config_json_that_describes_more_than_the_weights_takes_no_memory(
    folder: Path, changes: dict[str, Any]
) -> None:
    save_file({"model.norm.weight": torch.ones(32)}, folder / SINGLE)
    (folder / "config.json").write_text(json.dumps(OLMOE | changes))
    refused = "config.json (describes|has num_hidden_layers=1000000000|.*num_experts=1000000000 .* makes more than)"
    assert re.search(refused, one_line(lambda: open_model(folder)))


def test_a_trace_claims_no_more_experts_a_token_than_there_are(folder: Path) -> None:
    record = {"layer": 0, "num_tokens": 0, "topk": 1 << 40, "top_indices": []}
    (folder / "router_trace_rank0.jsonl").write_text(json.dumps(record) + "\n")
    assert "0 tokens of 1099511627776 experts each" in one_line(lambda: read_trace(folder, 8, 100_000))


# ---------------------------------------------------------------- JSON that is no such thing


@pytest.mark.parametrize("text", [DEEP, "7", "[]", '{"slot_to_expert": {"0": 7}}', '{"slot_to_expert": {"0": [[]]}}'])
def test_placements_that_are_none(folder: Path, text: str) -> None:
    (folder / "p.json").write_text(text)
    one_line(lambda: placement.read(folder / "p.json", [0], 1))


def test_json_without_end_is_one_line_everywhere(folder: Path) -> None:
    made = checkpoint(folder / "checkpoints")
    (made / store.MANIFEST).write_text(DEEP)
    one_line(lambda: store.open_checkpoint(made))
    hub(folder, {})
    (folder / INDEX).write_text(DEEP)
    one_line(lambda: open_model(folder))
    (folder / "config.json").write_text(DEEP)
    one_line(lambda: open_model(folder))
    one_line(lambda: hub_files.read_settings(folder, "config.json"))


# ---------------------------------------------------------------- code


def test_pickled_weights_are_not_loaded(folder: Path) -> None:
    marker = folder.parent / "ran"
    (folder / "config.json").write_text(json.dumps(OLMOE))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(marker)))
    assert "pytorch_model.bin is not read, save it as safetensors" in one_line(lambda: open_model(folder))
    for name in (SINGLE, "s"):
        (folder / name).write_bytes(pickle.dumps(Runs(marker)))
    one_line(lambda: open_model(folder))
    one_line(lambda: RoutingStatistics.load(folder / "s"))
    one_line(lambda: SimilarityTables.load(folder / "s"))
    (folder / SINGLE).unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_theirs(folder)
    assert not marker.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert marker.exists(), "as it would have been"


def test_code_beside_a_model_is_not_run(folder: Path) -> None:
    marker = folder.parent / "ran"
    code = f"import os\nos.mkdir({str(marker)!r})\n"
    (folder / "modeling_evil.py").write_text(code)
    own = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    save_file({"model.norm.weight": torch.ones(32)}, folder / SINGLE, {"format": "pt"})
    for kind in ("olmoe", "evil"):
        (folder / "config.json").write_text(json.dumps(OLMOE | {"model_type": kind, "auto_map": own}))
        one_line(lambda: open_model(folder))
        with pytest.raises((ValueError, UserError)):
            load_theirs(folder)
    assert not marker.exists()


def test_nothing_that_users_are_given_is_unpickled() -> None:
    """Read off the sources: pickle in what starts ranks of our own alone, torch.load and the like nowhere."""
    root = Path(__file__).parents[1]
    users = set()
    for room in ("occult_train", "models", "kernels", "launcher", "tools"):
        for top, _, names in os.walk(root / room):
            for path in (Path(top) / name for name in names if name.endswith(".py")):
                text = path.read_text()
                assert not re.search(r"(?<!safetensors\.)torch\.load\(|allow_pickle=True|\byaml\.load\(", text), path
                assert not re.search(r"\b(tarfile|zipfile|shelve|unpack_archive)\b", text), path
                if "pickle" in text:
                    users.add(str(path.relative_to(root)))
    assert users == {"occult_train/testing.py", "tools/bench/ranks.py"}
