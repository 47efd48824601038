"""Continuing token sequences with a trained model: several at once, each as if it were alone.

B sequences of this rank, V vocabulary. Where experts are spread over ranks, every rank has sequences of its own, and
all ranks run the model equally often: one whose sequences have ended takes part until the last one has.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from occult_train.models.cache import KVCache
from occult_train.models.gpt import GPT
from occult_train.parallel.grid import Grid

OnToken = Callable[[int, int], None]
"""Takes a sequence's number among all ranks' and its next token."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Limits apply in this order, as in transformers."""

    temperature: float = 0.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest (and what is as likely as the last of them); 0 allows all."""
    top_p: float = 1.0
    """Only the likeliest that together have this probability."""
    seed: int = 0
    """Sequence i draws from its own generator, of seed + i, so that its company does not matter."""


@dataclass(frozen=True)
class Ending:
    """When a sequence ends."""

    length: int
    """Tokens to make at most."""
    stop: int | None = None
    """A token that ends a sequence and is not part of it."""
    vocab_size: int = 0
    """Ids from it on (a padded vocabulary's) are never chosen; 0 allows all."""


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """[B, V] fp32: what the next token is drawn from; 0 where the limits forbid it. For a temperature above 0."""
    scaled = logits_BV.float() / sampling.temperature
    if 0 < sampling.top_k < scaled.shape[1]:
        least = scaled.topk(sampling.top_k, dim=1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    probs = scaled.softmax(dim=1)
    if sampling.top_p < 1:
        ordered, order = probs.sort(dim=1, descending=True)
        beyond = ordered.cumsum(dim=1) - ordered >= sampling.top_p
        beyond[:, 0] = False
        probs = probs.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), 0.0)
        probs = probs / probs.sum(dim=1, keepdim=True)
    return probs


def pick(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor) -> Tensor:
    """The next tokens [B]; each row draws with its own number in [0, 1)."""
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=1)
    rising = probabilities(logits_BV, sampling).double().cumsum(dim=1)
    drawn = uniform_B.to(rising).unsqueeze(1) * rising[:, -1:]
    return torch.searchsorted(rising, drawn, right=True).squeeze(1)


@torch.no_grad()
def generate(
    model: GPT, prompts: Sequence[Sequence[int]], sampling: Sampling, ending: Ending, on_token: OnToken | None = None
) -> list[list[int]]:
    """Continue prompts. The last max_position_embeddings tokens of a sequence are what the model sees.

    Collective where the model's experts are spread over ranks; all ranks give the same arguments.

    Args:
        prompts: token ids of all ranks' sequences, at least one token each.
        on_token: called with each token as it is made, on the rank that makes it.

    Returns:
        the new tokens of every prompt, on every rank.
    """
    grid = model.runtime.grid
    ranks = grid.expert_size
    mine = list(range(grid.expert_rank, len(prompts), ranks))
    batch = _Batch(model, [list(prompts[i]) for i in mine] or [[0]], ending.length)
    uniform_BL = _uniform(sampling, mine or [0], ending.length)
    made: list[list[int]] = [[] for _ in mine]
    alive = set(range(len(mine)))
    for step in range(ending.length):
        if not _any_alive(bool(alive), model, grid):
            break
        logits_BV = batch.logits()[:, : ending.vocab_size or None]
        tokens = pick(logits_BV, sampling, uniform_BL[:, step]).tolist()
        batch.add(tokens)
        alive -= {row for row in alive if tokens[row] == ending.stop}
        for row in sorted(alive):
            made[row].append(tokens[row])
            if on_token is not None:
                on_token(mine[row], tokens[row])
    return _gathered(made, len(prompts), grid)


class _Batch:
    """Sequences of one rank, and what the model remembers of them."""

    def __init__(self, model: GPT, rows: list[list[int]], length: int) -> None:
        self.model, self.rows, self.length = model, rows, length
        self.cache: KVCache | None = None

    def logits(self) -> Tensor:
        """[B, V] of each sequence's next token. One run of the model, cached or not."""
        limit = self.model.config.max_position_embeddings
        longest = max(map(len, self.rows))
        if self.cache is not None and longest <= limit:
            new = [row[-1:] for row in self.rows]
        else:
            new = self._begin([row[-limit:] for row in self.rows], min(limit, longest + self.length))
        assert self.cache is not None
        ids = torch.tensor(new, device=self.cache.pad_B.device)
        return self.model.predict(ids, self.cache)[:, -1]

    def add(self, tokens: list[int]) -> None:
        """The next token of each sequence; one that has ended goes on, for nobody."""
        for row, token in zip(self.rows, tokens, strict=True):
            row.append(token)

    def _begin(self, rows: list[list[int]], columns: int) -> list[list[int]]:
        """A cache for what the model sees of the rows; returns them padded on the left."""
        longest = max(map(len, rows))
        pads = [longest - len(row) for row in rows]
        self.cache = KVCache(self.model.config, pads, columns, self.model.lm_head.weight)
        return [[0] * pad + row for pad, row in zip(pads, rows, strict=True)]


def _uniform(sampling: Sampling, sequences: list[int], length: int) -> Tensor:
    """[B, length] numbers in [0, 1), a generator a sequence."""
    generators = [torch.Generator().manual_seed(sampling.seed + i) for i in sequences]
    return torch.stack([torch.rand(length, generator=generator) for generator in generators])


def _any_alive(here: bool, model: GPT, grid: Grid) -> bool:
    """Whether a sequence goes on, here or on a rank that needs this one's experts."""
    if grid.expert_size == 1:
        return here
    alive = torch.tensor(here, dtype=torch.int32, device=model.lm_head.weight.device)
    dist.all_reduce(alive, op=dist.ReduceOp.MAX, group=grid.expert_group)
    return bool(alive)


def _gathered(made: list[list[int]], count: int, grid: Grid) -> list[list[int]]:
    """Every rank's sequences in the order of the prompts."""
    if grid.expert_size == 1:
        return made
    parts: list[list[list[int]]] = [[] for _ in range(grid.expert_size)]
    dist.all_gather_object(parts, made, group=grid.expert_group)
    return [parts[i % grid.expert_size][i // grid.expert_size] for i in range(count)]
