"""Reading the routing trace that Megatron-Core writes (`--moe-routing-trace-path`).

The form, as of megatron/core/transformer/moe/router_trace.py: a folder with `router_trace_rank<N>.jsonl`, a JSON object
a line for each step, rank and MoE layer, among others with `block` (decoder, or mtp for the heads of multi-token
prediction), `layer` (from 0, the number in `decoder.layers.<N>`), `num_tokens`, `topk` and `top_indices`, a list of
`topk` experts for each token. A token of padding has −1 in all places.

What a trace does not tell: the number of experts; and, of a pipeline-parallel run, a layer's stage, within which it is
numbered, so that such a trace mixes layers up. Tokens that were traced twice (full recomputation) count twice.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from occult_train.errors import StatisticsError
from occult_train.moe.collaboration import LayerStatistics, RoutingCounter
from occult_train.moe.statistics import RoutingStatistics

PATTERN = "router_trace_rank*.jsonl"


def read_trace(path: Path, experts: int, sample: int, seed: int = 0) -> RoutingStatistics:
    """Statistics of a trace's decoder layers.

    Args:
        path: the folder, or one file of it.
        experts: of a layer.
        sample: tokens of each layer whose whole choice is kept.
        seed: of the sample.

    Raises:
        StatisticsError: nothing there, a line is damaged, or the choices are not K distinct experts of that many.
    """
    counters: dict[int, RoutingCounter] = {}
    top_k = 0
    for where, record in _records(path):
        try:
            if record.get("block", "decoder") != "decoder" or "mtp_idx" in record:
                continue
            layer, chosen_TK = int(record["layer"]), torch.tensor(record["top_indices"], dtype=torch.int64)
            tokens, named = int(record["num_tokens"]), int(record["topk"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise StatisticsError(f"trace {where} is not a record of routing: {error!r}") from None
        top_k = top_k or named
        experts_TK = _checked(where, chosen_TK, tokens, top_k, experts)
        counters.setdefault(layer, RoutingCounter(experts, top_k, sample, (seed,))).add(experts_TK)
    if not counters:
        raise StatisticsError(f"trace {path} holds no record of a decoder layer")
    cpu = torch.device("cpu")
    layers = {i: LayerStatistics.of(c.tokens, c.pairs(cpu), c.sets(cpu)) for i, c in sorted(counters.items())}
    return RoutingStatistics(experts, top_k, layers, {"source": "Megatron-Core trace", "path": str(path)})


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line's place and content; of a file that its writer could not finish, without the line that was cut off."""
    files = sorted(path.glob(PATTERN)) if path.is_dir() else [path]
    if not files:
        raise StatisticsError(f"trace {path} holds no {PATTERN}")
    for file in files:
        try:
            with file.open() as lines:
                for number, line in enumerate(lines, start=1):
                    yield from _parse(f"{file}:{number}", line)
        except OSError as error:
            raise StatisticsError(f"trace {file} cannot be read: {error.strerror}") from None


def _parse(where: str, line: str) -> Iterator[tuple[str, Any]]:
    try:
        yield where, json.loads(line)
    except ValueError:
        if line.endswith("\n"):
            raise StatisticsError(f"trace {where} is damaged: it is not JSON") from None


def _checked(where: str, chosen_TK: Tensor, tokens: int, top_k: int, experts: int) -> Tensor:
    """The choices without padding."""
    if not 1 <= top_k <= experts or tokens < 0:
        raise StatisticsError(f"trace {where} has {tokens} tokens of {top_k} experts each, of {experts} (--experts)")
    if not tokens == len(chosen_TK) == 0 and tuple(chosen_TK.shape) != (tokens, top_k):
        raise StatisticsError(
            f"trace {where} has choices {list(chosen_TK.shape)}, not {[tokens, top_k]} as the rest says"
        )
    chosen_TK = chosen_TK.view(tokens, top_k)
    real_TK = chosen_TK[(chosen_TK != -1).any(dim=1)]
    if bool(((real_TK < 0) | (real_TK >= experts)).any()):
        wrong = real_TK[(real_TK < 0) | (real_TK >= experts)][0]
        raise StatisticsError(f"trace {where} names expert {wrong}, of {experts} experts (--experts)")
    if bool((real_TK.sort(dim=1).values.diff(dim=1) == 0).any()):
        raise StatisticsError(f"trace {where} has a token that chose an expert twice")
    return real_TK
