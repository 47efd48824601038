"""Collaboration pruning of a model: its settings, and m of each layer and step.

E experts, K experts a token, G devices (groups of experts), m devices a token may use.
"""

from dataclasses import dataclass, field, replace
from itertools import pairwise

from torch import Tensor

from occult_train.errors import ConfigError
from occult_train.kernels.pruning.reference import Pruning

POLICIES = ("none", "router", "similarity")
SECTION = "moe.prune"


@dataclass
class PruneConfig:
    """Keeping each token's experts on few devices (Occult's collaboration pruning, arXiv 2505.13345): fewer rows cross
    the network, at a price in quality. In training, evaluation and generation alike."""

    policy: str = "none"
    """none; router: the experts of the highest scores on the first m devices that a token's experts live on; or
    similarity: each expert elsewhere gives its place to the most similar one there (see `similarity`)."""
    devices: int = 0
    """m, the devices that a token may use. 0 prunes only the layers that `layers` names."""
    groups: int = 0
    """Devices to prune for; the experts of device d are those in slots d*E/G to (d+1)*E/G - 1 of moe.placement. 0 takes
    parallel.expert; others need not equal the ranks, so that one GPU can train for eight to come."""
    inherit: bool = False
    """Whether a substitute takes the weight of the expert it stands in for; else its own probability."""
    layers: dict[int, int] = field(default_factory=dict)
    """m of single layers in place of `devices`, as in {0: 4, 15: 4}."""
    schedule: dict[int, int] = field(default_factory=dict)
    """Reaching m by degrees: {1000: 4, 2000: 2} lets tokens use 4 devices in the first 1000 steps, 2 up to step 2000,
    then m."""
    similarity: str = ""
    """File of `occult profile --similarity`. A run that continues with the same setting uses what its checkpoint holds,
    and does not need the file."""

    @property
    def active(self) -> bool:
        """Whether anything is pruned."""
        return self.policy != "none"

    def resolved(self, expert: int) -> "PruneConfig":
        """With `groups` a number, where the experts are spread over `expert` ranks."""
        return replace(self, groups=self.groups or expert)

    def limit(self, layer: int, step: int) -> int:
        """m of a layer after `step` optimizer steps, for `groups` resolved; G where nothing is pruned."""
        least = self.layers.get(layer, self.devices) or self.groups
        until = [m for end, m in sorted(self.schedule.items()) if step < end]
        return max([least, *until[:1]])

    def validate(self, experts: int, top_k: int, layers: list[int], expert: int) -> None:
        """Raise ConfigError for settings that cannot be.

        Args:
            layers: with experts.
            expert: parallel.expert.
        """
        if self.policy not in POLICIES:
            raise ConfigError(f"{SECTION}.policy={self.policy} is not one of {', '.join(POLICIES)}")
        for name, value in (("devices", self.devices), ("groups", self.groups)):
            if value < 0:
                raise ConfigError(f"{SECTION}.{name}={value} must be at least 0")
        if not self.active:
            for name, given in (("devices", self.devices), ("layers", self.layers), ("schedule", self.schedule)):
                if given:
                    raise ConfigError(f"{SECTION}.{name}={given} needs {SECTION}.policy, which is none")
            return
        self._validate_groups(experts, expert)
        resolved = self.resolved(expert)
        resolved._validate_limits(experts, top_k, layers)
        resolved._validate_schedule()
        if self.similarity and self.policy != "similarity":
            raise ConfigError(
                f"{SECTION}.similarity={self.similarity} needs {SECTION}.policy=similarity, which is {self.policy}"
            )

    def _validate_groups(self, experts: int, expert: int) -> None:
        groups = self.groups or expert
        if groups == 1:
            raise ConfigError(
                f"{SECTION}.policy={self.policy} needs {SECTION}.groups above 1, which is {self.groups}, with "
                f"parallel.expert={expert}"
            )
        if experts % groups:
            raise ConfigError(f"model.num_experts={experts} is not divisible by {SECTION}.groups={groups}")

    def _validate_limits(self, experts: int, top_k: int, layers: list[int]) -> None:
        if not (self.devices or self.layers):
            raise ConfigError(f"{SECTION}.policy={self.policy} needs {SECTION}.devices, which is 0")
        for layer in self.layers:
            if layer not in layers:
                raise ConfigError(
                    f"{SECTION}.layers={self.layers} names layer {layer}, the model has experts in {layers}"
                )
        named = [(f"{SECTION}.layers.{layer}={m}", m) for layer, m in self.layers.items()]
        named += [(f"{SECTION}.devices={self.devices}", self.devices)] * bool(self.devices)
        for name, m in named:
            self._validate_limit(name, m, experts, top_k)

    def _validate_limit(self, name: str, m: int, experts: int, top_k: int) -> None:
        if m < 1:
            raise ConfigError(f"{name} must be at least 1")
        if m > self.groups:
            raise ConfigError(f"{name} is more than the {self.groups} devices of {SECTION}.groups or parallel.expert")
        size = experts // self.groups
        if m * size < top_k:
            raise ConfigError(
                f"{name} leaves a token {m * size} experts ({m} times {size}), fewer than "
                f"model.num_experts_per_tok={top_k}"
            )

    def _validate_schedule(self) -> None:
        steps = sorted(self.schedule)
        limits = [self.schedule[step] for step in steps]
        if steps and steps[0] < 1:
            raise ConfigError(f"{SECTION}.schedule={self.schedule} names step {steps[0]}, which must be at least 1")
        if limits and limits[0] > self.groups:
            raise ConfigError(f"{SECTION}.schedule={self.schedule} has m={limits[0]}, of {self.groups} devices")
        for before, after in pairwise([*limits, self.devices]):
            if not before > after:
                raise ConfigError(f"{SECTION}.schedule={self.schedule} must lower m; it goes from {before} to {after}")


class Pruner:
    """Prunes one layer's choices as of a step.

    Args:
        config: resolved.
        layer: index in the model.
        experts: E.
    """

    def __init__(self, config: PruneConfig, layer: int, experts: int) -> None:
        self.config, self.layer, self.group_size = config, layer, experts // config.groups
        self.similarity_EE: Tensor | None = None
        """[E, E] fp32, for the similarity policy. Not a buffer: it is fp32 whatever the model's type."""
        self.set_step(0)

    def set_step(self, step: int) -> None:
        """Use m of `step`, the optimizer steps taken so far."""
        self.devices = self.config.limit(self.layer, step)

    def pruning(self, expert_to_slot: Tensor) -> Pruning | None:
        """For the router; None where a token may use all devices.

        Raises:
            RuntimeError: the similarity table was not set.
        """
        if self.devices >= self.config.groups:
            return None
        table = None
        if self.config.policy == "similarity":
            if self.similarity_EE is None:
                raise RuntimeError(f"layer {self.layer} is pruned by similarity, and has no table")
            table = self.similarity_EE = self.similarity_EE.to(expert_to_slot.device)
        return Pruning(expert_to_slot, self.group_size, self.devices, table, self.config.inherit)
