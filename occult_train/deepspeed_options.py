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
ALLOWED = {
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "comms_logger",
    "flops_profiler",
    "csv_monitor",
    "wandb",
    "comet",
    "communication_data_type",
    "zero_optimization.overlap_comm",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.sub_group_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance",
}


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
    if config.zero.stage == 0 and config.train.precision != "fp32":
        raise ConfigError(
            f"zero.stage=0 with train.precision={config.train.precision}: DeepSpeed keeps no fp32 master weights with "
            "experts there; use zero.stage=1, or train.precision=fp32"
        )
