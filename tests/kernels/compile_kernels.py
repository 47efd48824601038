"""Compiles the matmul kernels for GPUs that need not be here, and prints what became of each, a JSON object a line.

python compile_kernels.py [all]: one setting of each kernel, or all settings of all variants, for sm_90 and sm_80. A
process of its own, because in the interpreter, where tests on CPUs run, nothing can be compiled.
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from occult_train.kernels.gather_matmul import kernel as gather
from occult_train.kernels.grouped_matmul import outer, rows
from occult_train.kernels.merge_matmul import kernel as merge

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INTEGERS = ("ends_ptr", "index_ptr", "index_a_ptr", "index_b_ptr", "row_ptr")
FIXED = {"WIDEN": False, "EVEN_K": True, "BLOCK_L": 128}


@dataclass(frozen=True)
class Variant:
    """A kernel with some of its constants fixed; pointers that it does not use are None."""

    name: str
    module: Any
    kernel: Any
    constants: dict[str, Any]
    unused: tuple[str, ...] = ()
    floats: tuple[str, ...] = ()


NO_PAIR = ("x2_ptr", "w2_ptr")
NO_INDEX = ("index_a_ptr", "index_b_ptr")
PLAIN = {"NN": False, "DUAL": False, "GATHER": False}
VARIANTS = [
    Variant("nt", rows, rows.rows_kernel, PLAIN, (*NO_PAIR, "index_ptr")),
    Variant("nt, index", rows, rows.rows_kernel, PLAIN | {"GATHER": True}, NO_PAIR),
    Variant("nn", rows, rows.rows_kernel, PLAIN | {"NN": True}, (*NO_PAIR, "index_ptr")),
    Variant("nn, two pairs", rows, rows.rows_kernel, PLAIN | {"NN": True, "DUAL": True}, ("index_ptr",)),
    Variant("tn", outer, outer.outer_kernel, {"GATHER_A": False, "GATHER_B": False, "SEGMENTS": 1}, NO_INDEX),
    Variant("tn, segments", outer, outer.outer_kernel, {"GATHER_A": False, "GATHER_B": False, "SEGMENTS": 3}, NO_INDEX),
    Variant("tn, index", outer, outer.outer_kernel, {"GATHER_A": False, "GATHER_B": True, "SEGMENTS": 1}, NO_INDEX[:1]),
    Variant("swiglu", gather, gather.swiglu_kernel, {"KEEP": True, "GATHER": False}, ("index_ptr",)),
    Variant("swiglu, index", gather, gather.swiglu_kernel, {"KEEP": True, "GATHER": True}),
    Variant("swiglu, h alone", gather, gather.swiglu_kernel, {"KEEP": False, "GATHER": True}, ("a_ptr", "b_ptr")),
    Variant("merge", merge, merge.merge_kernel, {}, floats=("out_ptr", "weight_ptr")),
]


def compile_one(variant: Variant, setting: Any, capability: int) -> dict[str, Any]:
    """Name, setting and card, and what the machine code uses."""
    constants = FIXED | variant.constants | setting.kwargs | dict.fromkeys(variant.unused) | {"TMA": capability >= 90}
    names = variant.kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    types = {name: "constexpr" if name in constants else _type(name, variant) for name in names}
    aligned = [i for i, name in enumerate(names) if types[name].startswith("*") or re.match(r"[NKM]$|stride", name)]
    source = ASTSource(variant.kernel, types, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": setting.num_warps, "num_stages": setting.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    return {
        "name": variant.name,
        "capability": capability,
        "setting": str(setting),
        "resident": setting.kwargs["RESIDENT"],
        "threads": 32 * setting.num_warps,
        "shared": compiled.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "tma": ptx.count("cp.async.bulk.tensor"),
        **_usage(compiled.asm["cubin"]),
    }


def _type(name: str, variant: Variant) -> str:
    if not name.endswith("_ptr"):
        return "i32"
    if name in variant.floats:
        return "*fp32"
    return "*i32" if name in INTEGERS else "*bf16"


def _usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found is not None, report
    return {"registers": int(found[1]), "stack": int(found[2])}


ONE_EACH = ("nt", "nn, two pairs", "tn", "swiglu, index", "merge")


def main(every: bool) -> None:
    for variant in VARIANTS if every else [variant for variant in VARIANTS if variant.name in ONE_EACH]:
        for capability, settings in {90: variant.module.HOPPER, 80: variant.module.AMPERE}.items():
            for setting in settings if every else settings[:1]:
                print(json.dumps(compile_one(variant, setting, capability)), flush=True)


if __name__ == "__main__":
    main("all" in sys.argv[1:])
