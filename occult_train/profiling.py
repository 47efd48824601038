"""Routing statistics of a trained model over a corpus, without gradients, on any number of ranks."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from occult_train.checkpoint.placing import recorded
from occult_train.checkpoint.store import Checkpoint
from occult_train.config import Config, DataConfig
from occult_train.data.corpus import Corpus, open_corpus
from occult_train.data.loader import Samples, build_datasets
from occult_train.data.samples import GPTDataset
from occult_train.data.tokenizer import find_tokenizer, load_tokenizer
from occult_train.engine import PRECISIONS, choose_way, runtime
from occult_train.errors import DataError, UserError
from occult_train.inference import checkpoint_config, load_model
from occult_train.models.gpt import GPT
from occult_train.moe.collecting import DEFAULT_SAMPLE, RoutingCollector
from occult_train.moe.statistics import RoutingStatistics
from occult_train.parallel.grid import Grid

PARTS = ("valid", "train")


@dataclass(frozen=True)
class Wanted:
    """What to profile."""

    data: str = ""
    """A corpus; empty takes what the model was trained on."""
    part: str = "valid"
    """Of the corpus: `valid`, evenly spaced over the text, or `train`, in the order in which training reads it."""
    tokens: int = 1_000_000
    """At least so many, or all that the part has; 0 takes all."""
    sample: int = DEFAULT_SAMPLE
    """Whole choices to keep of each layer."""
    batch: int = 0
    """Sequences that a rank computes at a time; 0 takes the run's micro-batch."""
    similarity: bool = False
    """Accumulate inner products of router logits as well."""


class Profile:
    """A model of a checkpoint, and the sequences to count. Making one is collective.

    Args:
        checkpoint: what to profile.
        wanted: over which text.
        grid: this rank's place; experts are spread over its expert-parallel group.
        say: takes lines for the user.

    Raises:
        UserError: the corpus, the part, or the number of ranks does not fit.
    """

    def __init__(self, checkpoint: Checkpoint, wanted: Wanted, grid: Grid, say: Callable[[str], None]) -> None:
        if wanted.part not in PARTS:
            raise UserError(f"--part={wanted.part} is not one of {', '.join(PARTS)}")
        config = checkpoint_config(checkpoint)
        if config.model.num_experts % grid.expert_size:
            raise UserError(f"--expert={grid.expert_size} does not divide model.num_experts={config.model.num_experts}")
        self.checkpoint, self.wanted, self.grid = checkpoint, wanted, grid
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU
        self.batch = wanted.batch or config.train.micro_batch_size
        self.length = config.data.sequence_length
        self.samples, self.indices = choose_sequences(checkpoint, config, wanted)
        self.model = self._load(config, say)

    def _load(self, config: Config, say: Callable[[str], None]) -> GPT:
        if self.device == CPU or config.train.precision == "fp16":
            config.train.precision = "fp32"
        config.moe.prune = config.moe.prune.resolved(config.parallel.expert)  # for the devices of its training
        config.train.micro_batch_size, config.parallel.expert = self.batch, self.grid.expert_size
        moe = config.moe  # another way may work here, or be the fastest, than where it was trained
        moe.dispatcher = moe.backend = moe.matmul = moe.transport = moe.overlap = "auto"
        moe.placement = "contiguous"
        way, chosen = choose_way(config, self.grid)
        say(chosen)
        dtype = PRECISIONS[config.train.precision]
        placed = replace(runtime(config, self.grid, way), placements=recorded(self.checkpoint))
        return load_model(self.checkpoint, self.device, dtype, placed)

    @property
    def rounds(self) -> int:
        """Forwards that each rank takes part in."""
        return -(-len(self.indices) // (self.batch * self.grid.world_size))

    @torch.no_grad()
    def run(self, seed: int, follow: Callable[[Iterator[int]], Iterator[int]]) -> RoutingStatistics:
        """Count, and gather over ranks. Collective.

        Args:
            seed: of the sample.
            follow: is given the rounds and hands them on, for a progress bar.
        """
        layers, wanted = self.model.moe_layers(), self.wanted
        collector = RoutingCollector(layers, wanted.sample, seed, self.device, wanted.similarity)
        step = self.batch * self.grid.world_size
        for start in follow(iter(range(0, len(self.indices), step))):
            mine = self.indices[start + self.grid.rank : start + step : self.grid.world_size]
            # a rank that has run out takes part in the others' exchanges, uncounted
            with collector.counting() if mine else nullcontext():
                self._forward(mine or self.indices[:1])
        return collector.gather(self._provenance())

    def _forward(self, indices: list[int]) -> None:
        samples = [self.samples[index] for index in indices]
        names = samples[0].keys() - {"labels"}
        self.model(**{name: torch.stack([sample[name] for sample in samples]).to(self.device) for name in names})

    def _provenance(self) -> dict[str, Any]:
        data = checkpoint_config(self.checkpoint).data
        return {
            "source": "profile",
            "checkpoint": str(self.checkpoint.folder),
            "step": self.checkpoint.step,
            "data": self.wanted.data or data.path or data.blend,
            "part": self.wanted.part,
            "sequences": len(self.indices),
        }


CPU = torch.device("cpu")


def choose_sequences(checkpoint: Checkpoint, config: Config, wanted: Wanted) -> tuple[Samples, list[int]]:
    """The dataset, and which of its sequences to read.

    Raises:
        DataError: the corpus is missing, damaged, made with another tokenizer, or has no such part.
    """
    data = config.data
    if wanted.data:
        _check_tokenizer(open_corpus(wanted.data, setting="--data"), checkpoint)
        data = replace(data, path=wanted.data, blend={}, valid_path="", tokenizer="")
    train, valid = build_datasets(data, config.train.seed, vocab_size=config.model.vocab_size)
    count = -(-wanted.tokens // data.sequence_length)
    if wanted.part == "train":
        return train, list(range(_limit(count, train, data)))
    if not len(valid):
        raise DataError(f"--part=valid: {wanted.data or data.path} has no held-out text; take --part=train")
    count = min(count or len(valid), len(valid))
    return valid, [i * len(valid) // count for i in range(count)]


def _limit(count: int, train: Any, data: DataConfig) -> int:
    """At most one epoch. A blend has no end, so that it needs a number of tokens."""
    if isinstance(train, GPTDataset):
        return min(count or train.samples_per_epoch, train.samples_per_epoch)
    if not count:
        raise DataError(f"--tokens=0 takes all text, of which the blend {data.blend} has no end")
    return count


def _check_tokenizer(corpus: Corpus, checkpoint: Checkpoint) -> None:
    """Text in another tokenizer's ids would be noise to the model. Nothing is known of a bare pair's."""
    folder = checkpoint.folder.parent.parent
    own = find_tokenizer(folder)
    if own is None or not corpus.metadata:
        return
    if load_tokenizer(own).fingerprint() != corpus.metadata["tokenizer_sha256"]:
        raise DataError(f"--data={corpus.path} was made with another tokenizer than {own}, which the model knows")
