"""Matmuls over rows grouped by expert against fp64, in Triton and over torch's library."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from groups import COUNTS, check_close, ends_of, exact, normal
from torch import Tensor

from occult_train.kernels.grouped_matmul import kernel, library, outer, reference, rows
from occult_train.testing import requires_gpu

pytestmark = pytest.mark.usefixtures("poisoned")
each_counts = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
each_type = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
each_size = pytest.mark.parametrize("k, n", [(1, 1), (63, 100), (128, 64)])


@pytest.fixture
def descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels load through descriptors wherever their kind of card would, in the interpreter too."""
    monkeypatch.setattr(kernel, "use_descriptors", lambda *tensors: any(tensor is not None for tensor in tensors))


@each_counts
@each_size
def test_nt(counts: list[int], k: int, n: int, device: torch.device) -> None:
    x, w = normal(sum(counts), k, device=device), normal(len(counts), n, k, device=device, seed=1)
    ends = ends_of(counts, device)
    check_close(kernel.nt(x, w, ends), reference.nt(*exact(x, w, ends)))


@each_counts
@each_size
def test_nn(counts: list[int], k: int, n: int, device: torch.device) -> None:
    g, w = normal(sum(counts), k, device=device), normal(len(counts), k, n, device=device, seed=1)
    ends = ends_of(counts, device)
    check_close(kernel.nn(g, w, ends), reference.nn(*exact(g, w, ends)))


@each_counts
@each_size
def test_tn(counts: list[int], k: int, n: int, device: torch.device) -> None:
    a, b = normal(sum(counts), k, device=device), normal(sum(counts), n, device=device, seed=1)
    ends = ends_of(counts, device)
    got = kernel.tn(a, b, ends)
    check_close(got, reference.tn(*exact(a, b, ends)))
    assert not got[torch.tensor(counts) == 0].any()


@pytest.mark.parametrize("loads", ["pointers", "descriptors"])
def test_tn_over_segments(loads: str, device: torch.device, request: pytest.FixtureRequest) -> None:
    if loads == "descriptors":
        request.getfixturevalue("descriptors")
    counts = [5, 0, 65, 0, 0, 3, 40, 1, 0, 70, 0, 2]
    a, b = normal(sum(counts), 24, device=device), normal(sum(counts), 40, device=device, seed=1)
    ends = ends_of(counts, device)
    got = kernel.tn(a, b, ends, segments=3)
    check_close(got, reference.tn(*exact(a, b, ends), segments=3))
    parts = reference.tn(*exact(a, b, ends)).view(3, 4, 24, 40)
    check_close(got, parts[0] + parts[1] + parts[2])
    with pytest.raises(ValueError, match="12 ends are not those of 5 segments"):
        kernel.tn(a, b, ends, segments=5)


@each_type
def test_each_type_with_rows_apart_and_a_second_pair(dtype: torch.dtype, device: torch.device) -> None:
    counts = COUNTS["ragged"]
    both = normal(sum(counts), 140, device=device, dtype=dtype)
    left, right = both[:, :70], both[:, 70:]
    w, w2 = (normal(len(counts), 70, 72, device=device, dtype=dtype, seed=seed) for seed in (1, 2))
    ends = ends_of(counts, device)
    check_close(kernel.nn(left, w, ends, right, w2), reference.nn(*exact(left, w, ends, right, w2)))
    check_close(kernel.nt(right, w.mT.contiguous(), ends), reference.nt(*exact(right, w.mT, ends)))
    check_close(kernel.tn(left, right, ends), reference.tn(*exact(left, right, ends)))


@pytest.mark.parametrize("counts", [COUNTS["none"], COUNTS["ragged"]], ids=["none", "ragged"])
def test_rows_through_an_index(counts: list[int], device: torch.device) -> None:
    x, other = normal(50, 100, device=device), normal(sum(counts), 40, device=device, seed=1)
    w = normal(len(counts), 40, 100, device=device, seed=2)
    index = torch.randint(0, 50, (sum(counts),), generator=torch.Generator().manual_seed(3)).int().to(device)
    ends, gathered = ends_of(counts, device), x[index.long()]
    check_close(kernel.nt(x, w, ends, index), reference.nt(*exact(gathered, w, ends)))
    check_close(kernel.tn(x, other, ends, index_a_X=index), reference.tn(*exact(gathered, other, ends)))
    check_close(kernel.tn(other, x, ends, index_b_X=index), reference.tn(*exact(other, gathered, ends)))
    check_close(kernel.tn(x, x, ends, index, index), reference.tn(*exact(gathered, gathered, ends)))


@pytest.mark.usefixtures("descriptors")
def test_loads_through_descriptors(device: torch.device) -> None:
    counts = COUNTS["ragged"]
    total, experts, ends = sum(counts), len(counts), ends_of(counts, device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    both = normal(total, 256, device=device, dtype=dtype)
    left, right = both[:, :128], both[:, 128:]
    w, w2 = (normal(experts, 128, 72, device=device, dtype=dtype, seed=seed) for seed in (1, 2))
    index = torch.randperm(total, generator=torch.Generator().manual_seed(3)).int().to(device)
    gathered, odd = left[index.long()], left[:, :72].contiguous()
    check_close(kernel.nn(left, w, ends), reference.nn(*exact(left, w, ends)))
    check_close(kernel.nn(left, w, ends, right, w2), reference.nn(*exact(left, w, ends, right, w2)))
    check_close(kernel.nt(odd, w, ends), reference.nt(*exact(odd, w, ends)))
    check_close(kernel.nt(left, w.mT.contiguous(), ends, index), reference.nt(*exact(gathered, w.mT, ends)))
    check_close(kernel.tn(left, odd, ends), reference.tn(*exact(left, odd, ends)))
    check_close(kernel.tn(left, odd, ends, index_a_X=index), reference.tn(*exact(gathered, odd, ends)))
    check_close(kernel.tn(odd, left, ends, index_b_X=index), reference.tn(*exact(odd, gathered, ends)))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("loads", ["pointers", "descriptors"])
def test_an_expert_with_infinite_values_leaves_its_neighbours_alone(
    loads: str, device: torch.device, request: pytest.FixtureRequest
) -> None:
    if loads == "descriptors":
        request.getfixturevalue("descriptors")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    ends = ends_of([30, 5, 40], device)
    x, w = normal(75, 64, device=device, dtype=dtype), normal(3, 64, 72, device=device, dtype=dtype, seed=1)
    x[30:35], w[1] = float("inf"), float("nan")
    others = torch.tensor([True] * 30 + [False] * 5 + [True] * 40)
    for got in (kernel.nt(x, w.mT.contiguous(), ends), kernel.nn(x, w, ends)):
        assert got[others.to(device)].isfinite().all()
    products = kernel.tn(x, x, ends)
    assert products[[0, 2]].isfinite().all()
    assert not products[1].isfinite().any()


def test_offsets_beyond_32_bits(device: torch.device) -> None:
    stride = 2**30 + 8
    storage = torch.UntypedStorage(2 * (2 * stride + 64), device=device)  # 4 GiB, of which three rows are touched
    wide = torch.tensor([], dtype=torch.float16, device=device).set_(storage, 0, (3, 64), (stride, 1))
    wide.copy_(normal(3, 64, device=device))
    w, ends = normal(2, 64, 8, device=device, dtype=torch.float16, seed=1), ends_of([1, 2], device)
    check_close(kernel.nn(wide, w, ends), reference.nn(*exact(wide, w, ends)))
    check_close(kernel.tn(wide, wide, ends), reference.tn(*exact(wide, wide, ends)))


@each_counts
def test_library(counts: list[int], device: torch.device) -> None:
    a, b = (normal(sum(counts), 64, device=device, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    w, w2 = (normal(len(counts), 64, 128, device=device, dtype=torch.bfloat16, seed=seed) for seed in (2, 3))
    ends = ends_of(counts, device)
    check_close(library.nn(a, w, ends), reference.nn(*exact(a, w, ends)))
    # the two products are rounded before their sum: measured 4.7e-3
    check_close(library.nn(a, w, ends, b, w2), reference.nn(*exact(a, w, ends, b, w2)), bound=1.2e-2)
    check_close(library.nt(a, w.mT.contiguous(), ends), reference.nt(*exact(a, w.mT, ends)))
    check_close(library.tn(a, b, ends), reference.tn(*exact(a, b, ends)))


def test_zeros_for_experts_without_rows_and_nothing_else(device: torch.device) -> None:
    counts = [0, 2, 0, 0, 7, 0]
    out = torch.empty(6, 3, 50_000, device=device, dtype=torch.bfloat16)
    library.zero_empty(out, ends_of(counts, device))
    for product, count in zip(out, counts, strict=True):
        assert product.isnan().all() if count else not product.any()


@pytest.mark.parametrize(
    "dtype, device_type, capability, widths, experts, expected",
    [
        (torch.bfloat16, "cuda", (9, 0), (2048, 768), 64, True),
        (torch.float16, "cuda", (9, 0), (2048, 768), 64, False),
        (torch.bfloat16, "cpu", (9, 0), (2048, 768), 64, False),
        (torch.bfloat16, "cuda", (8, 0), (2048, 768), 64, False),
        (torch.bfloat16, "cuda", (9, 0), (2048, 100), 64, False),
        (torch.bfloat16, "cuda", (9, 0), (2048, 0), 64, False),
        (torch.bfloat16, "cuda", (9, 0), (2048, 768), 1024, False),
    ],
)
def test_what_the_library_takes(
    dtype: torch.dtype,
    device_type: str,
    capability: tuple[int, int],
    widths: tuple[int, ...],
    experts: int,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert library.supported(dtype, torch.device(device_type), widths, experts) is expected


def _step(x: Tensor, w: Tensor, ends: Tensor, index: Tensor) -> Tensor:
    y = kernel.nt(x, w, ends, index)
    dx = kernel.nn(y, w, ends, y, w)
    return dx.sum() + kernel.tn(y, dx, ends).sin().sum() + library.tn(y, dx, ends).sum()


def test_compiles_whole(device: torch.device) -> None:
    ends = ends_of([3, 0, 4], device)
    x, w = normal(5, 16, device=device), normal(3, 8, 16, device=device, seed=1)
    index = torch.tensor([0, 1, 2, 3, 4, 0, 1], dtype=torch.int32, device=device)
    got = torch.compile(_step, fullgraph=True, backend="aot_eager")(x, w, ends, index)
    torch.testing.assert_close(got, _step(x, w, ends, index))


def _calls(device: torch.device) -> dict[str, tuple[Any, ...]]:
    ends, index = ends_of([2, 0, 1], device), torch.tensor([1, 0, 1], dtype=torch.int32, device=device)
    x, w = normal(3, 8, device=device), normal(3, 4, 8, device=device)
    return {
        "grouped_nt": (x, w, ends, index),
        "grouped_nn": (x, w.mT.contiguous(), ends),
        "grouped_tn": (x, x[:, :5], ends),
    }


@pytest.mark.parametrize("name", ["grouped_nt", "grouped_nn", "grouped_tn"])
def test_operators_are_what_their_fakes_say(name: str, device: torch.device) -> None:
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.occult, name).default, _calls(device)[name], test_utils=checks)


X, W, ENDS = torch.zeros(6, 8), torch.zeros(2, 4, 8), torch.tensor([2, 6], dtype=torch.int32)
WRONG: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...], str]] = {
    "width": (kernel.nt, (X[:, :7], W, ENDS), r"x has shape \(6, 7\), \(None, 8\) fits"),
    "weights": (kernel.nt, (X, W[0], ENDS), r"w has shape \(4, 8\)"),
    "no width": (kernel.nt, (X, W[:, :0], ENDS), r"w has shape \(2, 0, 8\)"),
    "type": (kernel.nt, (X.half(), W, ENDS), r"w is torch.float32, x is torch.float16"),
    "unknown type": (kernel.nt, (X.double(), W.double(), ENDS), r"x is torch.float64; the kernels take"),
    "columns apart": (kernel.nt, (torch.zeros(8, 6).T, W, ENDS), r"x has strides \(1, 6\)"),
    "weights turned": (kernel.nn, (X, W.mT, ENDS), r"w has strides \(32, 1, 8\)"),
    "experts": (kernel.nt, (X, W, ENDS[:1]), r"ends have shape \(1,\), experts are 2"),
    "ends type": (kernel.nt, (X, W, ENDS.long()), r"ends is torch.int64, not torch.int32"),
    "device": (kernel.nt, (X, W.to("meta"), ENDS), r"w is on meta, x on cpu"),
    "index device": (kernel.nt, (X, W, ENDS, ENDS.to("meta")), r"index is on meta, the rows on cpu"),
    "index type": (kernel.nt, (X, W, ENDS, ENDS.long()), r"index is torch.int64"),
    "half a pair": (kernel.nn, (X, W.mT.contiguous(), ENDS, X), r"rows are \(6, 8\), weights are missing"),
    "second rows": (kernel.nn, (X, torch.zeros(2, 8, 4), ENDS, X[:5], torch.zeros(2, 8, 4)), r"g2 has shape \(5, 8\)"),
    "rows of b": (kernel.tn, (X, X[:5], ENDS), r"b has shape \(5, 8\), \(6, 8\) fits"),
    "no experts": (kernel.tn, (X, X, ENDS[:0]), r"ends have shape \(0,\), experts are one or more"),
    "flat": (kernel.tn, (X[0], X, ENDS), r"a has shape \(8,\)"),
    "index of b": (kernel.tn, (X, X, ENDS, None, ENDS), r"index of b has shape \(2,\), \(6,\) fits"),
}


@pytest.mark.parametrize("function, args, message", WRONG.values(), ids=WRONG.keys())
def test_errors_name_both_values(function: Callable[..., Tensor], args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(*args)


LARGE = [0, 1, 4097, 64, 1000, 0, 129, 700]


@pytest.mark.gpu
@requires_gpu
@each_type
def test_large(dtype: torch.dtype, device: torch.device) -> None:
    g = normal(sum(LARGE), 2 * 768, device=device, dtype=dtype)
    x, ends = normal(sum(LARGE), 1024, device=device, dtype=dtype, seed=1), ends_of(LARGE, device)
    w, w2 = (normal(len(LARGE), 768, 1024, device=device, dtype=dtype, seed=seed) for seed in (2, 3))
    pair = (g[:, :768], w, ends, g[:, 768:], w2)
    check_close(kernel.nn(*pair), reference.nn(*exact(*pair)))
    check_close(kernel.nt(x, w, ends), reference.nt(*exact(x, w, ends)))
    check_close(kernel.tn(g, x, ends), reference.tn(*exact(g, x, ends)))


@pytest.mark.gpu
@requires_gpu
@pytest.mark.parametrize("loads", ["pointers", "descriptors"])
def test_every_setting_that_tuning_tries(loads: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if loads == "pointers":
        monkeypatch.setattr(kernel, "use_descriptors", lambda *tensors: False)
    new = torch.cuda.get_device_capability() >= (9, 0)
    g, ends = normal(sum(LARGE), 768, device=device, dtype=torch.bfloat16), ends_of(LARGE, device)
    w, w2 = (normal(len(LARGE), 384, 640, device=device, dtype=torch.bfloat16, seed=seed) for seed in (2, 3))
    pair = (g[:, :384], w, ends, g[:, 384:], w2)
    expected = reference.nn(*exact(*pair)), reference.tn(*exact(g, g, ends))
    for choice in rows.HOPPER if new else rows.AMPERE:
        monkeypatch.setattr(kernel, "rows_tuned", triton.autotune([choice], key=[])(rows.rows_kernel))
        check_close(kernel.nn(*pair), expected[0])
    for choice in outer.HOPPER if new else outer.AMPERE:
        monkeypatch.setattr(kernel, "outer_tuned", triton.autotune([choice], key=[])(outer.outer_kernel))
        check_close(kernel.tn(g, g, ends), expected[1])
