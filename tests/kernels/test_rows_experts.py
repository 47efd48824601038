"""Row movement and the experts of one device, against loops in fp64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from occult_train.kernels.experts.reference import experts
from occult_train.kernels.reindex.reference import RowIndex, device_rows, expert_rows
from occult_train.kernels.rows.autograd import gather, gather_sum

HIDDEN, FFN, LOCAL, COLUMNS = 6, 5, 4, 3
NAMES = ("rows", "weights", "w1", "w2", "w3")


def random_ids(rows: int, local: int, columns: int, seed: int, used: int | None = None) -> Tensor:
    """[R, M] distinct local ids below `used`, about a third of them -1."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, used or local, generator=generator).argsort(dim=1)[:, :columns]
    return torch.where(torch.rand(order.shape, generator=generator) < 0.33, -1, order)


def indices() -> dict[str, RowIndex]:
    """Indices of both kinds, with sources of no row and of many, and empty ones."""
    generator = torch.Generator().manual_seed(0)
    devices = torch.randint(0, 3, (13, 4), generator=generator)
    return {
        "devices": device_rows(devices, [1, 0, 2])[0],
        "no_tokens": device_rows(devices[:0], [1, 0, 2])[0],
        "experts": expert_rows(random_ids(17, LOCAL, COLUMNS, seed=1), LOCAL)[0],
        "no_rows": expert_rows(torch.full((5, 2), -1), LOCAL)[0],
        "no_sources": expert_rows(torch.full((0, 2), -1), LOCAL)[0],
    }


INDICES = indices()
each_index = pytest.mark.parametrize("index", INDICES.values(), ids=INDICES.keys())


def loop_gather_sum(rows: Tensor, index: RowIndex) -> Tensor:
    """Sum of each source's rows, one by one in the order of the columns, in fp32 or wider."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    out = torch.zeros(index.source_to_rows.shape[0], rows.shape[1], dtype=wide)
    for source, found in enumerate(index.source_to_rows.tolist()):
        for row in found:
            if row != -1:
                out[source] += rows[row].to(wide)
    return out.to(rows.dtype)


def inputs_for(index: RowIndex, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """x for `gather` and rows for `gather_sum`."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(index.source_to_rows.shape[0], HIDDEN, dtype=torch.float64, generator=generator)
    rows = torch.randn(index.row_to_source.shape[0], HIDDEN, dtype=torch.float64, generator=generator)
    return x.to(dtype), rows.to(dtype)


@each_index
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gather_and_gather_sum_against_loops(index: RowIndex, dtype: torch.dtype) -> None:
    x, rows = inputs_for(index, dtype)
    copied = [x[source] for source in index.row_to_source.tolist()]
    assert torch.equal(gather(x, index), torch.stack(copied) if copied else x.new_empty(0, HIDDEN))
    # bit for bit: the order of the sum and its fp32 accumulator are promised
    assert torch.equal(gather_sum(rows, index), loop_gather_sum(rows, index))


@each_index
def test_gather_and_gather_sum_are_transposes(index: RowIndex) -> None:
    x, rows = inputs_for(index)
    forth, back = (gather(x, index) * rows).sum(), (x * gather_sum(rows, index)).sum()
    # measured at most 7e-15 for sums of about 20
    torch.testing.assert_close(forth, back, rtol=0, atol=1e-13)


@each_index
def test_gather_and_gather_sum_gradients(index: RowIndex) -> None:
    x, rows = inputs_for(index)
    assert torch.autograd.gradcheck(lambda x: gather(x, index), x.requires_grad_())
    assert torch.autograd.gradcheck(lambda rows: gather_sum(rows, index), rows.requires_grad_())


def test_gather_sum_reads_no_row_that_a_source_lacks() -> None:
    """Row 0 is a stand-in address for -1; what it holds must not leak."""
    index, _ = device_rows(torch.tensor([[0, 0], [1, 1], [0, 1]]), [0, 1])
    rows = torch.ones(4, HIDDEN)
    rows[0] = torch.nan
    out = gather_sum(rows, index)
    assert out[0].isnan().all()
    assert torch.equal(out[1:], torch.tensor([1.0, 2.0])[:, None].expand(2, HIDDEN))


def test_row_movement_refuses_other_sizes() -> None:
    index = INDICES["devices"]
    rows = index.row_to_source.numel()
    with pytest.raises(ValueError, match=rf"\(12, {HIDDEN}\) given, the index has 13 sources"):
        gather(torch.ones(12, HIDDEN), index)
    with pytest.raises(ValueError, match=rf"\(3, {HIDDEN}\) given, the index has {rows} rows"):
        gather_sum(torch.ones(3, HIDDEN), index)
    with pytest.raises(ValueError, match=r"\(13,\) given, the index has 13 sources"):
        gather(torch.ones(13), index)


def loop_experts(rows: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """The formula of `experts`, a row and an expert at a time."""
    out = []
    for r, row in enumerate(rows):
        y = row * 0
        for m, e in enumerate(ids[r].tolist()):
            if e != -1:
                gate, up = w1[e] @ row, w3[e] @ row
                y = y + weights[r, m] * (w2[e] @ (gate * torch.sigmoid(gate) * up))
        out.append(y)
    return torch.stack(out) if out else rows * 1


def make_inputs(rows: int, local: int = LOCAL, columns: int = COLUMNS, seed: int = 3) -> dict[str, Tensor]:
    """Differentiable fp64 inputs of `experts`, by name."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "rows": (rows, HIDDEN),
        "weights": (rows, columns),
        "w1": (local, FFN, HIDDEN),
        "w2": (local, HIDDEN, FFN),
        "w3": (local, FFN, HIDDEN),
    }
    draw = {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()}
    return {name: value.requires_grad_() for name, value in draw.items()}


def run(
    function: Callable[..., Tensor], ids: Tensor, given: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Output, and the gradient of its product with fixed numbers for each input by name."""
    given = {name: value.detach().requires_grad_() for name, value in given.items()}
    out = function(given["rows"], ids, given["weights"], given["w1"], given["w2"], given["w3"])
    generator = torch.Generator().manual_seed(4)
    factor = torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out.dtype)
    (out * factor).sum().backward()
    return out.detach(), {name: value.grad for name, value in given.items()}


def relative(got: Tensor, reference: Tensor) -> float:
    """‖got - reference‖ / ‖reference‖ in fp64; the plain norm where the reference is zero."""
    size = float(reference.double().norm())
    return float((got.double() - reference.double()).norm()) / (size or 1.0)


@pytest.mark.parametrize("rows", [0, 1, 63, 100])
@pytest.mark.parametrize("used", [1, 3, 4])
def test_experts_against_a_loop(rows: int, used: int) -> None:
    """Values and every gradient, with experts that get no row."""
    given = make_inputs(rows)
    ids = random_ids(rows, LOCAL, min(COLUMNS, used), seed=5, used=used)
    ids = F.pad(ids, (0, COLUMNS - ids.shape[1]), value=-1)
    got, got_grads = run(experts, ids, given)
    expected, expected_grads = run(loop_experts, ids, given)
    # measured at most 6.3e-16
    assert relative(got, expected) < 1e-14
    for name in NAMES:
        grad, reference = got_grads[name], expected_grads[name]
        assert grad is not None, name
        # the loop does not touch what no row needs
        reference = torch.zeros_like(grad) if reference is None else reference
        assert relative(grad, reference) < 1e-14, name


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_experts_gradcheck(rows: int) -> None:
    given = make_inputs(rows, seed=6)
    ids = random_ids(rows, LOCAL, COLUMNS, seed=7)
    assert torch.autograd.gradcheck(
        lambda rows, weights, w1, w2, w3: experts(rows, ids, weights, w1, w2, w3), tuple(given.values())
    )


def test_an_expert_without_rows_has_zero_gradients() -> None:
    given = make_inputs(9)
    _, grads = run(experts, random_ids(9, LOCAL, COLUMNS, seed=8, used=3), given)
    for name in ("w1", "w2", "w3"):
        grad = grads[name]
        assert grad is not None, name
        assert (grad[3] == 0).all(), name
        assert (grad[:3].flatten(1).norm(dim=1) > 0).all(), name


def test_without_rows_every_gradient_is_there_and_zero() -> None:
    """A device that receives nothing still takes part in the reduction of gradients."""
    out, grads = run(experts, torch.empty(0, COLUMNS, dtype=torch.int64), make_inputs(0))
    assert out.shape == (0, HIDDEN)
    for name, grad in grads.items():
        assert grad is not None, name
        assert (grad == 0).all(), name


def test_weights_of_missing_entries_are_not_read() -> None:
    given = make_inputs(20)
    ids = random_ids(20, LOCAL, COLUMNS, seed=9)
    clean, clean_grads = run(experts, ids, given)
    dirty, dirty_grads = run(
        experts, ids, given | {"weights": torch.where(ids < 0, torch.nan, given["weights"].detach())}
    )
    assert torch.equal(dirty, clean)
    for name in NAMES:
        assert torch.equal(dirty_grads[name], clean_grads[name]), name
    assert (clean_grads["weights"][ids < 0] == 0).all()


def test_bf16_is_within_its_own_error() -> None:
    """bf16 rows and experts with fp32 routing weights, against fp64 of the same rounded numbers."""
    given = make_inputs(100, seed=10)
    ids = random_ids(100, LOCAL, COLUMNS, seed=11)
    low = {name: value.to(torch.float32 if name == "weights" else torch.bfloat16) for name, value in given.items()}
    got, got_grads = run(experts, ids, low)
    expected, expected_grads = run(experts, ids, {name: value.double() for name, value in low.items()})
    # measured 0.003 to 0.007 over seeds; a bf16 rounding costs up to 0.0039 and typically 0.0016
    assert got.dtype == torch.bfloat16
    assert relative(got, expected) < 0.01
    for name in NAMES:
        grad, reference = got_grads[name], expected_grads[name]
        assert grad is not None
        assert reference is not None
        assert grad.dtype == low[name].dtype, name
        assert relative(grad, reference) < 0.01, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": (7, HIDDEN + 1)}, rf"rows have shape \(7, {HIDDEN + 1}\), w1 takes width {HIDDEN}"),
        ({"rows": (7, HIDDEN, 1)}, rf"rows have shape \(7, {HIDDEN}, 1\), w1 takes width {HIDDEN}"),
        ({"w3": (LOCAL, FFN + 1, HIDDEN)}, rf"w3 \({LOCAL}, {FFN + 1}, {HIDDEN}\) do not fit together"),
        ({"w2": (LOCAL, FFN, HIDDEN)}, rf"w2 \({LOCAL}, {FFN}, {HIDDEN}\) and .* do not fit together"),
        ({"w2": (LOCAL - 1, HIDDEN, FFN)}, rf"w2 \({LOCAL - 1}, {HIDDEN}, {FFN}\) and .* do not fit together"),
        ({"weights": (7, COLUMNS - 1)}, rf"7 rows, ids \(7, {COLUMNS}\), weights \(7, {COLUMNS - 1}\)"),
        ({"rows": (8, HIDDEN)}, rf"8 rows, ids \(7, {COLUMNS}\), weights \(7, {COLUMNS}\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, tuple[int, ...]], message: str) -> None:
    given = make_inputs(7) | {name: torch.ones(shape, dtype=torch.float64) for name, shape in change.items()}
    ids = random_ids(7, LOCAL, COLUMNS, seed=12)
    with pytest.raises(ValueError, match=message):
        experts(given["rows"], ids, given["weights"], given["w1"], given["w2"], given["w3"])
