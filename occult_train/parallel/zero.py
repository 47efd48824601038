"""Every touch of DeepSpeed's internals, pinned to deepspeed 0.19.8.

DeepSpeed knows experts that are not its own only as `AutoEPMoELayer`s with tagged parameters; so ours is one. And its
getters and setters of master weights and optimizer states need help in places. Each fact relied on has a test in
tests/parity/test_deepspeed_facts.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.checkpoint.autoep_affine import autoep_placement_to_affine_map, make_autoep_placement_descriptor
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from occult_train.parallel.grid import Grid

STATES = ("exp_avg", "exp_avg_sq")
"""AdamW's moments."""


class ExpertParallelLayer(AutoEPMoELayer):
    """Base of a layer whose experts are spread over ranks, as DeepSpeed's engines recognise it.

    `AutoEPMoELayer.__init__` converts a Hugging Face block and is bypassed; `set_deepspeed_parallelism` is inherited.
    """

    def __init__(self, grid: Grid, num_experts: int, experts_by_device: list[list[int]]) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts
        self.num_local_experts = num_experts // grid.expert_size
        self.ep_size = grid.expert_size
        self.ep_rank = grid.expert_rank
        self.ep_group_name = grid.group_name
        self.ep_group = None
        self.describe(experts_by_device)

    def describe(self, experts_by_device: list[list[int]]) -> None:
        """Tell DeepSpeed which experts each device holds, in slot order. Call `tag` afterwards."""
        self.expert_placement_descriptor = make_autoep_placement_descriptor(self.num_experts, experts_by_device)

    def tag(self, experts: nn.Module) -> None:
        """Mark stacked expert weights [L, ...], so that gradients are reduced and sharded among their holders alone.
        Again after `describe`."""
        local = self.expert_placement_descriptor["ranks"][self.ep_rank]["experts"]
        for parameter in experts.parameters():
            shape = [self.num_experts, *parameter.shape[1:]]
            parameter.allreduce = False
            parameter.group_name = self.ep_group_name
            parameter.ds_zero_placement_family = "autoep_expert"
            parameter.ds_zero_partition_group_name = self.ep_group_name
            parameter.ds_autoep_uc_meta = {
                "expert_placement": self.expert_placement_descriptor,
                "affine_map": autoep_placement_to_affine_map(self.expert_placement_descriptor, shape).to_dict(),
                "logical_shape": shape,
                "ep_rank": self.ep_rank,
                "local_experts": list(local),
            }


def is_expert(parameter: nn.Parameter) -> bool:
    """Whether the parameter is a stack of this rank's experts."""
    return getattr(parameter, "ds_zero_placement_family", "") == "autoep_expert"


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the parameter unpartitioned (ZeRO-3 leaves an empty one behind)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _masters(engine: Any) -> list[Tensor]:
    """The flat fp32 tensors that the inner AdamW steps, one for each group or sub-group (the parameters at stage 0)."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return list(optimizer.fp32_partitioned_groups_flat)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return list(optimizer.single_partition_of_fp32_groups)
    if isinstance(optimizer, BF16_Optimizer):
        return list(optimizer.fp32_groups_flat_partition)
    return [p for group in optimizer.param_groups for p in group["params"]]


def _adam(engine: Any) -> torch.optim.Optimizer:
    """The inner torch AdamW."""
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def make_states(engine: Any) -> None:
    """Create AdamW's states where no step has made them yet; they exist only after the first step otherwise."""
    adam = _adam(engine)
    fused = bool(adam.defaults.get("fused"))
    for master in _masters(engine):
        if not adam.state[master]:
            device = master.device if fused else "cpu"
            adam.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
    link_states(engine)


def link_states(engine: Any) -> None:
    """Let the getters see all groups' states: DeepSpeed links after the first *group's* step and misses the others."""
    optimizer = engine.optimizer
    if isinstance(optimizer, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def adam_step(engine: Any) -> int:
    """Steps that AdamW has taken."""
    adam = _adam(engine)
    return max((int(adam.state[m]["step"]) for m in _masters(engine) if adam.state[m]), default=0)


def set_adam_step(engine: Any, step: int) -> None:
    """Set AdamW's step count, which its bias correction uses, in every group."""
    adam = _adam(engine)
    for master in _masters(engine):
        adam.state[master]["step"].fill_(step)


def get_full(engine: Any, parameter: nn.Parameter, kind: str) -> Tensor:
    """Whole fp32 value of a parameter's `param` (master weight), `exp_avg` or `exp_avg_sq`; an expert stack is this
    rank's own, [L, ...]. Collective over the ranks that hold the parameter. After `make_states` or `link_states`."""
    if not parameter.requires_grad:
        assert kind == "param", "a frozen parameter has no moments"
        with GatheredParameters(parameter, enabled=hasattr(parameter, "ds_tensor")):
            return parameter.data.detach().float().clone()
    if engine.zero_optimization_stage() == 0:
        value = parameter.data if kind == "param" else _adam(engine).state[parameter][kind]
        return value.detach().float().clone()
    if kind == "param":
        value = safe_get_full_fp32_param(parameter)
    else:
        value = safe_get_full_optimizer_state(parameter, kind)
    return value.detach().view(full_shape(parameter))


def set_full(engine: Any, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
    """Set what `get_full` gets. Afterwards call `push_weights` once for all parameters; frozen ones need only that."""
    if not parameter.requires_grad:
        return
    value = value.to(parameter.device if parameter.numel() else engine.device, torch.float32)
    if engine.zero_optimization_stage() == 0:
        target = parameter.data if kind == "param" else _adam(engine).state[parameter][kind]
        target.copy_(value)
    elif kind == "param":
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, kind)


def push_weights(engine: Any, parameter: nn.Parameter, value: Tensor) -> None:
    """Write a new master value into the model's own weight too; the setters leave it old.

    Args:
        value: the whole fp32 value, as given to `set_full`.
    """
    if not hasattr(parameter, "ds_tensor"):
        parameter.data.copy_(value)
        return
    shard = parameter.ds_tensor
    group = parameter.ds_zero_partition_process_group
    size, rank = shard.numel(), dist.get_rank(group)
    flat = torch.zeros(size * dist.get_world_size(group), dtype=shard.dtype, device=shard.device)
    flat[: value.numel()] = value.reshape(-1).to(flat)
    shard.data.copy_(flat[rank * size : (rank + 1) * size])
    if parameter.ds_status.name == "AVAILABLE":
        parameter.data.copy_(value)


@dataclass(frozen=True)
class Held:
    """A run of a parameter's flattened values that this rank keeps."""

    start: int
    """Index of the first one in the flattened parameter."""
    values: Tensor
    """[n], a view: writing to it changes the engine. Empty where this rank keeps none."""


def held(engine: Any, parameter: nn.Parameter) -> dict[str, Held]:
    """Everything that a step of this rank reads or writes of a parameter, by kind; the same kinds on every rank.

    `weight` and `whole` are in the model's type: what forward computes with, and at stage 3 its shard and, where
    DeepSpeed keeps it gathered, the whole. `param` (the master) and the moments are fp32; moments are there once a
    step or `make_states` has made them. What shares its memory with another kind is left out.
    """
    if engine.zero_optimization_stage() == 0:
        return {kind: Held(0, value.view(-1)) for kind, value in _master_and_moments(engine, parameter)}
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        return _held_at_stage_3(engine, parameter)
    part: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    group, start, at, size = 0, 0, 0, 0
    if part is not None:
        group, start = part.param_group_index, part.lp_fragment_address.start
        at, size = part.hp_fragment_address.start, part.hp_fragment_address.numel
    master = _masters(engine)[group]
    found = {kind: Held(start, value.narrow(0, at, size)) for kind, value in _master_and_moments(engine, master)}
    return found | {"weight": Held(0, parameter.data.view(-1))}


def _held_at_stage_3(engine: Any, parameter: Any) -> dict[str, Held]:
    optimizer = engine.optimizer
    group, at, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = size * dist.get_rank(parameter.ds_zero_partition_process_group)
    size = min(size, max(0, parameter.ds_numel - start))  # the last shards are padded
    master = _masters(engine)[group]
    found = {kind: Held(start, value.narrow(0, at, size)) for kind, value in _master_and_moments(engine, master)}
    used = [("weight", Held(start, parameter.ds_tensor.data.view(-1)[:size]))]
    if parameter.ds_status.name == "AVAILABLE":
        used.append(("whole", Held(0, parameter.data.view(-1))))
    memory = {_memory(master)}  # in fp32 the shard is the master; of a single shard the whole may be that one
    for kind, part in used:
        if _memory(part.values) not in memory:
            found[kind] = part
            memory.add(_memory(part.values))
    return found


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _master_and_moments(engine: Any, master: Tensor) -> list[tuple[str, Tensor]]:
    state = _adam(engine).state.get(master, {})
    return [("param", master.data), *((kind, state[kind].data) for kind in STATES if kind in state)]


def between_steps(engine: Any) -> bool:
    """Whether no micro-batch of an unfinished optimizer step was seen."""
    return engine.micro_steps % engine.gradient_accumulation_steps() == 0


def full_grad(engine: Any, parameter: nn.Parameter) -> Tensor:
    """Whole reduced gradient between backward and step; an expert stack is this rank's own. Collective as get_full."""
    return safe_get_full_grad(parameter).detach().float().view(full_shape(parameter))


def clip_stage_0(engine: Any, grid: Grid, limit: float) -> float:
    """Global gradient norm at stage 0, clipping to `limit` if positive, over dense parameters and all experts.

    DeepSpeed's own clipping averages ranks' norms there, which is wrong with experts (DeepSpeed#8475).
    """
    dense = torch.zeros((), dtype=torch.float64, device=engine.device)
    experts = torch.zeros((), dtype=torch.float64, device=engine.device)
    gradients = []
    for parameter in engine.module.parameters():
        if parameter.grad is not None:
            gradients.append(parameter.grad)
            square = parameter.grad.double().square().sum()
            if is_expert(parameter):
                experts += square
            else:
                dense += square
    dist.all_reduce(experts, group=grid.expert_group)
    norm = float((dense + experts).sqrt())
    if limit > 0 and norm > limit:
        for gradient in gradients:
            gradient.mul_(limit / (norm + 1e-6))
    return norm


_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def loss_scale_state(engine: Any) -> dict[str, float] | None:
    """The dynamic loss scaler's state under fp16, else None."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if not engine.fp16_enabled() or scaler is None:
        return None
    return {name: getattr(scaler, name) for name in _LOSS_SCALE if hasattr(scaler, name)}


def set_loss_scale_state(engine: Any, state: dict[str, float] | None) -> None:
    """Restore `loss_scale_state`; a state that this precision does not use is left aside."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if state is None or not engine.fp16_enabled() or scaler is None:
        return
    for name, value in state.items():
        setattr(scaler, name, value)
