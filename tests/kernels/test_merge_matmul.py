"""Down projection, weighted and added into rows with atomics, against fp64."""

from typing import Any

import pytest
import torch
import triton
from groups import COUNTS, check_close, ends_of, exact, normal
from torch import Tensor

from occult_train.kernels.merge_matmul import kernel, reference
from occult_train.testing import requires_gpu

pytestmark = pytest.mark.usefixtures("poisoned")


def make_inputs(
    counts: list[int], rows: int, ffn: int, hidden: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h, w2, ends, row and weight; row 0 gets none, so it must become zeros."""
    total = sum(counts)
    row = torch.randint(1, rows, (total,), generator=torch.Generator().manual_seed(9)).int().to(device)
    h, w2 = normal(total, ffn, device=device, dtype=dtype), normal(len(counts), hidden, ffn, device=device, seed=1)
    return h, w2.to(dtype), ends_of(counts, device), row, normal(total, device=device, seed=2).abs()


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("ffn, hidden", [(1, 1), (63, 100)])
def test_sums_of_weighted_rows(counts: list[int], ffn: int, hidden: int, device: torch.device) -> None:
    inputs = make_inputs(counts, 41, ffn, hidden, device)
    got = kernel.merge_matmul(*inputs, 41)
    check_close(got, reference.merge_matmul(*exact(*inputs), 41))
    assert not got[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_type_with_rows_apart(dtype: torch.dtype, device: torch.device) -> None:
    h, *others = make_inputs(COUNTS["ragged"], 41, 64, 100, device, dtype)
    apart = torch.cat([h, h], 1)[:, 64:]
    check_close(kernel.merge_matmul(apart, *others, 41), reference.merge_matmul(*exact(h, *others), 41))


def test_loads_through_descriptors(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "use_descriptors", lambda *tensors: True)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    inputs = make_inputs(COUNTS["ragged"], 41, 72, 100, device, dtype)
    check_close(kernel.merge_matmul(*inputs, 41), reference.merge_matmul(*exact(*inputs), 41))


def test_no_rows_to_add_into(device: torch.device) -> None:
    h, w2, ends, row, weight = make_inputs([0, 0], 2, 8, 8, device)
    assert kernel.merge_matmul(h, w2, ends, row, weight, 0).shape == (0, 8)


def _step(h: Tensor, w2: Tensor, ends: Tensor, row: Tensor, weight: Tensor) -> Tensor:
    return kernel.merge_matmul(h * 2, w2, ends, row, weight, 9).sin()


def test_compiles_whole(device: torch.device) -> None:
    inputs = make_inputs([2, 0, 3], 9, 8, 6, device)
    torch.testing.assert_close(torch.compile(_step, fullgraph=True, backend="aot_eager")(*inputs), _step(*inputs))


def test_the_operator_is_what_its_fake_says(device: torch.device) -> None:
    inputs = make_inputs([2, 0, 1], 9, 8, 4, device, torch.float16)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.occult.merge_matmul.default, (*inputs, 9), test_utils=checks)


H, W2, ENDS = torch.zeros(6, 8), torch.zeros(2, 4, 8), torch.tensor([2, 6], dtype=torch.int32)
ROW, WEIGHT = torch.zeros(6, dtype=torch.int32), torch.zeros(6)
WRONG: dict[str, tuple[tuple[Any, ...], str]] = {
    "width": ((H[:, :7], W2, ENDS, ROW, WEIGHT), r"h has shape \(6, 7\), \(None, 8\) fits"),
    "type": ((H, W2.half(), ENDS, ROW, WEIGHT), r"w2 is torch.float16, h is torch.float32"),
    "experts": ((H, W2, ENDS[:1], ROW, WEIGHT), r"ends have shape \(1,\), experts are 2"),
    "row": ((H, W2, ENDS, ROW[:5], WEIGHT), r"row has shape \(5,\), \(6,\) fits"),
    "row type": ((H, W2, ENDS, ROW.long(), WEIGHT), r"row is torch.int64"),
    "weights": ((H, W2, ENDS, ROW, WEIGHT[:5]), r"weights are torch.float32 \(5,\) on cpu; floating point \(6,\)"),
    "weight type": ((H, W2, ENDS, ROW, ROW), r"weights are torch.int32 \(6,\) on cpu"),
}


@pytest.mark.parametrize("args, message", WRONG.values(), ids=WRONG.keys())
def test_errors_name_both_values(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel.merge_matmul(*args, 9)


@pytest.mark.gpu
@requires_gpu
@pytest.mark.parametrize("loads", ["pointers", "descriptors"])
def test_every_setting_that_tuning_tries(loads: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if loads == "pointers":
        monkeypatch.setattr(kernel, "use_descriptors", lambda *tensors: False)
    inputs = make_inputs([0, 1, 4097, 64, 1000, 0, 129], 2000, 384, 640, device, torch.bfloat16)
    expected = reference.merge_matmul(*exact(*inputs), 2000)
    for choice in kernel.HOPPER if torch.cuda.get_device_capability() >= (9, 0) else kernel.AMPERE:
        monkeypatch.setattr(kernel, "merge_tuned", triton.autotune([choice], key=[])(kernel.merge_kernel))
        check_close(kernel.merge_matmul(*inputs, 2000), expected)
