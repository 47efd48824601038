"""Routing statistics gathered while training: each token of the window once, whatever else the run does."""

from pathlib import Path

import pytest
import torch
from small_runs import SMALL, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_trainer import train_until
from torch import Tensor

from occult_train.checkpoint.store import open_checkpoint
from occult_train.config import load
from occult_train.data.loader import build_datasets, resolve_vocab
from occult_train.errors import StatisticsError
from occult_train.models.gpt import GPT
from occult_train.models.init import init_weights
from occult_train.moe.statistics import RoutingStatistics
from occult_train.testing import run_distributed

EXPERTS, TOP_K, BATCH, LENGTH = 8, 3, 8, 32


def counts(statistics: RoutingStatistics) -> dict[int, list[list[int]]]:
    return {i: [layer.loads_E.tolist(), *layer.pairs_EE.tolist()] for i, layer in statistics.layers.items()}


def first_step_by_hand(corpus: str) -> dict[int, list[list[int]]]:
    """Loads and pairs of step 1's tokens, by loops over what untrained routers choose of all its sequences."""
    config = load([*SMALL, f"data.path={corpus}", "parallel.expert=1"])
    config.model.vocab_size = resolve_vocab(config.data, 0)
    data, _ = build_datasets(config.data, config.train.seed, vocab_size=config.model.vocab_size)
    model = GPT(config.model)
    init_weights(model, config.train.seed)
    chosen: dict[int, Tensor] = {}
    for index, layer in model.moe_layers().items():
        layer.router.register_forward_hook(
            lambda _m, _i, logits, at=index: chosen.update({at: logits.softmax(-1).topk(TOP_K).indices})
        )
    with torch.no_grad():
        model(torch.stack([data[i]["input_ids"] for i in range(BATCH)]))
    table = {index: [[0] * EXPERTS for _ in range(1 + EXPERTS)] for index in chosen}
    for index, experts_TK in chosen.items():
        for experts in experts_TK.tolist():
            for i in experts:
                table[index][0][i] += 1
                for j in experts:
                    table[index][1 + i][j] += i != j
    return table


@pytest.mark.parametrize("ranks, expert", [(1, 1), (2, 2), (4, 2)])
def test_the_tokens_of_the_window_are_counted_once(tmp_path: Path, corpus: str, ranks: int, expert: int) -> None:
    """Accumulation, recomputation and evaluation on the way; and the file is the window's, not the run's."""
    extra = [f"data.path={corpus}", f"output={tmp_path}/run", f"parallel.expert={expert}", "eval.interval=1"]
    extra += ["moe.statistics.steps=1", "train.steps=2", "train.activation_checkpointing=selective"]
    extra += ["train.micro_batch_size=1", "moe.statistics.sample=100"]
    run_distributed(train, ranks, extra, timeout=240)
    statistics = RoutingStatistics.load(tmp_path / "run" / "statistics.safetensors")
    assert statistics.tokens == BATCH * LENGTH
    assert statistics.provenance == {"source": "training", "run": f"{tmp_path}/run", "window": [0, 1]}
    assert counts(statistics) == first_step_by_hand(corpus)
    assert [len(layer.sets_NK) for layer in statistics.layers.values()] == [100, 100]
    assert not list((tmp_path / "run").glob("checkpoints/*/statistics*")), "the window had closed"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> Path:
    """A run of 6 steps with a window of the middle four."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    settings = [f"data.path={corpus}", f"output={run}", "train.steps=6", "moe.statistics={start: 1, steps: 4}"]
    run_distributed(train, 2, settings, timeout=240)
    return run


def test_a_run_stopped_in_the_window_goes_on_with_other_ranks(tmp_path: Path, corpus: str, undisturbed: Path) -> None:
    settings = [f"data.path={corpus}", f"output={tmp_path}/run", "train.steps=6"]
    settings += ["moe.statistics={start: 1, steps: 4}"]
    run_distributed(train_until, 2, settings, 1, timeout=240)
    stopped = open_checkpoint(tmp_path / "run")
    assert stopped.step in (2, 3), "the ranks agree a step or two later"
    part = RoutingStatistics.load(stopped.folder / "statistics.safetensors")
    assert part.tokens == (stopped.step - 1) * BATCH * LENGTH
    assert not (tmp_path / "run" / "statistics.safetensors").exists()
    run_distributed(train, 1, [*settings, "parallel.expert=1"], timeout=240)
    whole = RoutingStatistics.load(undisturbed / "statistics.safetensors")
    resumed = RoutingStatistics.load(tmp_path / "run" / "statistics.safetensors")
    assert whole.tokens == resumed.tokens == 4 * BATCH * LENGTH
    assert counts(resumed) == counts(whole)
    for index, layer in whole.layers.items():  # all are kept, so both samples are all choices, in other orders
        ours = resumed.layers[index].sets_NK
        assert sorted(layer.sets_NK.tolist()) == sorted(ours.tolist())


def test_tensorboard_shows_the_matrix(undisturbed: Path) -> None:
    events = EventAccumulator(str(undisturbed / "tensorboard"))
    events.Reload()
    for tag in ("moe/layer_00/collaboration", "moe/layer_01/collaboration"):
        (image,) = events.Images(tag)
        assert (image.step, image.width, image.height) == (5, 384, 384)


def test_a_run_that_ends_in_the_window_writes_what_it_counted_and_can_go_on(tmp_path: Path, corpus: str) -> None:
    settings = [f"data.path={corpus}", f"output={tmp_path}/run", "parallel.expert=1", "moe.statistics.steps=3"]
    for steps in (2, 4):
        run_distributed(train, 1, [*settings, f"train.steps={steps}"], timeout=240)
        statistics = RoutingStatistics.load(tmp_path / "run" / "statistics.safetensors")
        assert statistics.tokens == min(steps, 3) * BATCH * LENGTH


def test_damaged_statistics_of_a_checkpoint_are_refused(tmp_path: Path, corpus: str) -> None:
    settings = [f"data.path={corpus}", f"output={tmp_path}/run", "parallel.expert=1", "moe.statistics.steps=9"]
    run_distributed(train, 1, [*settings, "train.steps=1"], timeout=240)
    path = open_checkpoint(tmp_path / "run").folder / "statistics.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    (message,) = run_distributed(refusal, 1, [*settings, "train.steps=2"], timeout=240)
    assert message == f"statistics {path} are damaged: the checksum does not match"


def refusal(rank: int, arguments: list[str]) -> str:
    try:
        train(rank, arguments)
    except StatisticsError as error:
        return str(error)
    return "not refused"
