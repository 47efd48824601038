"""The matmul kernels compile for GPUs with and without tensor memory accelerator, onto their tensor cores."""

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


def compile_kernels(*args: str) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("compile_kernels.py")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    run = subprocess.run([sys.executable, script, *args], capture_output=True, text=True, env=environment, check=False)
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
