"""The configuration of a run: dataclasses, and the one place where OmegaConf is used.

YAML files are merged left to right, then dotted overrides: `load(["base.yaml", "mine.yaml", "train.steps=100"])`.
Unknown keys, wrong types and impossible combinations raise ConfigError with the path and the values.
"""

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass, field
from functools import cache, reduce
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from occult_train.checkpoint.store import holds_checkpoint, open_checkpoint
from occult_train.errors import CheckpointError, ConfigError
from occult_train.hub.files import is_model
from occult_train.hub.folder import read_config
from occult_train.models.config import ModelConfig
from occult_train.moe.pruning import PruneConfig

DISPATCHERS = ("auto", "local", "all_to_all", "dedup", "hierarchical")
UNFUSED = ("all_to_all", "hierarchical")
"""Dispatchers that go with the reference backend alone."""
BALANCES = ("aux_loss", "bias", "none")
BACKENDS = ("auto", "reference", "fused")
MATMULS = ("auto", "library", "triton", "joint", "mixed")
TRANSPORTS = ("auto", "collective", "symmetric", "host")
SCOPES = ("micro_batch", "global_batch")
AUX_LOSSES = ("mean", "sum", "sequence", "pooled")
PRECISIONS = ("fp32", "bf16", "fp16")
SCHEDULES = ("cosine", "linear", "constant")
CHECKPOINTING = ("none", "selective")
PLACERS = ("hypergraph", "greedy", "contiguous")


@dataclass
class ReplaceConfig:
    """Placing the experts anew while training: they move with their optimizer states, and training goes on as if
    nothing had happened. Needs parallel.expert above 1."""

    interval: int = 0
    """Steps between re-placements; 0 for none."""
    window: int = 100
    """Steps before each one whose routing it is solved from."""
    method: str = "hypergraph"
    """As of `occult place`."""
    load_bound: float = 1.1
    """Largest load of a device over the mean, in the window. contiguous heeds none."""
    min_gain: float = 0.01
    """A layer's experts move only if its C_T is expected to fall by at least this share."""


@dataclass
class StatisticsConfig:
    """Counting how experts are chosen together, for `occult place`, over a window of training steps."""

    start: int = 0
    """Steps taken before the window."""
    steps: int = 0
    """Length of the window; 0 counts nothing. At its end statistics.safetensors lies in the output folder."""
    sample: int = 100_000
    """Tokens of each layer whose whole choice is kept, drawn uniformly over ranks and steps."""


CHOICES: dict[str, tuple[Any, ...]] = {
    "moe.dispatcher": DISPATCHERS,
    "moe.backend": BACKENDS,
    "moe.matmul": MATMULS,
    "moe.transport": TRANSPORTS,
    "moe.balance": BALANCES,
    "moe.aux_loss_scope": SCOPES,
    "moe.aux_loss": AUX_LOSSES,
    "train.precision": PRECISIONS,
    "train.activation_checkpointing": CHECKPOINTING,
    "scheduler.name": SCHEDULES,
    "zero.stage": (0, 1, 2, 3),
}
"""Settings that are one of a few values."""
LEAST: dict[float, tuple[str, ...]] = {
    1: (
        *("parallel.expert", "train.steps", "train.global_batch_size", "train.micro_batch_size"),
        *("data.sequence_length", "monitor.interval"),
        *("parallel.lost_after", "parallel.stuck_after"),
        *("moe.statistics.sample", "moe.replace.window", "moe.replace.load_bound"),
    ),
    0: (
        *("moe.aux_loss_coef", "moe.z_loss_coef", "moe.bias_update_rate", "moe.statistics.start"),
        *("moe.statistics.steps", "moe.replace.interval", "moe.replace.min_gain", "train.gradient_clipping"),
        *("optimizer.lr", "optimizer.eps", "optimizer.weight_decay", "scheduler.warmup_steps"),
        *("eval.interval", "eval.sequences", "checkpoint.interval", "checkpoint.keep", "monitor.histogram_interval"),
    ),
    0.001: ("checkpoint.buffer_gib",),
}
"""The least value of settings that are numbers."""
PATHS = (
    *("output", "model.from_pretrained", "moe.placement", "moe.prune.similarity", "checkpoint.resume"),
    *("data.path", "data.blend", "data.valid_path", "data.tokenizer"),
)
LONGEST_NAME = 240
"""Bytes of a name in a path, which leaves room for endings; file systems take 255."""


@dataclass
class MoEConfig:
    """How the experts are reached and kept balanced. None of it but balancing and pruning changes results."""

    dispatcher: str = "auto"
    """local (all experts on this rank), all_to_all (K copies of a token), dedup (one copy per device), hierarchical
    (one copy per node, fanned out there; for the reference backend and parallel.expert over several nodes), or auto:
    local when parallel.expert is 1, else dedup, or hierarchical where that can run and a model of the links expects it
    to be faster."""
    backend: str = "auto"
    """fused (Triton kernels; see moe/fused.py), reference (plain torch), or auto: fused on GPUs, else reference."""
    matmul: str = "auto"
    """Of the fused backend: library (torch's grouped product), triton, joint (triton, with gate, up and SwiGLU in one
    kernel), mixed (triton, the library for weight gradients), or auto: the fastest, measured at the start."""
    transport: str = "auto"
    """Of the fused backend: collective (all-to-all), symmetric (kernels write into the peers' memory; NVLink), host
    (through pinned memory; one host without peer access), or auto: the fastest, measured at the start."""
    overlap: str = "auto"
    """Of the fused backend: none (exchange, then compute), a number of chunks whose exchange and computing overlap, or
    auto: the fastest, measured at the start."""
    schedule: str = "auto"
    """Of shortcut-connected experts (model.scmoe): none (one step after the other); the number of the gap of the window
    in which experts are computed while their tokens travel beside its other computing, 0 before its first operator; or
    auto: none where nothing travels, else the best gap by times measured in the first steps."""
    placement: str = "auto"
    """Which expert lives in which slot: contiguous; a JSON file made by `occult place` or by hand; or auto, the
    placement of the checkpoint that is continued, without one contiguous. contiguous and a file count where they are
    new: a run that was last started with the same setting and the same file goes on with its checkpoint's placement,
    which moe.replace or `occult place --apply` may have changed since."""
    replace: ReplaceConfig = field(default_factory=ReplaceConfig)
    balance: str = "aux_loss"
    """aux_loss (Switch Transformer), bias (loss-free, a bias on the scores that choose) or none."""
    aux_loss_coef: float = 0.01
    aux_loss: str = "mean"
    """How layers' losses make one: mean, sum, sequence (each sequence by itself, summed over layers; DeepSeek-MoE) or
    pooled (all layers' tokens together, times K; OLMoE, Mixtral and Qwen as transformers defines it). An imported model
    brings its family's; moe/losses.py has the formulas."""
    aux_loss_scope: str = "micro_batch"
    """Loads are counted over a rank's micro_batch, or over the global_batch so far (all ranks, accumulated)."""
    z_loss_coef: float = 0.001
    bias_update_rate: float = 0.001
    """Step of the balancing bias after each optimizer step (balance=bias)."""
    statistics: StatisticsConfig = field(default_factory=StatisticsConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)


@dataclass
class ParallelConfig:
    """How ranks share the model. All ranks are data parallel; `expert` of them share one set of experts."""

    expert: int = 1
    """Expert-parallel size: ranks over which the experts of a layer are spread."""
    lost_after: float = 30.0
    """Seconds without a sign of life after which a rank counts as lost and the job ends."""
    stuck_after: float = 1800.0
    """Seconds after which a step that has not ended (evaluation and saving included) ends the job."""


@dataclass
class ZeroConfig:
    """DeepSpeed ZeRO."""

    stage: int = 1
    """0 nothing sharded, 1 optimizer states, 2 and gradients, 3 and parameters."""


@dataclass
class TrainConfig:
    """Length, batch and arithmetic of the run."""

    steps: int = 1000
    global_batch_size: int = 256
    """Sequences per optimizer step over all ranks. Accumulation follows from it: global / (micro * ranks)."""
    micro_batch_size: int = 1
    """Sequences a rank computes at a time."""
    precision: str = "bf16"
    """fp32, bf16 or fp16 (the last two with fp32 master weights)."""
    gradient_clipping: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    activation_checkpointing: str = "none"
    """selective recomputes attention, norms and experts in backward; routing and received rows are kept, so nothing is
    routed or sent twice."""
    cuda_graphs: bool = False
    """Replay attention, MLPs, shared experts of shortcut blocks and routers as CUDA graphs: a launch each, where the
    host cannot keep up with the GPU. What they keep for backward stays in memory of their own."""
    trainable: str = "all"
    """all; moe (routers, experts and shared experts); or a regular expression: parameters in whose name it is found,
    such as layers.3.moe.experts.w1. The others are frozen, in the type that the model computes in, and have no
    optimizer states; thawed later, theirs begin at zero."""
    seed: int = 1234


@dataclass
class OptimizerConfig:
    """AdamW. Matrices are decayed; norms and embeddings are not."""

    lr: float = 4e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1


@dataclass
class SchedulerConfig:
    """Learning rate over steps: linear warm-up, then the named decay to min_lr_ratio * lr at train.steps."""

    name: str = "cosine"
    warmup_steps: int = 100
    min_lr_ratio: float = 0.1


@dataclass
class DataConfig:
    """What is trained on."""

    path: str = ""
    """A folder made by `occult prepare`, or the prefix of a Megatron .bin/.idx pair."""
    blend: dict[str, float] = field(default_factory=dict)
    """Several corpora and their weights, in place of `path`."""
    valid_path: str = ""
    """Held-out text. Empty takes the corpus folder's own."""
    tokenizer: str = ""
    """Tokenizer file of a corpus that is a bare .bin/.idx pair."""
    sequence_length: int = 2048
    mask_documents: bool = False
    """Keep attention and positions inside a document."""


@dataclass
class EvalConfig:
    """Held-out loss during training."""

    interval: int = 500
    """Steps between evaluations; 0 evaluates at the end alone."""
    sequences: int = 256
    """Held-out sequences, the corpus's first; the same ones whatever the number of ranks. 0 takes all."""


@dataclass
class CheckpointConfig:
    """Saving and resuming."""

    interval: int = 500
    """Steps between checkpoints; 0 saves at the end alone."""
    keep: int = 2
    """Complete checkpoints to keep; older ones are removed. 0 keeps all."""
    background: bool = True
    """Training goes on once the state is copied to host memory; it is written meanwhile. false waits for the disk."""
    buffer_gib: float = 4.0
    """Host memory for that, of each rank, at most; training waits until what is above it has been written."""
    resume: str = "auto"
    """auto continues the latest checkpoint of the output folder, none starts anew, or the path of a checkpoint to start
    from. A path outside of the output folder counts until that folder has a checkpoint of its own."""


@dataclass
class MonitorConfig:
    """What is written down while training."""

    interval: int = 10
    """Steps between log lines and TensorBoard points; the first and the last step have one too."""
    histogram_interval: int = 100
    """Steps between expert-load histograms; 0 for none."""


@dataclass
class Config:
    """Everything a run needs."""

    output: str = "runs/default"
    """Folder of the run: checkpoints, TensorBoard, the resolved config, logs."""
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Further DeepSpeed settings (communication, offload). Those that this config owns or that break experts are
    refused."""

    def dispatcher(self) -> str:
        """The dispatcher with `auto` resolved for one node."""
        if self.moe.dispatcher != "auto":
            return self.moe.dispatcher
        return "local" if self.parallel.expert == 1 else "dedup"

    def accumulation_steps(self, ranks: int) -> int:
        """Micro-batches per optimizer step on `ranks` ranks.

        Raises:
            ConfigError: the global batch is not a multiple of micro_batch_size * ranks.
        """
        micro = self.train.micro_batch_size * ranks
        if self.train.global_batch_size % micro:
            raise ConfigError(
                f"train.global_batch_size={self.train.global_batch_size} is not divisible by "
                f"train.micro_batch_size={self.train.micro_batch_size} times {ranks} ranks"
            )
        return self.train.global_batch_size // micro

    def validate(self) -> None:
        """Raise ConfigError for values that no machine could run. `validate_ranks` checks what depends on ranks."""
        self.model.validate()
        for path, text in (("output", self.output), ("moe.placement", self.moe.placement)):
            if not text.strip():
                raise ConfigError(f"{path} is empty")
        for path, choices in CHOICES.items():
            _one_of(path, _get(self, path), choices)
        for least, paths in LEAST.items():
            for path in paths:
                _at_least(path, _get(self, path), least)
        self._validate_moe()
        self._validate_replace()
        self._validate_training()
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise ConfigError(
                f"data.sequence_length={self.data.sequence_length} is longer than "
                f"model.max_position_embeddings={self.model.max_position_embeddings}"
            )
        if self.data.path and self.data.blend:
            raise ConfigError(
                f"data.path={self.data.path} and data.blend={self.data.blend} cannot both be given; "
                "data.path= takes the first away"
            )

    def _validate_moe(self) -> None:
        model, moe, ranks = self.model, self.moe, self.parallel.expert
        if moe.overlap not in ("auto", "none") and not (moe.overlap.isdigit() and int(moe.overlap)):
            raise ConfigError(f"moe.overlap={moe.overlap} must be auto, none, or a number of chunks from 1 on")
        if moe.transport == "symmetric" and moe.overlap not in ("auto", "none"):
            raise ConfigError(
                f"moe.transport=symmetric moves all rows at once and cannot go with moe.overlap={moe.overlap}"
            )
        self._validate_schedule()
        if moe.backend == "fused" and moe.dispatcher in UNFUSED:
            raise ConfigError(
                f"moe.backend=fused sends one copy per device and cannot go with moe.dispatcher={moe.dispatcher}"
            )
        if moe.aux_loss == "sequence" and moe.aux_loss_scope == "global_batch":
            raise ConfigError(
                "moe.aux_loss=sequence balances each sequence by itself and cannot go with "
                "moe.aux_loss_scope=global_batch"
            )
        if model.num_experts % ranks:
            raise ConfigError(f"model.num_experts={model.num_experts} is not divisible by parallel.expert={ranks}")
        moe.prune.validate(model.num_experts, model.num_experts_per_tok, model.moe_layers, ranks)
        if moe.dispatcher == "local" and ranks > 1:
            raise ConfigError(f"moe.dispatcher=local needs parallel.expert=1, which is {ranks}")
        if moe.dispatcher == "hierarchical" and ranks < 4:
            raise ConfigError(
                f"moe.dispatcher=hierarchical needs parallel.expert={ranks} to span several nodes of several ranks"
            )

    def _validate_schedule(self) -> None:
        setting, scmoe = self.moe.schedule, self.model.scmoe
        if setting in ("auto", "none"):
            return
        if not (setting.isascii() and setting.isdecimal()):
            raise ConfigError(f"moe.schedule={setting} must be auto, none, or the number of a gap from 0 on")
        if scmoe.block != "scmoe":
            raise ConfigError(f"moe.schedule={setting} needs model.scmoe.block=scmoe, which is {scmoe.block}")
        if int(setting) > len(scmoe.window):
            raise ConfigError(
                f"moe.schedule={setting} is none of the gaps 0 to {len(scmoe.window)} around {', '.join(scmoe.window)} "
                f"of model.scmoe.position={scmoe.position}"
            )

    def _validate_training(self) -> None:
        try:
            re.compile(self.train.trainable)
        except re.error as error:
            raise ConfigError(
                f"train.trainable={self.train.trainable} is not all, moe or a regular expression: {error}"
            ) from None
        if not 0 <= self.train.seed < 2**63:
            raise ConfigError(f"train.seed={self.train.seed} must lie between 0 and {2**63 - 1}")
        if self.train.cuda_graphs:
            self._validate_graphs()
        if len(self.optimizer.betas) != 2 or not all(0 <= b < 1 for b in self.optimizer.betas):
            raise ConfigError(f"optimizer.betas={self.optimizer.betas} must be two numbers in [0, 1)")
        if not 0 <= self.scheduler.min_lr_ratio <= 1:
            raise ConfigError(f"scheduler.min_lr_ratio={self.scheduler.min_lr_ratio} must lie between 0 and 1")

    def _validate_graphs(self) -> None:
        checkpointing, stage = self.train.activation_checkpointing, self.zero.stage
        if checkpointing != "none":
            raise ConfigError(
                f"train.cuda_graphs=true keeps what train.activation_checkpointing={checkpointing} would compute again"
            )
        if stage == 3:
            raise ConfigError("train.cuda_graphs=true needs parameters that stay where they are, and zero.stage is 3")
        if self.data.mask_documents:
            raise ConfigError("train.cuda_graphs=true needs the same mask each time, and data.mask_documents is true")

    def _validate_replace(self) -> None:
        replace = self.moe.replace
        _one_of("moe.replace.method", replace.method, PLACERS)
        if replace.interval and replace.window > replace.interval:
            raise ConfigError(
                f"moe.replace.window={replace.window} is longer than moe.replace.interval={replace.interval}"
            )
        if replace.interval and self.parallel.expert == 1:
            raise ConfigError(f"moe.replace.interval={replace.interval} needs parallel.expert above 1, which is 1")

    def validate_ranks(self, ranks: int) -> None:
        """Raise ConfigError for what cannot run on `ranks` ranks."""
        if ranks % self.parallel.expert:
            raise ConfigError(f"{ranks} ranks are not divisible by parallel.expert={self.parallel.expert}")
        self.accumulation_steps(ranks)


def load(arguments: list[str]) -> Config:
    """Build a validated Config from YAML files and `path=value` overrides, later ones winning.

    Args:
        arguments: as typed, e.g. `["configs/demo.yaml", "train.steps=20"]`; files end in .yaml or .yml.
    """
    merged, parts = _schema(), []
    for argument in arguments:
        try:
            parts.append(_read(argument))
            merged = OmegaConf.merge(merged, parts[-1])
        except _MERGE_ERRORS as error:
            raise ConfigError(_explain(error, argument)) from None
    try:
        pretrained = _pretrained(merged.model.from_pretrained, parts)
        if pretrained is not None:
            merged = OmegaConf.merge(_schema(), pretrained.settings, *parts)
        config = OmegaConf.to_object(merged)
    except _MERGE_ERRORS as error:
        raise ConfigError(_explain(error, "")) from None
    assert isinstance(config, Config)
    _check_values(config)
    config.validate()
    if pretrained is not None:
        _check_pretrained(config.model, pretrained)
    return config


@cache
def _schema() -> Any:
    """The defaults with their types, made once. Merging copies them."""
    return OmegaConf.structured(Config)


class _Pretrained(NamedTuple):
    """What `model.from_pretrained` brings."""

    fields: dict[str, Any]
    """Of the model, that cannot be others."""
    settings: dict[str, Any]
    """Of the run, that can."""


def _pretrained(folder: str, parts: list[Any]) -> _Pretrained | None:
    """What model.from_pretrained brings. A run's config.yaml holds every setting of the model and asks no more."""
    sections = [part.get("model") for part in parts if OmegaConf.is_dict(part.get("model"))]
    given = {name for section in sections for name in section}
    asked = [OmegaConf.is_missing(s, "from_pretrained") for s in sections if "from_pretrained" in s.keys()]  # noqa: SIM118
    if asked and asked[-1]:  # merging takes ??? for nothing said
        raise ConfigError("model.from_pretrained has no value; name the folder of a Hugging Face model, or a run")
    if not folder or all(f.name in given for f in dataclasses.fields(ModelConfig)):
        return None
    try:
        if not is_model(Path(folder)) and holds_checkpoint(Path(folder)):
            return _own(Path(folder))
        hub = read_config(Path(folder))
        return _Pretrained(hub.fields, hub.settings())
    except (ConfigError, CheckpointError) as error:
        raise ConfigError(f"model.from_pretrained={folder}: {error}") from None
    except OSError as error:
        raise ConfigError(f"model.from_pretrained={folder}: {error.strerror}") from None


def _own(folder: Path) -> _Pretrained:
    """What a run of ours brings: the model, and how it was kept balanced."""
    ours = load([str(open_checkpoint(folder).folder / "config.yaml")])
    kept = ("balance", "aux_loss", "aux_loss_coef", "aux_loss_scope", "z_loss_coef", "bias_update_rate")
    shape = dataclasses.asdict(ours.model)
    del shape["from_pretrained"]
    fields = {name: getattr(ours.model, name) for name in shape}
    return _Pretrained(fields, {"model": shape, "moe": {name: getattr(ours.moe, name) for name in kept}})


def _check_pretrained(model: ModelConfig, pretrained: _Pretrained) -> None:
    for name, value in pretrained.fields.items():
        if getattr(model, name) != value:
            raise ConfigError(
                f"model.{name}={getattr(model, name)} was given, but model.from_pretrained={model.from_pretrained} "
                f"has {value}"
            )


_MERGE_ERRORS = (OmegaConfBaseException, TypeError, ValueError, OverflowError)
"""What OmegaConf raises for a user's values."""


def _check_values(section: Any, prefix: str = "") -> None:
    """Refuse numbers that are not finite or need more than 64 bits, text that no file's name can hold, and elements of
    the wrong type, which OmegaConf lets through in lists."""
    for f in dataclasses.fields(section):
        path, value = prefix + f.name, getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            _check_values(value, f"{path}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{path}={value} must be finite")
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ConfigError(f"{path}={value} needs more than 64 bits")
        elif isinstance(value, str):
            _check_text(path, value)
        elif get_origin(f.type) is list:
            for element in value:
                _check_element(f"{path}={value}", element, get_args(f.type)[0])
        elif get_origin(f.type) is dict and get_args(f.type)[1] is not Any:
            for key, element in value.items():
                if isinstance(key, str):
                    _check_text(path, key)
                _check_element(f"{path}.{key}={element}", element, get_args(f.type)[1])


def _check_text(path: str, text: str) -> None:
    if "\0" in text:
        raise ConfigError(f"{path}={text!r} holds a zero byte")
    if path in PATHS and any(len(name.encode(errors="replace")) > LONGEST_NAME for name in text.split("/")):
        raise ConfigError(f"{path}={text} names a file of more than {LONGEST_NAME} bytes")


def _check_element(text: str, element: Any, kind: type) -> None:
    right = isinstance(element, (int, float) if kind is float else kind) and not isinstance(element, bool)
    fits = right and (math.isfinite(element) if isinstance(element, float) else -(2**63) <= element < 2**63)
    if not fits:
        raise ConfigError(f"{text} must be of type {kind.__name__} and 64 bits, and {element} is not")


def to_yaml(config: Config) -> str:
    """The whole configuration, defaults included, as YAML that `load` reads back to the same Config."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _read(argument: str) -> Any:
    path = Path(argument)
    if argument.endswith((".yaml", ".yml")) and ("=" not in argument or path.is_file()):  # folders may hold a "="
        if not path.is_file():
            raise ConfigError(f"config file {argument} does not exist")
        try:
            loaded = OmegaConf.load(path)
        except OmegaConfBaseException:
            raise
        except Exception as error:  # yaml raises several unrelated classes
            raise ConfigError(f"config file {argument} is not valid YAML: {' '.join(str(error).split())}") from None
        if not OmegaConf.is_dict(loaded):
            raise ConfigError(f"config file {argument} must hold keys and values")
        return loaded
    key, equals, value = argument.partition("=")
    if not equals or not key:
        raise ConfigError(f"argument {argument!r} is neither a .yaml file nor an override like train.steps=100")
    try:
        # a shell takes the quotes of data.path='' away, and YAML reads nothing as null
        return OmegaConf.from_dotlist([argument if value else f"{key}=''"])
    except OmegaConfBaseException:
        raise
    except Exception as error:
        raise ConfigError(f"override {argument!r} is not valid: {' '.join(str(error).split())}") from None


def _explain(error: Exception, argument: str) -> str:
    """One line for an OmegaConf error: the path, what is wrong, and the nearest known key if one is close."""
    path = str(getattr(error, "full_key", "") or "").partition("[")[0] or argument.partition("=")[0]
    known = list(_paths(Config))
    message = " ".join(str(getattr(error, "msg", None) or error).split("full_key:")[0].split())
    if path.startswith("data.blend.") and "is not Optional" in message:
        return f"{path} has no weight; write data.blend='{{CORPUS: WEIGHT, ...}}', with a space after each colon"
    if any(path.startswith(f"{k}.") and not _is_section(k) for k in known):
        return f"{path}: {message}"
    if (
        path
        and path != argument
        and path not in known
        and not any(path.startswith(f"{k}.") for k in ("data.blend", "deepspeed"))
    ):
        near = difflib.get_close_matches(path, known, n=1, cutoff=0.6)
        leaf = path.rsplit(".", 1)[-1]
        near = near or [k for k in known if k.rsplit(".", 1)[-1] == leaf][:1]
        return f"unknown setting {path}" + (f"; did you mean {near[0]}?" if near else "")
    return f"{path}: {message}" if path else message


def _is_section(path: str) -> bool:
    return dataclasses.is_dataclass(_get(Config(), path))


def _paths(cls: type, prefix: str = "") -> list[str]:
    """Every dotted path of a config dataclass, sections included."""
    paths = []
    for f in dataclasses.fields(cls):
        paths.append(prefix + f.name)
        if isinstance(f.type, type) and dataclasses.is_dataclass(f.type):
            paths += _paths(f.type, f"{prefix}{f.name}.")
    return paths


def _get(config: Config, path: str) -> Any:
    return reduce(getattr, path.split("."), config)


def _one_of(path: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{path}={value} is not one of {', '.join(map(str, allowed))}{hint}")


def _at_least(path: str, value: float, low: float) -> None:
    if not value >= low:
        raise ConfigError(f"{path}={value} must be at least {low}")
