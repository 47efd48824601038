"""Whether transformers computes what we compute: logits and chosen experts of the same tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from occult_train.errors import UserError
from occult_train.hub.folder import read_config
from occult_train.models.gpt import GPT

LOGITS_TOLERANCE = 1e-4
"""‖ours − theirs‖/‖theirs‖ of fp32 logits; measured 1e-6 on the demo model."""
TIE = 1e-5
"""Experts whose probabilities are closer than this may swap places between two fp32 computations."""


@dataclass(frozen=True)
class Comparison:
    """What came of it."""

    logits: float
    """‖ours − theirs‖/‖theirs‖"""
    choices: int
    """Tokens times MoE layers."""
    ties: int
    """Choices that differ where the last expert in and the first one out are as good as equal."""
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
    seen: dict[str, list[Tensor]] = {"ours": [], "theirs": []}
    routers = [layer.router for layer in ours.moe_layers().values()]
    gates = [module for name, module in theirs.named_modules() if name.endswith("mlp.gate")]
    hooks = _watch(routers, lambda output: output, seen["ours"]) + _watch(gates, lambda o: o[-1], seen["theirs"])
    logits, expected = ours(tokens), theirs(tokens).logits
    for hook in hooks:
        hook.remove()
    error = float((logits - expected).norm() / expected.norm())
    differing = ties = choices = 0
    for router, logits_TE, picked_TK in zip(routers, seen["ours"], seen["theirs"], strict=True):
        own_TK = router.choose(logits_TE).experts_TK
        wrong = (own_TK.sort(dim=1).values != picked_TK.sort(dim=1).values).any(dim=1)
        close = _gap(logits_TE, own_TK.shape[1]) < TIE
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
    plain = {"experts_implementation": "eager"}  # grouped products want widths of whole 16 bytes
    if read_config(folder).family.modelling:
        from occult_train.models.families.modeling_deepseek import DeepseekForCausalLM as kind

        plain = {}
    theirs, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **plain)
    odd = [*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])]
    if odd:
        raise UserError(f"{folder}: transformers finds these tensors missing, unexpected or of another shape: {odd}")
    return theirs.eval()


def _watch(modules: list[nn.Module], pick: Callable[[Any], Tensor], into: list[Tensor]) -> list[Any]:
    return [m.register_forward_hook(lambda _module, _inputs, output: into.append(pick(output))) for m in modules]


def _gap(logits_TE: Tensor, top_k: int) -> Tensor:
    """How much more probable the last expert chosen is than the first one not chosen."""
    if top_k == logits_TE.shape[1]:
        return torch.ones(len(logits_TE))
    best = logits_TE.softmax(dim=-1).topk(top_k + 1, dim=-1).values
    return best[:, -2] - best[:, -1]
