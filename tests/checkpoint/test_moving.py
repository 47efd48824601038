"""Experts that move in a live engine: every value keeps its bits, and little is sent or held for it."""

import random
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from running import everything, start, tokens, train

from occult_train.checkpoint import state, store
from occult_train.config import to_yaml
from occult_train.errors import PlacementError
from occult_train.moe.placement import Placement
from occult_train.moving import Moved, move
from occult_train.parallel import zero
from occult_train.parallel.grid import Grid
from occult_train.testing import requires_gpus, run_distributed

STEPS = 3
HALF = [
    ["zero.stage=1", "train.precision=bf16"],
    ["zero.stage=2", "train.precision=bf16"],
    ["zero.stage=3", "train.precision=bf16"],
    ["zero.stage=3", "train.precision=bf16", "deepspeed.zero_optimization.stage3_param_persistence_threshold=100000"],
    ["zero.stage=1", "train.precision=fp16"],
    ["zero.stage=3", "train.precision=fp16"],
]


def shuffled(seed: int) -> dict[int, Placement]:
    """Another order in each layer."""
    return {layer: Placement(tuple(random.Random(2 * seed + layer).sample(range(8), 8))) for layer in range(2)}


def weights(engine: Any) -> dict[str, torch.Tensor]:
    """What forward computes with on this rank, by the ids of the experts that the routing tables have here."""
    found = {}
    for index, layer in engine.module.moe_layers().items():
        first = layer.ep_rank * layer.num_local_experts
        for name, parameter in layer.experts.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                for expert, slot in enumerate(layer.expert_to_slot.tolist()):
                    if first <= slot < first + layer.num_local_experts:
                        found[f"{index}.{name}.{expert}"] = parameter.data[slot - first].cpu().clone()
    return found


def all_weights(engine: Any, grid: Grid) -> dict[str, torch.Tensor]:
    """Of all ranks. Those that hold the same experts must agree."""
    ranks: list[Any] = [None] * grid.world_size
    dist.all_gather_object(ranks, weights(engine))
    found: dict[str, torch.Tensor] = {}
    for part in ranks:
        for name, value in part.items():
            assert torch.equal(found.setdefault(name, value), value), name
    return found


def check_records(engine: Any, placements: dict[int, Placement]) -> None:
    """Routing table, descriptor and tags are those of the placement."""
    for index, layer in engine.module.moe_layers().items():
        placement = placements[index]
        experts = placement.by_device(layer.ep_size)
        assert layer.placement == placement
        assert layer.expert_to_slot.tolist() == list(placement.expert_to_slot)
        assert [rank["experts"] for rank in layer.expert_placement_descriptor["ranks"]] == experts
        for parameter in layer.experts.parameters():
            meta = parameter.ds_autoep_uc_meta
            assert meta["local_experts"] == experts[layer.ep_rank]
            assert meta["expert_placement"] is layer.expert_placement_descriptor


def different(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


def move_twice(_rank: int, expert: int, variants: list[list[str]]) -> list[tuple[Any, ...]]:
    """For each variant: what two moves changed, and the losses beside those of a run without."""
    get_accelerator().is_fp16_supported = lambda: True  # torch is on every CPU; DeepSpeed asks for one that is fast
    results = []
    for overrides in variants:
        config, grid, engine = start([f"parallel.expert={expert}", *overrides])
        losses, changed = train(config, grid, engine, range(1)), []
        for number in (1, 2):
            before, used = everything(engine, grid), all_weights(engine, grid)
            move(engine, shuffled(number))
            check_records(engine, shuffled(number))
            changed += different(before, everything(engine, grid)) + different(used, all_weights(engine, grid))
            losses += train(config, grid, engine, range(number, number + 1))
        config, grid, engine = start([f"parallel.expert={expert}", *overrides])
        results.append((changed, losses, train(config, grid, engine, range(STEPS))))
    return results


@pytest.mark.parametrize(("ranks", "expert"), [(2, 2), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_half_precision_moves_bit_for_bit(ranks: int, expert: int) -> None:
    """fp32 is in tests/parity/test_truth.py, at every stage."""
    found = run_distributed(move_twice, ranks, expert, HALF, timeout=240)
    for overrides, (changed, moved, unmoved) in zip(HALF, found[0], strict=True):
        assert changed == [], overrides
        # losses of 4.2; other sums are rounded otherwise: 1.3e-4 at most
        assert moved == pytest.approx(unmoved, rel=1e-4), overrides
        assert moved[0] == unmoved[0], overrides


def move_after_loading(_rank: int, root: str) -> list[tuple[Any, ...]]:
    """At each stage: what a move right after a resume changed, and the losses beside those of the run that went on."""
    results = []
    for stage in (0, 2, 3):
        overrides = ["parallel.expert=2", f"zero.stage={stage}"]
        config, grid, engine = start(overrides)
        train(config, grid, engine, range(2))
        state.save(engine, grid, Path(root) / str(stage), 2, {}, to_yaml(config), keep=1)
        saved, losses = everything(engine, grid), train(config, grid, engine, range(2, 5))
        config, grid, engine = start(overrides)
        state.load(engine, grid, store.open_checkpoint(Path(root) / str(stage)))
        move(engine, shuffled(stage))
        check_records(engine, shuffled(stage))
        changed = different(saved, everything(engine, grid))
        results.append((changed, losses, train(config, grid, engine, range(2, 5))))
    return results


def test_a_move_right_after_a_resume(tmp_path: Path) -> None:
    for changed, whole, resumed in run_distributed(move_after_loading, 2, str(tmp_path))[0]:
        assert changed == []
        assert resumed == pytest.approx(whole, rel=1e-6)


@pytest.mark.gpu
@requires_gpus(2)
def test_on_gpus() -> None:
    """Fused layers over NCCL; in fp32 at stage 3 the masters may be the weights themselves."""
    way = ["moe.backend=fused", "moe.matmul=triton", "moe.transport=collective", "moe.overlap=none"]
    variants = [[*way, f"zero.stage={stage}", f"train.precision={p}"] for stage in (1, 2, 3) for p in ("fp32", "bf16")]
    variants.append([*way, "zero.stage=0"])
    found = run_distributed(move_twice, 2, 2, variants, backend="nccl", timeout=500)
    for overrides, (changed, moved, unmoved) in zip(variants, found[0], strict=True):
        assert changed == [], overrides
        assert moved == pytest.approx(unmoved, rel=1e-3 if "train.precision=bf16" in overrides else 1e-5), overrides


def two_experts(_rank: int, expert: int) -> list[tuple[Moved, int]]:
    """Two experts of one layer swap their devices. Beside it, how many values one expert has."""
    results = []
    for stage in (0, 1, 3):
        config, grid, engine = start([f"zero.stage={stage}", f"parallel.expert={expert}"])
        train(config, grid, engine, range(1))
        order = list(range(8))
        order[0], order[-1] = order[-1], order[0]
        size = 3 * config.model.hidden_size * config.model.intermediate_size
        results.append((move(engine, {1: Placement(tuple(order))}), size))
        again = move(engine, {1: Placement(tuple(order))})
        assert (again.experts, again.nbytes) == (0, 0)
    return results


def test_only_experts_that_move_are_sent() -> None:
    """fp32: two experts' masters and moments, and where they are apart (from stage 1 on) the weights; on 4 ranks at
    stage 0 and 1 the weights, at stage 0 everything, for each of two replicas."""
    for ranks, copies in ((2, (3, 4, 4)), (4, (6, 5, 4))):
        for (moved, size), kinds in zip(run_distributed(two_experts, ranks, 2)[0], copies, strict=True):
            assert (moved.experts, moved.nbytes) == (2, 2 * size * 4 * kinds)


def refusals(rank: int) -> list[str]:
    """Messages of moves that cannot be, and names of what they changed."""
    config, grid, engine = start(["parallel.expert=2", "zero.stage=1"])
    train(config, grid, engine, range(1))
    before, messages = everything(engine, grid), []

    def refused(placements: dict[int, Placement], error: type[Exception]) -> None:
        with pytest.raises(error) as caught:
            move(engine, placements)
        messages.append(str(caught.value))

    refused({0: Placement.contiguous(8), 7: Placement.contiguous(8)}, PlacementError)
    refused({0: Placement.contiguous(16)}, PlacementError)
    refused(shuffled(rank), RuntimeError)
    changed = different(before, everything(engine, grid))
    engine.module.train()
    engine.backward(engine(tokens(1)[:1], tokens(1)[:1]))
    engine.step()
    refused(shuffled(1), RuntimeError)
    check_records(engine, {layer: Placement.contiguous(8) for layer in range(2)})
    return messages + changed


def test_what_cannot_be_is_refused_on_every_rank() -> None:
    for messages in run_distributed(refusals, 2):
        assert messages == [
            "the placement names layer 7, the model has experts in [0, 1]",
            "the placement of layer 0 is of 16 experts, the model has 8 there",
            "the ranks were given different placements to move experts to",
            "experts cannot move while gradients are being accumulated",
        ]


def memory_of_moving(_rank: int, overrides: list[str]) -> tuple[int, int]:
    """Bytes of everything that this rank may have to send, and by how many it grew at most."""
    from test_checkpoint import status

    shape = ["model.hidden_size=128", "model.intermediate_size=256", "model.num_hidden_layers=12"]
    config, _, engine = start(["parallel.expert=2", *overrides, *shape])
    zero.make_states(engine)
    order = Placement((4, 5, 6, 7, 0, 1, 2, 3))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    assert move(engine, dict.fromkeys(range(12), order)).experts == 12 * 8
    experts = 12 * 4 * 3 * config.model.hidden_size * config.model.intermediate_size
    return 4 * 4 * experts, status("VmHWM") - before


@pytest.mark.parametrize("stage", [1, 3])
def test_a_move_takes_room_for_one_stack(stage: int) -> None:
    for whole, grown in run_distributed(memory_of_moving, 2, [f"zero.stage={stage}"]):
        assert whole > 70e6
        assert grown < whole / 6
