"""`occult profile`: the tokens it says, counted as a plain counter does, whatever the ranks; and mistakes."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from occult_train.checkpoint.store import open_checkpoint
from occult_train.errors import StatisticsError, UserError
from occult_train.inference import load_model
from occult_train.moe.collaboration import LayerStatistics
from occult_train.moe.statistics import RoutingStatistics
from occult_train.moe.trace import read_trace
from occult_train.parallel.grid import Grid
from occult_train.profiling import Profile, Wanted
from occult_train.testing import run_distributed
from occult_train.tools.prepare import prepare
from occult_train.tools.profile import command, table

SETTINGS = [
    *("model.hidden_size=32", "model.intermediate_size=16", "model.num_hidden_layers=3", "model.num_attention_heads=4"),
    *("model.num_experts=8", "model.num_experts_per_tok=3", "model.dense_layers=[1]"),
    *("model.dense_intermediate_size=16", "model.max_position_embeddings=64", "data.sequence_length=32"),
    *("train.global_batch_size=8", "train.micro_batch_size=2", "train.precision=fp32", "train.steps=3"),
    *("parallel.expert=2", "moe.balance=bias", "moe.bias_update_rate=0.05", "eval.sequences=1"),
]
TOP_K, EXPERTS, LENGTH = 3, 8, 32


def train(_rank: int, arguments: list[str]) -> int:
    from occult_train.config import load
    from occult_train.trainer import run

    return run(load(SETTINGS + arguments))


def write_corpus(folder: Path, letters: str) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(24):
        (folder / f"{i}.txt").write_text(" ".join(map("".join, rng.choice(list(letters), (25, 4)))))
    prepare([str(folder)], folder / "corpus", vocab_size=320, workers=1, valid_fraction=0.3)
    return folder / "corpus"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps whose balancing bias has moved and whose experts lie in reverse, and `corpus` beside it."""
    folder = tmp_path_factory.mktemp("profile")
    corpus = write_corpus(folder / "text", "abcdefgh")
    slots = {"slot_to_expert": {layer: list(reversed(range(EXPERTS))) for layer in ("0", "2")}}
    (folder / "placement.json").write_text(json.dumps(slots))
    settings = [f"data.path={corpus}", f"output={folder}/run", f"moe.placement={folder}/placement.json"]
    run_distributed(train, 2, settings, timeout=240)
    return folder / "run"


def plain(run: Path, pieces: list[int], part: str = "valid") -> dict[int, tuple[list[int], list[list[int]]]]:
    """Loads and pairs by loops, over pieces of the .bin file, with choices taken from the router's logits and bias."""
    model = load_model(open_checkpoint(run))
    tokens = np.fromfile(run.parent / "text" / "corpus" / f"{part}.bin", dtype="<u2").astype(np.int64)
    chosen: dict[int, Tensor] = {}
    for index, layer in model.moe_layers().items():
        layer.router.register_forward_hook(
            lambda m, _i, logits, at=index: chosen.update(
                {at: (logits.softmax(-1) + m.expert_bias).topk(TOP_K).indices}
            )
        )
    found = {i: ([0] * EXPERTS, [[0] * EXPERTS for _ in range(EXPERTS)]) for i in model.moe_layers()}
    for piece in pieces:
        with torch.no_grad():
            model(torch.from_numpy(tokens[piece * LENGTH :][:LENGTH])[None])
        for index, experts_TK in chosen.items():
            loads, pairs = found[index]
            for experts in experts_TK.tolist():
                for i in experts:
                    loads[i] += 1
                    for j in experts:
                        pairs[i][j] += i != j
    return found


def assert_counts(got: RoutingStatistics, expected: dict[int, tuple[list[int], list[list[int]]]]) -> None:
    assert list(got.layers) == list(expected)
    for index, (loads, pairs) in expected.items():
        assert got.layers[index].loads_E.tolist() == loads
        assert got.layers[index].pairs_EE.tolist() == pairs


def assert_products(got: RoutingStatistics, run: Path, pieces: list[int]) -> None:
    """Inner products of the logits of those pieces of the held-out .bin file."""
    model = load_model(open_checkpoint(run))
    tokens = np.fromfile(run.parent / "text" / "corpus" / "valid.bin", dtype="<u2").astype(np.int64)
    seen: dict[int, Tensor] = {}
    for index, layer in model.moe_layers().items():
        layer.router.register_forward_hook(lambda _m, _i, logits, at=index: seen.update({at: logits.double()}))
    with torch.no_grad():
        model(torch.from_numpy(np.stack([tokens[piece * LENGTH :][:LENGTH] for piece in pieces])))
    got.check()
    for index, logits_TE in seen.items():
        products = got.layers[index].logit_products_EE
        assert products is not None
        torch.testing.assert_close(products, logits_TE.T @ logits_TE, rtol=1e-4, atol=1e-4)  # logits are fp32


def held_out(run: Path) -> int:
    size = (run.parent / "text" / "corpus" / "valid.bin").stat().st_size // 2
    return (size - 1) // LENGTH


def test_all_held_out_text_is_counted_as_by_hand(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(str(run), data=str(run.parent / "text" / "corpus"), tokens=0)
    statistics = RoutingStatistics.load(run / "statistics-valid.safetensors")
    pieces = held_out(run)
    assert pieces > 20
    assert statistics.tokens == pieces * LENGTH
    assert_counts(statistics, plain(run, list(range(pieces))))
    assert statistics.provenance["step"] == 3
    assert statistics.provenance["part"] == "valid"
    printed = capsys.readouterr().out
    assert f"wrote {run}/statistics-valid.safetensors" in printed
    assert "closest pair" in printed


def test_fewer_tokens_are_spread_over_the_text(run: Path, tmp_path: Path) -> None:
    command(str(run), tokens=5 * LENGTH - 3, output=tmp_path / "new" / "s", batch=3, sample=70)
    statistics = RoutingStatistics.load(tmp_path / "new" / "s")
    pieces = held_out(run)
    assert statistics.tokens == 5 * LENGTH
    assert_counts(statistics, plain(run, [i * pieces // 5 for i in range(5)]))
    assert [len(layer.sets_NK) for layer in statistics.layers.values()] == [70, 70]


def profiled(_rank: int, run: str, expert: int, wanted: Wanted) -> RoutingStatistics:
    profile = Profile(open_checkpoint(Path(run)), wanted, Grid.create(expert), print)
    return profile.run(0, lambda rounds: rounds)


@pytest.mark.parametrize("ranks, expert", [(1, 1), (2, 1), (4, 2)])
def test_ranks_share_the_work(run: Path, ranks: int, expert: int) -> None:
    """Nine sequences, so that some rank has fewer and at last none; in batches of two."""
    wanted = Wanted(tokens=9 * LENGTH, batch=2, similarity=True)
    results: list[Any] = run_distributed(profiled, ranks, str(run), expert, wanted)
    pieces = held_out(run)
    expected = plain(run, [i * pieces // 9 for i in range(9)])
    for statistics in results:
        assert statistics.tokens == 9 * LENGTH
        assert_counts(statistics, expected)
        assert_products(statistics, run, [i * pieces // 9 for i in range(9)])


def test_the_training_part_is_read_as_training_reads_it(run: Path, tmp_path: Path) -> None:
    from occult_train.config import load
    from occult_train.data.loader import build_datasets

    command(str(run), part="train", tokens=64, output=tmp_path / "s")
    config = load([str(run / "config.yaml")])
    data, _ = build_datasets(config.data, config.train.seed)
    model = load_model(open_checkpoint(run))
    seen: list[Tensor] = []
    layer = model.moe_layers()[0]
    layer.router.register_forward_hook(lambda m, _i, x: seen.append((x.softmax(-1) + m.expert_bias).topk(3).indices))
    with torch.no_grad():
        model(torch.stack([data[0]["input_ids"], data[1]["input_ids"]]))
    found = RoutingStatistics.load(tmp_path / "s")
    assert found.layers[0].loads_E.tolist() == seen[0].flatten().bincount(minlength=EXPERTS).tolist()
    command(str(run), part="train", tokens=0, output=tmp_path / "s")
    whole = RoutingStatistics.load(tmp_path / "s").tokens
    assert whole == data.samples_per_epoch * LENGTH, "one epoch"


def test_the_table_says_what_is_in_the_file() -> None:
    """Two tokens of four experts: 0 1 and 1 2. On two devices {0 1}, {2 3} they need 1 and 2 devices."""
    pairs = torch.tensor([[1, 1, 0, 0], [1, 2, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    layer = LayerStatistics.of(2, pairs, torch.tensor([[0, 1], [1, 2]], dtype=torch.int16))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(RoutingStatistics(4, 2, {7: layer})))
    (row,) = [line for line in console.export_text().splitlines() if " 7 " in line]
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == ["7", "1.500", "2.000", "2.00", "0 + 1", "50.0%"]


def test_mistakes_are_named(run: Path, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", "stuvwxyz")
    bare = str(run.parent / "text" / "corpus" / "train")
    (tmp_path / "file").write_text("")
    foreign, plain_part = tmp_path / "foreign", tmp_path / "plain"
    command(str(run), tokens=32, output=plain_part)
    command(trace=str(write_trace(tmp_path / "t")), experts=4, output=foreign)
    for arguments, message in (
        ({"data": "nowhere"}, "--data=nowhere does not exist"),
        ({"data": str(other)}, "made with another tokenizer than"),
        ({"data": bare}, "has no held-out text; take --part=train"),
        ({"checkpoint": "", "trace": "t", "experts": 4, "output": foreign, "similarity": True}, "--similarity needs a"),
        ({"merge": [plain_part], "similarity": True}, f"--merge={plain_part} holds no similarity"),
        ({"part": "test"}, "--part=test is not one of valid, train"),
        ({"expert": 2}, "--expert=2 needs as many ranks"),
        ({"checkpoint": ""}, "name a checkpoint or a run"),
        ({"trace": "t"}, "are two things to profile"),
        ({"checkpoint": "", "trace": "t"}, "--trace=t does not say how many experts there are: --experts"),
        ({"checkpoint": "", "trace": "t", "experts": 4}, "there is no folder to write to: --output"),
        ({"merge": [tmp_path / "none"]}, "none cannot be read"),
        ({"merge": [foreign]}, f"{foreign} are of another model: model.num_experts 4 there, 8 here"),
        ({"output": tmp_path / "file" / "s", "tokens": 32}, "cannot be written"),
        ({"checkpoint": str(tmp_path / "none")}, "does not exist"),
    ):
        with pytest.raises(UserError) as error:
            command(**({"checkpoint": str(run)} | arguments))  # type: ignore[arg-type]
        assert message in str(error.value), arguments
    assert not (tmp_path / "s").exists()


def test_a_bare_pair_can_be_profiled_as_training_text(run: Path, tmp_path: Path) -> None:
    for name in ("train.bin", "train.idx"):
        shutil.copy(run.parent / "text" / "corpus" / name, tmp_path / name)
    command(str(run), data=str(tmp_path / "train"), part="train", tokens=32, output=tmp_path / "s")
    assert RoutingStatistics.load(tmp_path / "s").tokens == 32


TRACE = """\
{"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": 1, "rank": 0, "num_tokens": 3, "topk": 2, \
"top_indices": [[0, 3], [3, 1], [-1, -1]]}
{"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": 2, "rank": 0, "num_tokens": 1, "topk": 2, \
"top_indices": [[2, 3]], "hs_offset": 0, "hs_bytes": 8, "hs_shape": [1, 4]}
{"step": 0, "stage": "pre_dispatch", "block": "mtp", "layer": 1, "rank": 0, "num_tokens": 1, "topk": 2, \
"top_indices": [[0, 1]], "mtp_idx": 0}
{"step": 1, "stage": "pre_dispatch", "block": "decoder", "layer": 1, "rank": 0, "num_tokens": 0, "topk": 2, \
"top_indices": []}
"""
OTHER_RANK = """\
{"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": 1, "rank": 1, "num_tokens": 2, "topk": 2, \
"top_indices": [[0, 3], [2, 0]]}
"""


def write_trace(folder: Path, text: str = TRACE) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "router_trace_rank0.jsonl").write_text(text)
    (folder / "router_trace_rank1.jsonl").write_text(OTHER_RANK)
    return folder


def test_a_routing_trace_of_megatron_core_is_read(tmp_path: Path) -> None:
    """Layer 1 sees 0+3 and 3+1 on rank 0, 0+3 and 2+0 on rank 1, and padding; layer 2 sees 2+3; other heads nothing."""
    command(trace=str(write_trace(tmp_path / "t")), experts=4, output=tmp_path / "s")
    found = RoutingStatistics.load(tmp_path / "s")
    assert (found.num_experts, found.top_k, list(found.layers)) == (4, 2, [1, 2])
    first, second = found.layers.values()
    assert (first.tokens, second.tokens) == (4, 1)
    assert first.loads_E.tolist() == [3, 1, 1, 3]
    assert first.pairs_EE.tolist() == [[0, 0, 1, 2], [0, 0, 0, 1], [1, 0, 0, 0], [2, 1, 0, 0]]
    assert first.sets_NK.tolist() == [[0, 3], [1, 3], [0, 3], [0, 2]]
    assert second.sets_NK.tolist() == [[2, 3]]
    alone = read_trace(tmp_path / "t" / "router_trace_rank1.jsonl", 4, 10)
    assert alone.layers[1].loads_E.tolist() == [2, 0, 1, 1]


def test_files_are_added_up(tmp_path: Path) -> None:
    """A trace and two files, then files alone; another model's is refused by its name."""
    trace = str(write_trace(tmp_path / "t"))
    first, second, eight = tmp_path / "1", tmp_path / "2", tmp_path / "8"
    command(trace=trace, experts=4, output=first)
    command(trace=trace, experts=4, output=second, merge=[first, first])
    command(merge=[second, first], output=first)
    one, four = read_trace(Path(trace), 4, 10), RoutingStatistics.load(first)
    for index, layer in one.layers.items():
        assert four.layers[index].tokens == 4 * layer.tokens
        assert torch.equal(four.layers[index].pairs_EE, 4 * layer.pairs_EE)
        assert sorted(four.layers[index].sets_NK.tolist()) == sorted(4 * layer.sets_NK.tolist())
    command(trace=trace, experts=8, output=eight)
    with pytest.raises(StatisticsError) as error:
        command(merge=[second, eight], output=first)
    assert str(error.value) == f"statistics {eight} are of another model: model.num_experts 8 there, 4 here"


def test_a_trace_whose_writer_was_killed_counts_up_to_there(tmp_path: Path) -> None:
    found = read_trace(write_trace(tmp_path / "t", TRACE + TRACE[:90]), 4, 10)
    assert found.layers[1].tokens == 4


@pytest.mark.parametrize("change, words", [
    (("[[2, 3]]", "[[2, 4]]"), "rank0.jsonl:2 names expert 4, of 4 experts"),
    (("[[2, 3]]", "[[2, -1]]"), "rank0.jsonl:2 names expert -1"),
    (("[[2, 3]]", "[[3, 3]]"), "rank0.jsonl:2 has a token that chose an expert twice"),
    (("[[2, 3]]", "[[1, 2, 3]]"), "rank0.jsonl:2 has choices [1, 3], not [1, 2]"),
    (("[[2, 3]]", "[[2, 3], [1]]"), "rank0.jsonl:2 is not a record of routing"),
    (('"layer": 2', '"level": 2'), "rank0.jsonl:2 is not a record of routing: KeyError('layer')"),
    (('{"step": 0', "{step: 0"), "rank0.jsonl:1 is damaged: it is not JSON"),
    (("decoder", "mtp"), None),
])  # fmt: skip
def test_damaged_traces_are_refused_in_one_line(tmp_path: Path, change: tuple[str, str], words: str | None) -> None:
    folder = write_trace(tmp_path / "t", TRACE.replace(*change))
    if words is None:
        assert list(read_trace(folder, 4, 10).layers) == [1], "rank 1's alone"
        return
    with pytest.raises(StatisticsError) as error:
        read_trace(folder, 4, 10)
    assert words in str(error.value)


def test_folders_without_a_trace_are_refused(tmp_path: Path) -> None:
    for path, words in ((tmp_path, "holds no router_trace_rank"), (tmp_path / "x.jsonl", "cannot be read")):
        with pytest.raises(StatisticsError, match=words):
            read_trace(path, 4, 10)
    (tmp_path / "router_trace_rank0.jsonl").write_text("")
    with pytest.raises(StatisticsError, match="no record of a decoder layer"):
        read_trace(tmp_path, 4, 10)
