"""Experts in host memory: the same tokens as with all of them on the device, whatever room there is; who gives way; and
copies that begin before what they shall run beside."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from occult_train.errors import UserError
from occult_train.generation import Ending, Sampling, generate
from occult_train.inference import describe_offload, offload_experts
from occult_train.models.config import ModelConfig
from occult_train.models.gpt import GPT, Runtime
from occult_train.models.init import init_weights
from occult_train.models.scmoe_config import ScMoEConfig
from occult_train.moe.offload import LeastRecent, Places
from occult_train.moe.placement import Placement
from occult_train.moe.pruning import PruneConfig
from occult_train.testing import requires_gpu

CPU = torch.device("cpu")
COMMON: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 24, "intermediate_size": 12, "num_hidden_layers": 4, "num_attention_heads": 2},
    **{"num_experts": 6, "max_position_embeddings": 32, "initializer_range": 0.4},
}
EXPERT = 3 * 24 * 12 * 4
"""Bytes of an expert."""
DENSE: dict[str, Any] = {"dense_intermediate_size": 20}
SHARED: dict[str, Any] = {"shared_expert_intermediate_size": 10}
MODELS: dict[str, tuple[ModelConfig, int]] = {
    "plain": (ModelConfig(**COMMON, num_experts_per_tok=2), 4),
    "shared expert, a dense layer": (
        ModelConfig(**COMMON, **DENSE, **SHARED, num_experts_per_tok=3, dense_layers=[1]),
        3,
    ),
    **{
        f"scmoe {position}": (
            ModelConfig(**COMMON, **DENSE, **SHARED, num_experts_per_tok=k, scmoe=ScMoEConfig("scmoe", position)),
            2,
        )
        for position, k in (("pos1", 1), ("pos2", 2), ("pos3", 1))
    },
    "scmoe in every block": (
        ModelConfig(**COMMON, **SHARED, num_experts_per_tok=1, scmoe=ScMoEConfig("scmoe", "pos1", 1, "cg1")),
        4,
    ),
    "dgmoe": (ModelConfig(**COMMON, **DENSE, num_experts_per_tok=1, scmoe=ScMoEConfig("dgmoe")), 2),
}
"""And layers with experts."""
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 90]]
HOT = Sampling(2.0, seed=3)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are computed fastest by one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(name: str) -> GPT:
    """Experts are placed at random, and pruned where two can be chosen."""
    config, rng = MODELS[name][0], random.Random(name)
    placements = {i: Placement(tuple(rng.sample(range(6), 6))) for i in config.moe_layers}
    pruned = PruneConfig("router", 2, 3) if config.num_experts_per_tok == 2 else None
    model = GPT(config, Runtime(placements=placements, prune=pruned))
    init_weights(model, 1)
    return model.eval()


@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "blocking"])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_experts_on_the_device(name: str, ahead: bool) -> None:
    """With room for all, for a layer, and for a few experts, of which a single text's tokens need no more."""
    model, layers = make(name), MODELS[name][1]
    assert len(model.moe_layers()) == layers
    together = generate(model, PROMPTS, HOT, Ending(12))
    alone = generate(model, [[7]], HOT, Ending(20))
    for room in (6 * layers, 6):
        places = offload_experts(model, CPU, room * EXPERT + EXPERT - 1, ahead)
        assert generate(model, PROMPTS, HOT, Ending(12)) == together
        assert places.held.size == len(places.w1) == room
        assert len(places.held) <= room
        assert generate(model, [[7]], HOT, Ending(20)) == alone
        fetched = places.tally.fetched
        assert generate(model, [[7]], HOT, Ending(20)) == alone
        assert (places.tally.fetched == fetched) == (room == 6 * layers), "what has a place stays there"
    choices = model.config.choices_per_token
    places = offload_experts(model, CPU, choices * EXPERT, ahead)
    assert generate(model, [[7]], HOT, Ending(20)) == alone
    assert places.tally.uses == 20 * layers * choices
    assert places.tally.fetched > places.tally.uses // 2


def test_what_fits_is_copied_once() -> None:
    model = make("plain")
    places = offload_experts(model, CPU)
    assert places.nbytes == 2 * 2 * 4 * EXPERT, "twice what a token uses"
    generate(model, [[7]] * 6, Sampling(), Ending(8))
    assert places.tally.uses > places.tally.fetched > 0


@pytest.mark.parametrize("name", ["scmoe pos1", "scmoe pos2", "scmoe pos3", "scmoe in every block", "dgmoe", "plain"])
def test_copies_begin_before_what_they_run_beside(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of a pair's operators and the copies, as a device gets them."""
    model, order, bring = make(name), list[str](), Places.bring
    monkeypatch.setattr(Places, "bring", lambda *args: (order.append("copy"), bring(*args))[1])
    for module, label in (
        *((block.attention, "attention") for block in model.layers),
        *((block.mlp, "mlp") for block in model.layers if getattr(block, "mlp", None) is not None),
        *((block.shared_expert, "shared") for block in model.layers if getattr(block, "shared_expert", None)),
        *((block.moe.experts, "experts") for block in model.layers if block.moe is not None),
    ):
        module.register_forward_pre_hook(lambda *_, label=label: order.append(label))
    expected = {
        "scmoe pos1": "attention mlp copy attention shared experts",
        "scmoe pos2": "attention copy mlp attention shared experts",
        "scmoe pos3": "copy attention mlp attention shared experts",
        "scmoe in every block": "copy attention shared experts",
        "dgmoe": "attention mlp attention copy experts",
        "plain": "attention copy experts",
    }[name].split()
    pairs = len(model.moe_layers())
    places = offload_experts(model, CPU)
    generate(model, [[7]], Sampling(), Ending(1))
    assert order == expected * pairs
    late = name in ("dgmoe", "plain")
    assert ("waited for" if late else "run beside") in describe_offload(model, places)
    order.clear()
    offload_experts(model, CPU, ahead=False)
    generate(model, [[7]], Sampling(), Ending(1))
    assert [word for word in order if word != "copy"] == [word for word in expected * pairs if word != "copy"]
    assert all(order[i - 1 : i + 1] == ["experts", "copy"] for i, word in enumerate(order) if word == "copy")


def test_too_little_room_names_what_there_is_and_what_is_needed() -> None:
    model = make("plain")
    with pytest.raises(UserError) as caught:
        offload_experts(model, CPU, 2 * EXPERT - 1)
    assert str(caught.value) == (
        f"--expert-budget={(2 * EXPERT - 1) / 1e9:g} has room for 1 experts (0.0 MB), and a token needs 2 experts "
        "(0.0 MB) in a layer"
    )
    offload_experts(model, CPU, 4 * EXPERT)
    with pytest.raises(UserError, match=r"has room for 4 experts .* and layer \d needs [56] experts .* these tokens"):
        generate(model, [list(range(30))], Sampling(), Ending(1))


@pytest.mark.gpu
@requires_gpu
@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "blocking"])
def test_on_a_gpu_copies_are_whole_before_they_are_used(ahead: bool) -> None:
    """Experts of 25 MB, whose copies take longer than the window; and memory is what room there is."""
    sizes = {"vocab_size": 512, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 8, "num_experts": 16, "max_position_embeddings": 128, "num_experts_per_tok": 1}
    widths = {"dense_intermediate_size": 512, "shared_expert_intermediate_size": 512}
    config = ModelConfig(**sizes, **widths, initializer_range=0.05, scmoe=ScMoEConfig("scmoe"))
    with torch.device("cuda"):
        model = GPT(config).bfloat16().eval()
    init_weights(model, 1)
    expected = generate(model, [[7], [5]], HOT, Ending(60))
    resident, expert = torch.cuda.memory_allocated(), 3 * 1024 * 4096 * 2
    for room in (32, 16, 3):
        places = offload_experts(model, torch.device("cuda"), room * expert, ahead)
        assert all(weight.is_pinned() for layer in model.moe_layers().values() for weight in layer.experts.parameters())
        assert generate(model, [[7], [5]], HOT, Ending(60)) == expected
        assert torch.cuda.memory_allocated() < resident - (32 - room) * expert + (64 << 20)
        assert places.tally.fetched > 0
        del places


@given(places=st.integers(1, 5), steps=st.lists(st.sets(st.integers(0, 8)), max_size=30))
def test_who_gives_way_was_used_longest_ago(places: int, steps: list[set[int]]) -> None:
    """Against a list with the last used behind; places are never shared, and what stays does not move."""
    held, recent = LeastRecent(places), list[int]()
    where: dict[int, int] = {}
    for keys in map(sorted, steps):
        if len(keys) > places:
            with pytest.raises(ValueError):
                held.use(keys)
            continue
        found, new = held.use(keys)
        assert [keys[i] for i in new] == [key for key in keys if key not in recent]
        recent = ([key for key in recent if key not in keys] + keys)[-places:]
        stay = {key: place for key, place in where.items() if key in recent}
        where = stay | dict(zip(keys, found, strict=True))
        assert all(where[key] == place for key, place in stay.items())
        assert set(where) == set(recent)
        assert len(set(where.values())) == len(where) == len(held) <= places
        assert all(0 <= place < places for place in found)
