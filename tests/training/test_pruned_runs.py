"""Training with pruning: profiled, resumed bit for bit without the file, evaluated and generated as it was trained."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_pruning import cosine, prune_token
from small_runs import records, train
from test_trainer import assert_same, train_until
from torch import Tensor
from torch.nn import functional as F

from occult_train.checkpoint.store import open_checkpoint
from occult_train.errors import UserError
from occult_train.inference import load_model
from occult_train.moe.similarity import SimilarityTables
from occult_train.moe.statistics import RoutingStatistics
from occult_train.testing import run_distributed
from occult_train.tools.export import command as export
from occult_train.tools.profile import command as profile

LAYERS, LENGTH, EXPERTS, TOP_K, GROUPS = 2, 32, 8, 3, 4
PLACED = {str(layer): [3, 7, 0, 4, 1, 6, 2, 5] for layer in range(LAYERS)}
DEVICE_OF = [PLACED["0"].index(expert) // (EXPERTS // GROUPS) for expert in range(EXPERTS)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> Path:
    """A folder with a run of two steps, statistics of it with similarity and without, and a placement."""
    folder = tmp_path_factory.mktemp("pruned")
    (folder / "placement.json").write_text(json.dumps({"slot_to_expert": PLACED}))
    run_distributed(train, 1, ["parallel.expert=1", f"data.path={corpus}", f"output={folder}/base", "train.steps=2"])
    for name, similarity in (("similar", True), ("plain", False)):
        profile(f"{folder}/base", tokens=0, output=folder / name, similarity=similarity)
    return folder


def settings(base: Path, corpus: str, run: str) -> list[str]:
    return [
        *(f"data.path={corpus}", f"output={base}/{run}", f"moe.placement={base}/placement.json", "train.steps=6"),
        *("moe.prune.policy=similarity", "moe.prune.devices=2", f"moe.prune.groups={GROUPS}"),
        *("moe.prune.schedule={3: 3}", f"moe.prune.similarity={base}/similar", "eval.interval=3"),
        *("train.activation_checkpointing=selective", "moe.balance=bias", "moe.bias_update_rate=0.02"),
    ]


@pytest.fixture(scope="module")
def whole(base: Path, corpus: str) -> Path:
    """A pruned run of six steps on two ranks, never stopped."""
    run_distributed(train, 2, settings(base, corpus, "whole"), timeout=240)
    return base / "whole"


def test_similarity_is_the_cosine_of_logits_over_the_held_out_text(base: Path, corpus: str) -> None:
    model = load_model(open_checkpoint(base / "base"))
    tokens = torch.from_numpy(np.fromfile(f"{corpus}/valid.bin", dtype="<u2").astype(np.int64))
    seen: dict[int, list[Tensor]] = {index: [] for index in model.moe_layers()}
    for index, layer in model.moe_layers().items():
        layer.router.register_forward_hook(lambda _m, _i, logits, at=index: seen[at].append(logits))
    pieces = (len(tokens) - 1) // LENGTH
    with torch.no_grad():
        model(tokens[: pieces * LENGTH].view(pieces, LENGTH))
    statistics = RoutingStatistics.load(base / "similar")
    statistics.check()
    for index, table in SimilarityTables.of(statistics, "similar").tables.items():
        exact = torch.tensor(cosine(torch.cat(seen[index])[:, :3].T.tolist()))
        torch.testing.assert_close(table[:3, :3], exact, rtol=0, atol=1e-5)
    assert not RoutingStatistics.load(base / "plain").has_similarity


def test_a_resumed_run_is_the_undisturbed_one_and_needs_no_file(base: Path, corpus: str, whole: Path) -> None:
    halves = [*settings(base, corpus, "halves"), "checkpoint.interval=2"]
    run_distributed(train_until, 2, halves, 3, timeout=240)
    assert open_checkpoint(base / "halves").step in (4, 5)
    aside = base / "similar.aside"
    (base / "similar").rename(aside)
    try:
        run_distributed(train, 2, halves, timeout=240)
    finally:
        aside.rename(base / "similar")
    assert_same(open_checkpoint(whole), open_checkpoint(base / "halves"))
    assert records(whole) == records(base / "halves")
    kept = open_checkpoint(base / "halves").folder / "similarity.safetensors"
    assert kept.read_bytes() == (open_checkpoint(whole).folder / "similarity.safetensors").read_bytes()


def test_generation_routes_as_training_and_evaluation_did(whole: Path, corpus: str) -> None:
    """One process: the held-out loss that two ranks logged, with choices a token at a time; unpruned it is another."""
    model = load_model(open_checkpoint(whole))
    table = SimilarityTables.load(open_checkpoint(whole).folder / "similarity.safetensors").tables
    tokens = torch.from_numpy(np.fromfile(f"{corpus}/valid.bin", dtype="<u2").astype(np.int64))
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    for index, layer in model.moe_layers().items():
        choose, router = layer.router.choose, layer.router

        def watched(logits: Tensor, pruning=None, choose=choose, router=router, index=index):  # type: ignore
            routing = choose(logits, pruning)
            seen[index] = (logits.softmax(1) + router.expert_bias, routing.experts_TK)
            return routing

        layer.router.choose = watched  # type: ignore[method-assign]
    losses = []
    for i in range(7):
        piece = tokens[i * LENGTH : i * LENGTH + LENGTH + 1]
        with torch.no_grad():
            losses.append(F.cross_entropy(model(piece[None, :-1])[0], piece[1:]).item())
        for index, (scores, experts) in seen.items():
            similarity = table[index].tolist()
            right = [prune_token(row, TOP_K, DEVICE_OF, 2, similarity).experts for row in scores.tolist()]
            assert experts.tolist() == right
    logged = [r["loss"] for r in records(whole) if r["kind"] == "evaluation"]
    assert len(logged) == 2
    assert abs(logged[-1] - np.mean(losses)) < 1e-5
    unpruned = load_model(open_checkpoint(whole), pruned=False)
    with torch.no_grad():
        assert not torch.equal(unpruned(tokens[None, :LENGTH]), model(tokens[None, :LENGTH]))


def test_the_log_and_profile_are_of_the_pruned_routing(base: Path, corpus: str, whole: Path) -> None:
    """Groups that are the ranks: at m=1 one device a token, and the rows of a token's home are the others'."""
    arguments = [f"data.path={corpus}", f"output={base}/one", "train.steps=2", "model.num_experts_per_tok=3"]
    run_distributed(train, 2, [*arguments, "moe.prune.policy=router", "moe.prune.devices=1"], timeout=240)
    for record in records(base / "one"):
        for layer in record.get("layers", []):
            assert layer["c_t"] == 1.0
            assert layer["intra_share"] == 1.0
            assert len(set(layer["rows_sent"].values())) == 1
            assert layer["rows_sent"]["dispatch"] * 4 * TOP_K == layer["copies_rows"]
    profile(str(whole), tokens=96, output=base / "of_pruned")
    device = torch.tensor(DEVICE_OF)
    for layer in RoutingStatistics.load(base / "of_pruned").layers.values():
        used = [len(set(row)) for row in device[layer.sets_NK.long()].tolist()]
        assert max(used) == 2


def test_an_export_says_that_it_is_not_pruned(whole: Path, tmp_path: Path, corpus: str, capsys) -> None:  # type: ignore
    run = tmp_path / "run"
    pruned = ["moe.prune.policy=router", "moe.prune.devices=1", "model.num_hidden_layers=1", "train.steps=1"]
    run_distributed(train, 2, [f"data.path={corpus}", f"output={run}", *pruned], timeout=240)
    export(str(run), tmp_path / "hf", verify=True)
    out = capsys.readouterr().out
    assert "it routes unpruned, not as moe.prune.policy=router of its training does; --pruned keeps that" in out
    assert "transformers' logits agree with ours" in out


def refusals(_rank: int, cases: list[list[str]]) -> list[str]:
    found = []
    for arguments in cases:
        try:
            train(0, arguments)
            found.append("not refused")
        except UserError as error:
            found.append(str(error))
    return found


def test_tables_that_cannot_be_used_are_named_in_one_line(base: Path, corpus: str, whole: Path) -> None:
    common = [f"data.path={corpus}", "parallel.expert=1", "moe.prune.groups=4", "moe.prune.devices=2"]
    common += ["moe.prune.policy=similarity", f"output={base}/new", "train.steps=1"]
    named = f"moe.prune.similarity={base}"
    cases = {
        "moe.prune.similarity=": "moe.prune.policy=similarity needs moe.prune.similarity, which is empty",
        f"{named}/none": f"{named}/none: statistics {base}/none cannot be read: ",
        f"{named}/plain": f"{named}/plain: statistics {base}/plain hold no similarity; make them with ",
        f"{named}/similar model.num_hidden_layers=3": f"similarity {base}/similar is of layers [0, 1], the model has ",
        f"{named}/similar model.num_experts=16": f"similarity {base}/similar is [8, 8] in layer 0, the model has 16 ",
    }
    (messages,) = run_distributed(refusals, 1, [[*common, *words.split()] for words in cases], timeout=240)
    for message, start in zip(messages, cases.values(), strict=True):
        assert message.startswith(start)
        assert "\n" not in message
