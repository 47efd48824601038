"""Whether transformers computes what we compute: logits and chosen experts of the same tokens."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from occult_train.errors import UserError
from occult_train.hub.files import read_settings
from occult_train.models import families
from occult_train.models.families import Family, family_named
from occult_train.models.gpt import GPT
from occult_train.moe.collaboration import RoutingCounter
from occult_train.moe.layer import MoELayer

LOGITS_TOLERANCE = 1e-4
"""‖ours − theirs‖/‖theirs‖ of fp32 logits; measured 1e-6 on the demo model."""
TIE = 1e-5
"""Experts whose scores are closer than this may swap places between two fp32 computations."""


@dataclass(frozen=True)
class Comparison:
    """What came of it."""

    logits: float
    """‖ours − theirs‖/‖theirs‖"""
    choices: int
    """Tokens times MoE layers."""
    ties: int
    """Choices that differ where scores are as good as equal: those of the last expert in and the first one out, or,
    with pruning, which goes by the order of experts, of any two in a row up to there."""
    differing: int
    """Choices that differ without that excuse."""

    def check(self, folder: Path) -> str:
        """A line that says how well they agree.

        Raises:
            UserError: they do not.
        """
        if not self.logits <= LOGITS_TOLERANCE:
            raise UserError(f"{folder} is not the same model: transformers' logits differ by {self.logits:.1e}")
        if self.differing:
            text = f"transformers chooses other experts in {self.differing} of {self.choices} cases"
            raise UserError(f"{folder} is not the same model: {text}")
        ties = f" but {self.ties} ties" if self.ties else ""
        return (
            f"transformers' logits agree with ours to {self.logits:.1e} (fp32, ‖ours − theirs‖/‖theirs‖), "
            f"and so do all {self.choices} choices of experts{ties}"
        )


@torch.no_grad()
def compare(ours: GPT, folder: Path) -> Comparison:
    """Compare on random tokens, in fp32. Both models are in memory.

    Args:
        ours: with weights rounded as the folder's are.
        folder: of the Hugging Face model.
    """
    theirs = load_theirs(folder)
    length = min(128, ours.config.max_position_embeddings)
    tokens = torch.randint(ours.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    seen: dict[str, list[Tensor]] = {"logits": [], "ours": [], "theirs": []}
    layers = list(ours.moe_layers().values())
    gates = [module for name, module in theirs.named_modules() if name.endswith("mlp.gate")]
    hooks = _watch([layer.router for layer in layers], lambda output: output, seen["logits"])
    hooks += _watch(gates, lambda output: output[-1], seen["theirs"])
    for layer in layers:
        layer.counters.append(_Choices(seen["ours"]))
    logits, expected = ours(tokens), theirs(tokens).logits
    for hook in hooks:
        hook.remove()
    for layer in layers:
        layer.counters.pop()
    error = float((logits - expected).norm() / expected.norm())
    differing = ties = choices = 0
    found = zip(layers, seen["logits"], seen["ours"], seen["theirs"], strict=True)
    for layer, logits_TE, own_TK, picked_TK in found:
        wrong = (own_TK.sort(dim=1).values != picked_TK.sort(dim=1).values).any(dim=1)
        close = _gap(layer, logits_TE) < TIE
        choices += len(wrong)
        ties += int((wrong & close).sum())
        differing += int((wrong & ~close).sum())
    return Comparison(error, choices, ties, differing)


def load_theirs(folder: Path) -> Any:
    """The model as transformers loads it, in fp32; with our class where it has none.

    Raises:
        UserError: transformers did not find all weights, or found more.
    """
    from transformers import AutoModelForCausalLM

    kind: Any = AutoModelForCausalLM
    # grouped products want widths of whole 16 bytes
    plain: dict[str, Any] = {"experts_implementation": "eager", "trust_remote_code": False}
    family = family_named(read_settings(folder, "config.json"))
    if isinstance(family, Family) and family.modelling:
        module = importlib.import_module(f"{families.__name__}.{family.modelling.removesuffix('.py')}")
        kind, plain = getattr(module, family.architecture), {}
    theirs, info = kind.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, use_safetensors=True, **plain
    )
    odd = [*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])]
    if odd:
        raise UserError(f"{folder}: transformers finds these tensors missing, unexpected or of another shape: {odd}")
    return theirs.eval()


def _watch(modules: list[nn.Module], pick: Callable[[Any], Tensor], into: list[Tensor]) -> list[Any]:
    return [m.register_forward_hook(lambda _module, _inputs, output: into.append(pick(output))) for m in modules]


class _Choices(RoutingCounter):
    """Keeps which experts a layer uses, in place of counting them."""

    def __init__(self, into: list[Tensor]) -> None:
        self.into = into

    def add(self, experts_TK: Tensor) -> None:
        """Take in a forward."""
        self.into.append(experts_TK)


def _gap(layer: MoELayer, logits_TE: Tensor) -> Tensor:
    """[T] the smallest difference of two scores that a token's choice hangs on; see `Comparison.ties`."""
    router = layer.router
    last = router.top_k + router.dual  # what the first of two choices takes leaves the second its second best
    scores_TE = logits_TE.softmax(dim=-1) + router.expert_bias
    best = scores_TE.topk(min(last + 1, scores_TE.shape[1]), dim=-1).values
    gaps = best[:, :-1] - best[:, 1:]
    if layer.pruner is None and not router.dual:
        gaps = gaps[:, last - 1 :]
    return gaps.min(dim=1).values if gaps.shape[1] else torch.ones(len(best))
