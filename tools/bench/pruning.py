"""What pruning adds to the routing kernel on one GPU: each way checked against plain torch, then timed.

python -m occult_train.tools.bench.pruning [--tokens 8192]. Time is the GPU's, replayed as a CUDA graph, without the
host's launches. The limit it is held to is 3 % of a layer's time.
"""

import argparse

import torch
import triton
from torch import Tensor

from occult_train.kernels.pruning.reference import Pruning
from occult_train.kernels.routing import autograd, kernel, reference

SHAPES = [(64, 8, 8, 1), (64, 8, 8, 2), (256, 8, 32, 1), (256, 8, 32, 4)]
"""Experts, experts a token, devices, m."""


def microseconds(function: object) -> float:
    """Median of the GPU's time."""
    return 1000 * float(triton.testing.do_bench_cudagraph(function, rep=20, return_mode="median"))


def check(logits: Tensor, bias: Tensor, top_k: int, pruning: Pruning | None) -> None:
    """Raise ArithmeticError if the kernel chooses other experts than plain torch, but for ties within rounding."""
    got = kernel.route(logits, bias, top_k, True, pruning).experts_TK
    right = reference.route(logits, bias, top_k, True, pruning).experts_TK
    differ = int((got != right).any(dim=1).sum())
    if differ > len(logits) / 1000:
        raise ArithmeticError(f"{differ} of {len(logits)} tokens are routed otherwise")


def measure(tokens: int, experts: int, top_k: int, pruning: Pruning | None) -> str:
    """Times of one way."""
    generator = torch.Generator("cuda").manual_seed(0)
    logits, bias = torch.randn(tokens, experts, device="cuda", generator=generator), torch.zeros(experts, device="cuda")
    check(logits, bias, top_k, pruning)
    leaf, dy = logits.clone().requires_grad_(), torch.rand(tokens, top_k, device="cuda", generator=generator)
    forward = microseconds(lambda: kernel.route(logits, bias, top_k, True, pruning))
    plain = microseconds(lambda: reference.route(logits, bias, top_k, True, pruning))
    both = microseconds(
        lambda: torch.autograd.grad(autograd.route(leaf, bias, top_k, True, pruning).weights_TK, leaf, dy)
    )
    return f"forward {forward:7.1f}  with backward {both:7.1f}  plain torch, forward {plain:7.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    tokens = parser.parse_args().tokens
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {tokens} tokens; us"
    )
    for experts, top_k, groups, devices in SHAPES:
        similarity = torch.rand(experts, experts, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
        by_score = Pruning(torch.arange(experts, device="cuda"), experts // groups, devices)
        by_similarity = by_score._replace(similarity_EE=similarity)
        ways = {
            "unpruned": None,
            "router": by_score,
            "similarity": by_similarity,
            "inherited": by_similarity._replace(inherit=True),
        }
        for name, pruning in ways.items():
            times = measure(tokens, experts, top_k, pruning)
            print(f"E={experts} K={top_k} D={groups} m={devices} {name:10} {times}", flush=True)


if __name__ == "__main__":
    main()
