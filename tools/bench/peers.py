"""Layers of other projects, filled with the problem's weights.

DeepSpeed is there anyway; the others are installed by whoever wants to compare with them, and where one is missing its
Unavailable says what failed to import. ScatterMoE is on no package index: build a wheel of github.com's
shawntan/scattermoe (0.3.0, Triton only). MegaBlocks 0.10 pins an old torch, so `pip install --no-deps
--no-build-isolation` it from source, with stanford-stk (Triton only) and grouped_gemm 0.3 (CUTLASS 3, in its source
package): nvcc builds one extension of each of the two others, megablocks_ops and grouped_gemm_backend.
"""

from typing import Any

import torch
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from deepspeed.moe.layer import MoE
from torch import Tensor, nn
from torch.nn import functional as F

from occult_train.moe.layer import SwiGLU
from occult_train.parallel.grid import Grid
from occult_train.tools.bench.problem import Problem
from occult_train.tools.bench.shapes import read_value
from occult_train.tools.bench.systems import Layer, Unavailable, normalised_top_k

TUNED = {"gate_up_impl": "fused", "combine_impl": "fused_weighted_sum", "async_split_plan": True}
"""AutoEP's options that its defaults leave off for the sake of other hardware or exactness."""


def build_autoep(problem: Problem, options: dict[str, str]) -> Layer:
    """DeepSpeed's AutoEP layer, made by its own conversion of a Hugging Face Qwen3-MoE model.

    Options are keys of DeepSpeed's `expert_parallel` section; `tuned=true` switches on what its defaults leave off.
    """
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    given: dict[str, Any] = {name: read_value(value) for name, value in options.items()}
    if given.pop("tuned", False):
        if problem.device.type != "cuda":
            raise Unavailable("AutoEP's fused combine and asynchronous plan run on a GPU only")
        given = TUNED | given
    shape = problem.shape
    config = Qwen3MoeConfig(
        vocab_size=8,
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
    )
    with torch.device(problem.device):
        model = Qwen3MoeForCausalLM(config).to(problem.dtype)
    block = model.model.layers[0].mlp
    with torch.no_grad():
        block.gate.weight.copy_(problem.router_EH)
        block.experts.gate_up_proj.copy_(torch.cat((problem.w1_EFH, problem.w3_EFH), dim=1))
        block.experts.down_proj.copy_(problem.w2_EHF)
    convert_to_autoep(model, problem.grid, given)
    layer = model.model.layers[0].mlp
    del block, model
    experts = layer.experts
    return Layer(
        forward=lambda x: layer(x[None])[0],
        parameters=list(layer.parameters()),
        router_gradient=lambda: layer.router.gate.weight.grad,
        expert_gradient=lambda i: (experts.w1.grad[i], experts.w2.grad[i], experts.w3.grad[i]),
        note=" ".join(f"{name}={value}" for name, value in given.items()),
    )


def convert_to_autoep(model: Any, grid: Grid, options: dict[str, Any]) -> None:
    """Replace the expert layers of a Hugging Face model by AutoEP's, as its engine does. Collective.

    Args:
        options: keys of DeepSpeed's `expert_parallel` section.
    """
    ranks = grid.expert_size
    convert = AutoEP(model, parse_autoep_config({"enabled": True, "autoep_size": ranks, **options}))
    for spec in convert.ep_parser():
        convert.replace_moe_layer(spec, ranks, grid.expert_rank)
    for block in model.model.layers if ranks > 1 else ():
        block.mlp.set_deepspeed_parallelism()


def build_deepspeed_moe(problem: Problem, options: dict[str, str]) -> Layer:
    """DeepSpeed's own MoE with capacities large enough that no token is dropped."""
    shape, ranks = problem.shape, problem.grid.expert_size
    with torch.device(problem.device):
        layer = MoE(
            shape.hidden,
            SwiGLU(shape.hidden, shape.intermediate),
            num_experts=shape.experts,
            ep_size=ranks,
            k=shape.top_k,
            min_capacity=0,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        ).to(problem.dtype)
    if ranks > 1:
        layer.set_deepspeed_parallelism()
    gate, experts = layer.deepspeed_moe.gate.wg, layer.deepspeed_moe.experts.deepspeed_experts
    stacks = zip(
        experts,
        *(stack[problem.local_experts] for stack in (problem.w1_EFH, problem.w2_EHF, problem.w3_EFH)),
        strict=True,
    )
    with torch.no_grad():
        gate.weight.copy_(problem.router_EH)
        for expert, w1, w2, w3 in stacks:
            expert.w1.weight.copy_(w1)
            expert.w2.weight.copy_(w2)
            expert.w3.weight.copy_(w3)
    return Layer(
        forward=lambda x: layer(x)[0],
        parameters=list(layer.parameters()),
        router_gradient=lambda: gate.weight.grad,
        expert_gradient=lambda i: (experts[i].w1.weight.grad, experts[i].w2.weight.grad, experts[i].w3.weight.grad),
    )


def build_scattermoe(problem: Problem, options: dict[str, str]) -> Layer:
    """ScatterMoE's gated MLP behind a plain router."""
    shape = problem.shape
    _only_single(problem, "ScatterMoE")
    try:
        from scattermoe.mlp import GLUMLP
    except Exception as error:
        raise Unavailable(f"scattermoe cannot be imported: {error!r}") from error
    with torch.device(problem.device):
        mlp = GLUMLP(shape.hidden, shape.intermediate, shape.experts, shape.top_k, activation=nn.SiLU())
        mlp = mlp.to(problem.dtype)
    router = nn.Parameter(problem.router_EH.clone())
    with torch.no_grad():
        mlp.experts.weight.copy_(torch.cat((problem.w3_EFH, problem.w1_EFH), dim=1))
        mlp.output_experts.weight.copy_(problem.w2_EHF)
    up = slice(0, shape.intermediate)
    gate = slice(shape.intermediate, None)

    def forward(x_TH: Tensor) -> Tensor:
        weights_TK, experts_TK = normalised_top_k(x_TH, router, shape.top_k)
        return mlp(x_TH, weights_TK.to(x_TH.dtype), experts_TK)

    return Layer(
        forward=forward,
        parameters=[router, *mlp.parameters()],
        router_gradient=lambda: router.grad,
        expert_gradient=lambda i: (
            mlp.experts.weight.grad[i, gate],
            mlp.output_experts.weight.grad[i],
            mlp.experts.weight.grad[i, up],
        ),
    )


def build_megablocks(problem: Problem, options: dict[str, str]) -> Layer:
    """MegaBlocks' dropless MoE with grouped matrix products."""
    shape, ranks = problem.shape, problem.grid.expert_size
    if problem.device.type != "cuda" or problem.dtype != torch.bfloat16:
        raise Unavailable("MegaBlocks' grouped products run in bfloat16 on a GPU only")
    try:
        import grouped_gemm  # noqa: F401  (megablocks hides why it cannot be imported)
        from megablocks.layers.arguments import Arguments
        from megablocks.layers.dmoe import dMoE
    except Exception as error:
        raise Unavailable(f"megablocks cannot be imported: {error!r}") from error
    layer = dMoE(
        Arguments(
            hidden_size=shape.hidden,
            ffn_hidden_size=shape.intermediate,
            bias=False,
            return_bias=False,
            activation_fn=F.silu,
            moe_num_experts=shape.experts,
            moe_top_k=shape.top_k,
            moe_normalize_expert_weights=1,
            moe_loss_weight=0,
            moe_expert_model_parallelism=ranks > 1,
            expert_parallel_group=problem.grid.expert_group if ranks > 1 else None,
            memory_optimized_mlp=True,
            mlp_type="glu",
            mlp_impl="grouped",
            fp16=False,
            bf16=True,
            device=problem.device,
        )
    )
    here, mlp, gate = problem.local_experts, layer.experts.mlp, layer.router.layer
    f = shape.intermediate
    with torch.no_grad():
        gate.weight.copy_(problem.router_EH)
        mlp.w1.copy_(problem.w1_EFH[here].flatten(0, 1))
        mlp.v1.copy_(problem.w3_EFH[here].flatten(0, 1))
        mlp.w2.copy_(problem.w2_EHF[here].transpose(1, 2).flatten(0, 1))

    def gradient(i: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = slice(i * f, (i + 1) * f)
        # it divides gradients of experts by the number of ranks
        return mlp.w1.grad[rows] * ranks, mlp.w2.grad[rows].T * ranks, mlp.v1.grad[rows] * ranks

    return Layer(
        forward=lambda x: layer(x[:, None])[:, 0],
        parameters=list(layer.parameters()),
        router_gradient=lambda: gate.weight.grad,
        expert_gradient=gradient,
        note="memory_optimized_mlp",
    )


def _only_single(problem: Problem, name: str) -> None:
    if problem.grid.expert_size > 1:
        raise Unavailable(f"{name} has no expert parallelism; it runs with one rank")
