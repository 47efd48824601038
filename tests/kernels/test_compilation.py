"""Kernels compile for GPUs that are not here: matmuls onto their tensor cores, movers of rows with wide accesses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHARED = {90: 227 * 1024, 80: 163 * 1024}
"""Bytes of shared memory that one program can have; all programs on a multiprocessor can have 1 KiB more together."""
REGISTERS = 65536
STACK = {90: 16, 80: 64}
"""Bytes a thread may spill: a few addresses, none of a tile's values."""


def compile_kernels(*args: str, script: str = "compile_kernels.py") -> list[dict[str, Any]]:
    path = Path(__file__).with_name(script)
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    run = subprocess.run([sys.executable, path, *args], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(found: dict[str, Any]) -> None:
    capability, resident = found["capability"], found["resident"]
    assert found["stack"] <= STACK[capability], found
    assert found["shared"] <= SHARED[capability], found
    assert resident * (found["shared"] + 1024) <= SHARED[capability] + 1024, found
    assert resident * found["registers"] * found["threads"] <= REGISTERS, found
    if capability == 90:
        assert found["wgmma"] > 0, found
        assert found["tma"] > 0, found
        assert found["mma"] == 0, found
    else:
        assert found["mma"] > 0, found


def test_one_setting_of_each_kernel() -> None:
    found = compile_kernels()
    assert len(found) == 10
    for kernel in found:
        check(kernel)


@pytest.mark.slow
def test_all_settings() -> None:
    found = compile_kernels("all")
    assert {kernel["capability"] for kernel in found} == {80, 90}
    for kernel in found:
        check(kernel)


def test_row_kernels_access_16_bytes_at_a_time_and_spill_nothing() -> None:
    """Also where rows are written into other devices' memory, whose addresses the compiler does not see."""
    found = compile_kernels(script="compile_rows.py")
    assert {kernel["capability"] for kernel in found} == {80, 90}
    for kernel in found:
        assert kernel["stack"] == 0, kernel
        assert kernel["narrow"] == 0, kernel
        if kernel["moves rows"]:
            assert kernel["wide loads"] >= 2, kernel
            assert kernel["wide stores"] >= 2, kernel
    stores = {kernel["name"]: kernel["wide stores"] for kernel in found if kernel["capability"] == 90}
    assert stores["expand"] == 2 * 8  # 4 warps move 2048 values of 2 bytes, to 8 places
    assert stores["pack"] == stores["pack, peers"] == 2 * 2
    assert stores["merge"] == stores["merge, peers"] == 2
