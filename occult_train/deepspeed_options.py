"""Which settings of the `deepspeed` section may be given, and why the others may not. Imports no DeepSpeed."""

from typing import Any

from occult_train.config import Config
from occult_train.errors import ConfigError

OWNED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_clipping": "train.gradient_clipping",
    "optimizer": "optimizer",
    "scheduler": "scheduler",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "data_types": "train.precision",
    "zero_optimization.stage": "zero.stage",
    "tensorboard": "monitor",
    "expert_parallel": "parallel.expert",
}
WRONG = {
    "zero_optimization.round_robin_gradients": "maps optimizer states to the wrong parameters when they are saved",
    "zero_optimization.reduce_scatter": "is true by default and must stay so with experts; leave it out",
    "zero_optimization.contiguous_gradients": "is true by default and must stay so with experts; leave it out",
    "zero_optimization.zero_hpz_partition_size": "is not supported by DeepSpeed with experts",
    "zero_optimization.zero_quantized_gradients": "is not supported by DeepSpeed with experts",
}
ALLOWED: dict[str, type] = {
    "steps_per_print": int,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "comms_logger": dict,
    "flops_profiler": dict,
    "csv_monitor": dict,
    "wandb": dict,
    "comet": dict,
    "communication_data_type": str,
    "zero_optimization.overlap_comm": bool,
    "zero_optimization.reduce_bucket_size": int,
    "zero_optimization.allgather_bucket_size": int,
    "zero_optimization.sub_group_size": int,
    "zero_optimization.stage3_prefetch_bucket_size": int,
    "zero_optimization.stage3_param_persistence_threshold": int,
    "zero_optimization.stage3_max_live_parameters": int,
    "zero_optimization.stage3_max_reuse_distance": int,
}
"""What their values are. DeepSpeed itself checks what the sections hold."""
KINDS = {int: "a whole number from 0 on, of 64 bits", bool: "true or false", dict: "a section", str: "text"}


def check_deepspeed(config: Config) -> None:
    """Refuse what would be wrong: settings of the `deepspeed` section, and stages in a precision they cannot hold.

    Raises:
        ConfigError: names the setting and why.
    """
    flat: dict[str, Any] = {}
    for key, value in config.deepspeed.items():
        if key == "zero_optimization" and isinstance(value, dict):
            flat |= {f"{key}.{inner}": v for inner, v in value.items()}
        else:
            flat[key] = value
    for key, value in flat.items():
        path = f"deepspeed.{key}={value}"
        if key in OWNED:
            raise ConfigError(f"{path} is set by {OWNED[key]}; use that")
        if key in WRONG:
            raise ConfigError(f"{path} {WRONG[key]}")
        if key not in ALLOWED:
            raise ConfigError(f"{path} has not been checked with expert parallelism and is refused")
        if not _is_a(ALLOWED[key], value):
            raise ConfigError(f"{path} must be {KINDS[ALLOWED[key]]}")
        if key == "steps_per_print" and value < 1:
            raise ConfigError(f"{path} must be at least 1")
    if config.zero.stage == 0 and config.train.precision != "fp32":
        raise ConfigError(
            f"zero.stage=0 with train.precision={config.train.precision}: DeepSpeed keeps no fp32 master weights with "
            "experts there; use zero.stage=1, or train.precision=fp32"
        )


def _is_a(kind: type, value: Any) -> bool:
    if kind is not int:
        return isinstance(value, kind)
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return whole and not isinstance(value, bool) and 0 <= value < 2**63
