"""When one copy a node is expected to be faster, and who then sends so."""

import pytest

from occult_train import engine
from occult_train.config import load
from occult_train.engine import choose_dispatcher, choose_way
from occult_train.errors import ConfigError
from occult_train.moe.links import Cluster, Link, Shape, gain_by_node
from occult_train.parallel.grid import Grid

MODEL = ["model.num_experts=64", "model.num_experts_per_tok=8", "model.hidden_size=256", "train.precision=fp32"]
CPU = ["moe.backend=reference", "parallel.expert=4", *MODEL]
TWO_NODES = Grid(world_size=4, expert_size=4, per_node=2, inside_group=object(), across_group=object())
ONE_NODE = Grid(world_size=4, expert_size=4)


def test_where_the_network_is_all_the_gain_is_that_of_rows() -> None:
    """Uniform routing of 8 of 64 experts needs 3.659 of 4 devices: 1.83 rows go to the other node, or 0.998 by node."""
    network_alone = Cluster(2, Link(0.0, 1e9), Link(0.0, 1.0))
    gain = gain_by_node(Shape(4, 4, 2), network_alone, 64, 8, 1000, 1024)
    # 4096 sampled tokens: the devices a token needs have a standard deviation of 0.5
    assert gain == pytest.approx(2 * 3.659 / 4 / 0.998, rel=0.01)


def test_where_fanning_out_costs_most_there_is_none() -> None:
    assert gain_by_node(Shape(4, 4, 2), Cluster(2, Link(0.0, 1.0), Link(0.0, 1.0)), 64, 8, 1000, 1024) < 1
    # one expert a token: as many copies either way, but for the sample's unevenness over devices
    network_alone = Cluster(2, Link(0.0, 1e9), Link(0.0, 1.0))
    assert gain_by_node(Shape(4, 4, 2), network_alone, 64, 1, 1000, 1024) == pytest.approx(1, rel=0.05)


def test_the_hostfile_decides() -> None:
    name, why = choose_dispatcher(load(CPU), TWO_NODES)
    assert name == "hierarchical"
    assert why == "expected 1.50 times as fast as dedup on 2 nodes of 2 ranks"
    assert choose_way(load(CPU), TWO_NODES) == (
        None,
        f"experts: reference backend (plain torch), hierarchical dispatcher: {why}",
    )
    assert choose_dispatcher(load(CPU), ONE_NODE) == ("dedup", "")
    assert choose_dispatcher(load([*CPU, "moe.dispatcher=dedup"]), TWO_NODES) == ("dedup", "")
    assert choose_dispatcher(load([*CPU, "moe.dispatcher=hierarchical"]), TWO_NODES) == ("hierarchical", "")


def test_one_expert_a_token_gains_nothing() -> None:
    batch = ["train.micro_batch_size=16", "train.global_batch_size=64"]
    name, why = choose_dispatcher(load([*CPU, *batch, "model.num_experts_per_tok=1"]), TWO_NODES)
    assert name == "dedup"
    assert why.endswith("times as fast as hierarchical on 2 nodes of 2 ranks")


def test_the_fused_backend_stays_with_one_copy_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.torch.cuda, "is_available", lambda: True)
    assert choose_dispatcher(load([*MODEL, "parallel.expert=4"]), TWO_NODES) == ("dedup", "")


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            ["moe.dispatcher=hierarchical", "parallel.expert=2"],
            r"hierarchical needs parallel.expert=2 to span several nodes",
        ),
        (
            ["moe.dispatcher=hierarchical", "parallel.expert=4", "moe.backend=fused"],
            r"moe.backend=fused sends one copy per device and cannot go with moe.dispatcher=hierarchical",
        ),
    ],
)
def test_settings_that_cannot_go_together(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(settings)


def test_one_node_when_several_were_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"several nodes of as many ranks each; parallel.expert=4 is on 1 of 4"):
        choose_dispatcher(load([*CPU, "moe.dispatcher=hierarchical"]), ONE_NODE)
