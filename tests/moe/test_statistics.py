"""Files of routing statistics: counts against a plain counter, merging, sampling, damage."""

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from occult_train.errors import StatisticsError, UserError
from occult_train.moe.collaboration import LayerStatistics
from occult_train.moe.statistics import RoutingStatistics, merge, merge_layers

EXPERTS, TOP_K = 6, 3


def choices(tokens: int, seed: int = 0, experts: int = EXPERTS, top_k: int = TOP_K) -> Tensor:
    """[T, K] distinct experts, low ids likelier, in no order."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1.0 / torch.arange(1, experts + 1, dtype=torch.float64)
    if tokens == 0:
        return torch.zeros(0, top_k, dtype=torch.int64)
    return torch.multinomial(weights.expand(tokens, -1), top_k, generator=generator)


def plain_count(experts_TK: Tensor, experts: int = EXPERTS) -> LayerStatistics:
    """A slow counter that keeps all sets."""
    loads, pairs, sets = [0] * experts, [[0] * experts for _ in range(experts)], []
    for chosen in experts_TK.tolist():
        for i in chosen:
            loads[i] += 1
            for j in chosen:
                if i != j:
                    pairs[i][j] += 1
        sets.append(sorted(chosen))
    kept = torch.tensor(sets, dtype=torch.int16).view(-1, experts_TK.shape[1])
    return LayerStatistics(len(sets), torch.tensor(loads), torch.tensor(pairs), kept)


def statistics(*tokens: int, seed: int = 0, sample: int | None = None) -> RoutingStatistics:
    """Of layers 0, 2, 4, ... with so many tokens each."""
    layers = {2 * i: plain_count(choices(n, seed + i)) for i, n in enumerate(tokens)}
    if sample is not None:
        layers = {i: replace(layer, sets_NK=layer.sets_NK[:sample]) for i, layer in layers.items()}
    return RoutingStatistics(EXPERTS, TOP_K, layers, {"seed": seed})


def assert_equal(got: RoutingStatistics, expected: RoutingStatistics) -> None:
    assert (got.num_experts, got.top_k, got.provenance) == (
        expected.num_experts,
        expected.top_k,
        expected.provenance,
    )
    assert list(got.layers) == list(expected.layers)
    for index, layer in expected.layers.items():
        assert got.layers[index].tokens == layer.tokens
        for name in ("loads_E", "pairs_EE", "sets_NK"):
            assert torch.equal(getattr(got.layers[index], name), getattr(layer, name)), (index, name)


def test_a_saved_file_is_read_back(tmp_path: Path) -> None:
    made = statistics(100, 40)
    made.save(tmp_path / "s.safetensors")
    assert_equal(RoutingStatistics.load(tmp_path / "s.safetensors"), made)
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_tensors_of_later_versions_are_left_alone(tmp_path: Path) -> None:
    """A file with one tensor more, its checksum made here: SHA-256 of the text, then each name and its bytes."""
    made = statistics(30)
    path = tmp_path / "s.safetensors"
    made.save(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata, names = file.metadata(), list(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
    assert names == ["layers.0.loads", "layers.0.pairs", "layers.0.sets"]
    tensors["layers.0.products"] = torch.rand(6, 6, dtype=torch.float64)
    digest = hashlib.sha256(metadata["about"].encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    safetensors.torch.save_file(tensors, path, metadata | {"sha256": digest.hexdigest()})
    assert_equal(RoutingStatistics.load(path), made)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_merging_parts_is_counting_the_whole(sizes: list[int], seed: int) -> None:
    experts_TK = choices(sum(sizes), seed)
    parts = [
        RoutingStatistics(EXPERTS, TOP_K, {3: plain_count(part)}) for part in torch.split(experts_TK, sizes, dim=0)
    ]
    whole, merged = plain_count(experts_TK), merge(parts).layers[3]
    assert merged.tokens == whole.tokens
    assert torch.equal(merged.loads_E, whole.loads_E)
    assert torch.equal(merged.pairs_EE, whole.pairs_EE)
    assert torch.equal(merged.sets_NK, whole.sets_NK)


@pytest.mark.parametrize("limit, size", [(None, 20), (8, 8), (100, 20)])
def test_a_merged_sample_is_as_large_as_is_certain(limit: int | None, size: int) -> None:
    parts = [statistics(10), statistics(500, sample=20), statistics(90, sample=30)]
    merged = merge(parts, limit).layers[0]
    assert len(merged.sets_NK) == size
    assert merged.tokens == 600


def test_a_merged_sample_draws_from_parts_as_they_have_tokens() -> None:
    """20 of 100 tokens merged with 30 of 300: a quarter of the merged 20 are the first's, and each set is as likely."""
    first = LayerStatistics(100, torch.tensor([100, 0, 100, 0]), torch.zeros(4, 4), torch.zeros(20, 2))
    parts = [replace(first, sets_NK=number_rows(20, 0)), replace(first, tokens=300, sets_NK=number_rows(30, 100))]
    rounds, seen = 2000, Counter[int]()
    sizes = []
    for seed in range(rounds):
        rows = merge_layers(parts, seed=seed).sets_NK[:, 0].tolist()
        assert len(rows) == len(set(rows)) == 20
        sizes.append(sum(row < 100 for row in rows))
        seen.update(int(row) for row in rows)
    mean, variance = sum(sizes) / rounds, float(torch.tensor(sizes, dtype=torch.float64).var())
    expected = 20 * 0.25 * 0.75 * (400 - 20) / 399  # of the hypergeometric distribution
    assert abs(mean - 5) < 4 * (expected / rounds) ** 0.5
    assert abs(variance - expected) < 4 * expected * (2 / rounds) ** 0.5
    for row in [*range(20), *range(100, 130)]:
        chance = 5 / 20 if row < 100 else 15 / 30
        assert abs(seen[row] - rounds * chance) < 4.5 * (rounds * chance * (1 - chance)) ** 0.5, row


def number_rows(count: int, first: int) -> Tensor:
    return torch.arange(first, first + count, dtype=torch.int16)[:, None].repeat(1, 2)


def test_merging_one_keeps_all_and_is_the_same_each_time() -> None:
    made = statistics(200, sample=50)
    assert_equal(merge([made]), made)
    again = [merge([made, statistics(70, seed=9)], seed=5) for _ in range(2)]
    assert_equal(again[0], again[1])
    assert again[0].provenance == {"merged": [{"seed": 0}, {"seed": 9}]}


@pytest.mark.parametrize("change, words", [
    ({"num_experts": 8}, "model.num_experts 8 there, 6 here"),
    ({"top_k": 2}, "model.num_experts_per_tok 2 there, 3 here"),
    ({"layers": {1: None}}, "experts in layers [1] there, [0] here"),
])  # fmt: skip
def test_merging_different_models_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(StatisticsError, match="number 2") as error:
        merge([statistics(5), replace(statistics(5), **change)])  # type: ignore[arg-type]
    assert words in str(error.value)


def test_merging_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="no statistics to merge"):
        merge([])


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "cut", "flipped", "foreign", "newer"])
def test_a_file_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s.safetensors"
    statistics(50).save(path)
    whole = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "foreign":
        safetensors.torch.save_file({"weight": torch.ones(2)}, path)
    elif kind == "newer":
        path.write_bytes(whole.replace(b'"version":"1"', b'"version":"9"'))
    else:
        damaged = {"empty": b"", "text": b"hello there\n" * 9, "cut": whole[:-7], "flipped": whole[:-7] + b"\x7f" * 7}
        path.write_bytes(damaged[kind])
    with pytest.raises(StatisticsError) as error:
        RoutingStatistics.load(path)
    assert str(path) in str(error.value)
    expected = {"flipped": "checksum", "foreign": "no routing statistics", "newer": "version 9", "missing": "cannot"}
    assert expected.get(kind, "") in str(error.value)


@pytest.mark.parametrize("change, words", [
    ({"tokens": 51}, "loads sum to 150, 51 tokens choose 153"),
    ({"pairs_EE": torch.zeros(6, 6, dtype=torch.int64)}, "pairs do not add up"),
    ({"loads_E": torch.zeros(5, dtype=torch.int64)}, "loads are"),
    ({"sets_NK": torch.tensor([[2, 1, 3]], dtype=torch.int16)}, "ascending"),
    ({"sets_NK": torch.tensor([[1, 2, 6]], dtype=torch.int16)}, "6 experts"),
])  # fmt: skip
def test_statistics_that_contradict_themselves_are_refused(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    made = statistics(50)
    bad = replace(made, layers={0: replace(made.layers[0], **change)})  # type: ignore[arg-type]
    bad.save(tmp_path / "s")
    with pytest.raises(StatisticsError, match=words) as error:
        RoutingStatistics.load(tmp_path / "s")
    assert "layer 0" in str(error.value)
