"""Compiles the kernels that index, move and transform rows for GPUs that need not be here; a JSON object a line each.

A process of its own, because in the interpreter, where tests on CPUs run, nothing can be compiled.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import triton
from compile_kernels import _usage
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from occult_train.kernels.gating import kernel as gating
from occult_train.kernels.movers import kernel as movers
from occult_train.kernels.norm import kernel as norm
from occult_train.kernels.positions import kernel as positions
from occult_train.kernels.rotary import kernel as rotary
from occult_train.kernels.routing import kernel as routing
from occult_train.kernels.swiglu import kernel as swiglu

TYPES = {
    **dict.fromkeys(("x", "out", "own_rows", "y", "y2", "returned", "gate", "up", "grad", "both", "weighted"), "*bf16"),
    **dict.fromkeys(("d_gate", "d_up", "d_x", "beside"), "*bf16"),
    **dict.fromkeys(("weight", "own_weight", "weight_X", "scalar", "scalars", "cos", "sin", "similarity"), "*fp32"),
    **dict.fromkeys(("logits", "bias", "weights", "sums", "mean", "z", "d_weights", "d_mean", "d_z"), "*fp32"),
    **dict.fromkeys(("logit", "d_logit", "scale", "d_weight"), "*fp32"),
    **dict.fromkeys(("slots", "address", "experts", "loads", "weighed"), "*i64"),
    **dict.fromkeys(("position", "own", "send", "sends", "shift", "arrive", "words", "out_words"), "*i32"),
    **dict.fromkeys(("blocks", "counts", "base", "ends", "relative", "put", "back", "numbers"), "*i32"),
}
"""Of parameters by name; all others are int32 numbers."""
ODD = (
    "room",
    "offset",
    "own_capacity",
    "start",
    "capacity",
    "T",
    "S",
    "sign",
    "p_stride",
    "w_stride",
    "words_stride",
    "first_word",
    "devices",
)
"""Numbers of which the compiler may not know that they are multiples of 16."""


@dataclass(frozen=True)
class Variant:
    """A kernel with its constants; parameters in `none` are not given."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    none: tuple[str, ...] = ()
    warps: int = 4
    wide: bool = False
    """Moves rows, so all its rows go 16 bytes a thread."""


ROW = {"K": 8, "BH": 2048}
ALL = {"D": 0, **ROW}
LOCAL, PEERS = ("address", "shift", "arrive"), ("out", "out_words")
NO_EXTRAS = ("position", "slots", "weight")
PACK = {"D": 2, "KP": 8, "L": 32, "OWN": False, "OWN_WEIGHTS": False, **ROW}
OWN = {"OWN": True, "OWN_WEIGHTS": True}
NO_OWN = ("own", "own_rows", "own_weight", "weight_X")
BARE = NO_EXTRAS + NO_OWN
HERE = {"PEERS": False, "EXTRAS": False}
THERE = {"PEERS": True, "EXTRAS": True}
NORM = {"BN": 2, "BH": 1024}
STAGES = {"STAGES": norm.STAGES}
LONG = {"BN": 1, "BH": 4096, **STAGES}
SUM = {"KP": 8, **ROW}
ROUTE = {"E": 64, "K": 8, "EP": 64, "KP": 8, "B": 32}
MANY = {"E": 256, "K": 8, "EP": 256, "KP": 8, "B": 8}
PLAIN = {"PRUNE": False, "SIMILAR": False, "INHERIT": False}
UNPRUNED = ("slots", "similarity", "weighed")
BY_SCORE = {"PRUNE": True, "SIMILAR": False, "INHERIT": False, "NORMALISE": True}
BY_SIMILARITY = BY_SCORE | {"SIMILAR": True}
INHERITED = BY_SIMILARITY | {"INHERIT": True}
GIVEN = {"WEIGHTS": True, "MEAN": True, "Z": True}
LAYOUT = {"RANK": 1, "DP": 4, "LP": 16}
VARIANTS = [
    Variant("count", positions._count_kernel, {"K": 8, "E": 64, "D": 2, "EP": 64, "DP": 2, "B": 64}),
    Variant("layout", positions._layout_kernel, LAYOUT | {"C": 1, "E": 64, "D": 4, "SPLIT": False}),
    Variant("layout, chunks", positions._layout_kernel, LAYOUT | {"C": 4, "E": 60, "D": 4, "SPLIT": True}),
    Variant("positions", positions._positions_kernel, {"RANK": 1, "K": 8, "E": 64, "D": 2, "EP": 64, "DP": 2, "B": 64}),
    Variant(
        "positions, many experts",
        positions._positions_kernel,
        {"RANK": 1, "K": 6, "E": 256, "D": 32, "EP": 256, "DP": 32, "B": 16},
    ),
    Variant("expand", movers._expand_kernel, ALL | {"WEIGHTS": False}, ("weight", "weight_X", "arrive"), wide=True),
    Variant("expand, weights", movers._expand_kernel, ALL | {"WEIGHTS": True}, ("arrive",), wide=True),
    Variant("expand, some", movers._expand_kernel, ROW | {"D": 2, "WEIGHTS": False}, ("weight", "weight_X"), wide=True),
    Variant("share", movers._share_kernel, {"BN": 128}),
    Variant(
        "pack",
        movers._pack_kernel,
        PACK | {"PEERS": False, "EXTRAS": False},
        (*LOCAL[:2], *NO_EXTRAS, *NO_OWN),
        wide=True,
    ),
    Variant("pack, extras", movers._pack_kernel, PACK | HERE | {"EXTRAS": True}, LOCAL[:2] + NO_OWN, wide=True),
    Variant(
        "pack, peers",
        movers._pack_kernel,
        PACK | {"PEERS": True, "EXTRAS": False},
        PEERS + NO_EXTRAS + NO_OWN,
        wide=True,
    ),
    Variant("pack, peers, extras", movers._pack_kernel, PACK | THERE, PEERS + NO_OWN, wide=True),
    Variant("pack, peers, extras, own", movers._pack_kernel, PACK | OWN | THERE, PEERS, wide=True),
    Variant(
        "merge",
        movers._merge_kernel,
        SUM | {"D": 0, "TWO": False, "WEIGHTS": True, "PEERS": False, "EXTRAS": False},
        (*LOCAL, "scalar"),
        wide=True,
    ),
    Variant(
        "merge, peers",
        movers._merge_kernel,
        SUM | {"D": 2, "TWO": False, "WEIGHTS": True, "PEERS": True, "EXTRAS": False},
        (*PEERS, "scalar"),
        wide=True,
    ),
    Variant(
        "merge, two, scalars, peers",
        movers._merge_kernel,
        SUM | {"D": 2, "TWO": True, "WEIGHTS": False, "PEERS": True, "EXTRAS": True},
        (*PEERS, "weight"),
        wide=True,
    ),
    Variant(
        "combine",
        movers._combine_kernel,
        SUM | {"D": 2, "L": 1, "TWO": False, "WEIGHTS": True, "AWAY": True, "EXTRAS": False},
        ("scalar", "slots", "scalars"),
        wide=True,
    ),
    Variant(
        "combine, two, scalars",
        movers._combine_kernel,
        SUM | {"D": 2, "L": 32, "TWO": True, "WEIGHTS": False, "AWAY": True, "EXTRAS": True},
        ("weight",),
        wide=True,
    ),
    Variant(
        "combine, alone",
        movers._combine_kernel,
        SUM | {"D": 1, "L": 64, "TWO": True, "WEIGHTS": False, "AWAY": False, "EXTRAS": True},
        ("weight", "returned", "words"),
        wide=True,
    ),
    Variant("swiglu", swiglu._forward_kernel, {"BF": 1024}, warps=2, wide=True),
    Variant("swiglu, backward", swiglu._backward_kernel, {"BF": 1024}, warps=2, wide=True),
    Variant("swiglu, gradients", swiglu._gradients_kernel, {"BF": 1024}, warps=2, wide=True),
    Variant("gating", gating._forward_kernel, {"BH": 1024}, ("beside",), warps=2, wide=True),
    Variant("gating, added", gating._forward_kernel, {"BH": 1024}, warps=2, wide=True),
    Variant("gating, backward", gating._backward_kernel, {"BH": 1024}, warps=2, wide=True),
    Variant("norm", norm._forward_kernel, NORM | {"EPS": 1e-5}, wide=True),
    Variant("norm, backward", norm._backward_kernel, NORM | STAGES, wide=True),
    Variant("norm, backward, long", norm._backward_kernel, LONG, ("beside",), warps=8, wide=True),
    Variant("route", routing._forward_kernel, ROUTE | PLAIN | {"NORMALISE": True}, UNPRUNED),
    Variant("route, many experts", routing._forward_kernel, MANY | PLAIN | {"NORMALISE": False}, UNPRUNED),
    Variant("route, pruned", routing._forward_kernel, ROUTE | BY_SCORE, UNPRUNED[1:]),
    Variant("route, pruned, many experts", routing._forward_kernel, MANY | BY_SCORE, UNPRUNED[1:]),
    Variant("route, similarity", routing._forward_kernel, ROUTE | BY_SIMILARITY, UNPRUNED[2:]),
    Variant("route, similarity, many experts", routing._forward_kernel, MANY | BY_SIMILARITY, UNPRUNED[2:]),
    Variant("route, inherited", routing._forward_kernel, ROUTE | INHERITED),
    Variant("route, inherited, many experts", routing._forward_kernel, MANY | INHERITED),
    Variant("route, sums", routing._sum_kernel, {"E": 256, "VP": 1024}),
    Variant("route, backward", routing._backward_kernel, ROUTE | GIVEN | {"NORMALISE": True}),
    Variant("route, backward, many experts", routing._backward_kernel, MANY | GIVEN | {"NORMALISE": True}),
    Variant("rotary", rotary._rotate_kernel, {"N": 16, "NP": 16, "HALF": 64, "HP": 64}),
]
ACCESS = re.compile(r"\b(ld|st)\.global\S*?\.(v4\.[bu]32|(?:v2\.)?[bu]16)\b")


def compile_one(variant: Variant, capability: int) -> dict[str, Any]:
    """What the machine code uses, and how it reads and writes rows: 16 bytes at a time, or 2 or 4."""
    function = variant.kernel.function
    constants = variant.constants | dict.fromkeys(variant.none)
    types = {n: "constexpr" if n in constants else TYPES.get(n, "i32") for n in function.arg_names}
    aligned = [i for i, n in enumerate(function.arg_names) if types[n] != "constexpr" and n not in ODD]
    source = ASTSource(function, types, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": variant.warps})
    accesses = ACCESS.findall(compiled.asm["ptx"])
    return {
        "name": variant.name,
        "capability": capability,
        "moves rows": variant.wide,
        "wide loads": sum(kind == "ld" and width.startswith("v4") for kind, width in accesses),
        "wide stores": sum(kind == "st" and width.startswith("v4") for kind, width in accesses),
        "narrow": sum("16" in width for _, width in accesses),
        **_usage(compiled.asm["cubin"]),
    }


if __name__ == "__main__":
    for each in VARIANTS:
        for card in (90, 80):
            print(json.dumps(compile_one(each, card)), flush=True)
