"""Matmuls over rows grouped by expert, in Triton; what each computes is in `reference.py`.

X rows grouped by expert, L experts, `ends_L` int32 the end of each expert's rows, on the device and never read by the
host; ends_L[-1] is X. R rows an index reads from. K, M and N are widths. bf16, fp16 or fp32, sums in fp32.
"""

from torch import Tensor

from occult_train.kernels.compiling import opaque
from occult_train.kernels.grouped_matmul.checks import (
    check_ends,
    check_index,
    check_rows,
    check_together,
    check_weights,
)
from occult_train.kernels.grouped_matmul.outer import outer_tuned
from occult_train.kernels.grouped_matmul.rows import rows_tuned
from occult_train.kernels.tuning import DEPTH, expert_block, launch, rows_bucket, use_descriptors


def _fake_nt(x_RK: Tensor, w_LNK: Tensor, ends_L: Tensor, index_X: Tensor | None = None) -> Tensor:
    return x_RK.new_empty(x_RK.shape[0] if index_X is None else index_X.shape[0], w_LNK.shape[1])


@opaque("occult::grouped_nt", fake=_fake_nt)
def nt(x_RK: Tensor, w_LNK: Tensor, ends_L: Tensor, index_X: Tensor | None = None) -> Tensor:
    """Rows of expert l times w[l] transposed.

    Args:
        x_RK: [X, K], or [R, K] with an index; rows may lie further apart than K.
        w_LNK: [L, N, K], contiguous.
        ends_L: int32 [L].
        index_X: int32 [X], row X is x[index[X]] then; values below R, which nobody checks.

    Returns:
        [X, N] in the type of the rows.

    Raises:
        ValueError: shapes, types, devices or layouts that do not fit.
    """
    check_together(x=x_RK, w=w_LNK)
    check_weights("w", w_LNK, (None, None, None))
    check_rows("x", x_RK, None, w_LNK.shape[2])
    check_index("index", index_X, x_RK)
    return _rows(x_RK, w_LNK, None, None, ends_L, index_X, transposed=False)


def _fake_nn(
    g_XK: Tensor, w_LKN: Tensor, ends_L: Tensor, g2_XK: Tensor | None = None, w2_LKN: Tensor | None = None
) -> Tensor:
    return g_XK.new_empty(g_XK.shape[0], w_LKN.shape[2])


@opaque("occult::grouped_nn", fake=_fake_nn)
def nn(
    g_XK: Tensor, w_LKN: Tensor, ends_L: Tensor, g2_XK: Tensor | None = None, w2_LKN: Tensor | None = None
) -> Tensor:
    """Rows of expert l times w[l], plus rows of a second operand times other weights, summed before rounding.

    Args:
        g_XK, g2_XK: [X, K]; rows may lie further apart than K, as those of two halves of one buffer do.
        w_LKN, w2_LKN: [L, K, N], contiguous.
        ends_L: int32 [L].

    Returns:
        [X, N] in the type of the rows.

    Raises:
        ValueError: shapes, types, devices or layouts that do not fit; one half of the second pair without the other.
    """
    if (g2_XK is None) != (w2_LKN is None):
        raise ValueError(f"a second pair needs both: rows are {_given(g2_XK)}, weights are {_given(w2_LKN)}")
    check_together(g=g_XK, w=w_LKN, g2=g2_XK, w2=w2_LKN)
    check_weights("w", w_LKN, (None, None, None))
    check_rows("g", g_XK, None, w_LKN.shape[1])
    if g2_XK is not None and w2_LKN is not None:
        check_weights("w2", w2_LKN, w_LKN.shape)
        check_rows("g2", g2_XK, g_XK.shape[0], w_LKN.shape[1])
    return _rows(g_XK, w_LKN, g2_XK, w2_LKN, ends_L, None, transposed=True)


def _rows(
    x: Tensor, w: Tensor, x2: Tensor | None, w2: Tensor | None, ends: Tensor, index: Tensor | None, *, transposed: bool
) -> Tensor:
    experts = w.shape[0]
    n, k = (w.shape[2], w.shape[1]) if transposed else (w.shape[1], w.shape[2])
    rows = x.shape[0] if index is None else index.shape[0]
    check_ends(ends, experts, x)
    out = x.new_empty(rows, n)
    if rows == 0:
        return out
    even = k % DEPTH == 0
    descriptors = use_descriptors(w, w2, *(() if index is not None else (x, x2))) and (even or not transposed)
    stride_x2 = x2.stride(0) if x2 is not None else 0
    launch(
        rows_tuned,
        x,
        *(x, w, x2, w2, out, ends, index),
        *(rows, experts, n, k, x.stride(0), stride_x2, out.stride(0), rows_bucket(rows, experts)),
        NN=transposed,
        DUAL=x2 is not None,
        GATHER=index is not None,
        TMA=descriptors,
        EVEN_K=even,
        BLOCK_L=expert_block(experts),
    )
    return out


def _fake_tn(
    a_RM: Tensor,
    b_RN: Tensor,
    ends_L: Tensor,
    index_a_X: Tensor | None = None,
    index_b_X: Tensor | None = None,
    segments: int = 1,
) -> Tensor:
    return a_RM.new_empty(ends_L.shape[0] // segments, a_RM.shape[1], b_RN.shape[1])


@opaque("occult::grouped_tn", fake=_fake_tn)
def tn(
    a_RM: Tensor,
    b_RN: Tensor,
    ends_L: Tensor,
    index_a_X: Tensor | None = None,
    index_b_X: Tensor | None = None,
    segments: int = 1,
) -> Tensor:
    """Transposed rows of a times rows of b for each expert: zeros for an expert without rows.

    Args:
        a_RM, b_RN: [X, M] and [X, N], or any number of rows with an index; rows may lie further apart than they are
            wide.
        ends_L: int32 [L], or [G * L] for rows in G segments, each grouped by expert.
        index_a_X, index_b_X: int32 [X], rows of a (of b) are read through it then; nobody checks the values.
        segments: G.

    Returns:
        [L, M, N] in the type of the rows.

    Raises:
        ValueError: shapes, types, devices or layouts that do not fit.
    """
    rows = a_RM.shape[0] if index_a_X is None else index_a_X.shape[0]
    check_together(a=a_RM, b=b_RN)
    for name, x in {"a": a_RM, "b": b_RN}.items():
        if x.dim() != 2 or x.shape[1] == 0:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, not two dimensions, the second of 1 or more")
    check_rows("a", a_RM, None, a_RM.shape[1])
    check_rows("b", b_RN, rows if index_b_X is None else None, b_RN.shape[1])
    check_index("index of a", index_a_X, a_RM)
    check_index("index of b", index_b_X, b_RN, rows)
    check_ends(ends_L, None, a_RM)
    if segments < 1 or ends_L.shape[0] % segments:
        raise ValueError(f"{ends_L.shape[0]} ends are not those of {segments} segments")
    return _outer(a_RM, b_RN, ends_L, index_a_X, index_b_X, rows, segments)


def _outer(
    a: Tensor, b: Tensor, ends: Tensor, index_a: Tensor | None, index_b: Tensor | None, rows: int, segments: int
) -> Tensor:
    experts, m, n = ends.shape[0] // segments, a.shape[1], b.shape[1]
    if rows == 0:
        return a.new_zeros(experts, m, n)
    out = a.new_empty(experts, m, n)
    descriptors = use_descriptors(a if index_a is None else None, b if index_b is None else None)
    launch(
        outer_tuned,
        a,
        *(a, b, out, ends, index_a, index_b),
        *(rows, experts, m, n, a.stride(0), b.stride(0), rows_bucket(rows, experts)),
        GATHER_A=index_a is not None,
        GATHER_B=index_b is not None,
        SEGMENTS=segments,
        TMA=descriptors,
    )
    return out


def _given(x: Tensor | None) -> str:
    return "missing" if x is None else str(tuple(x.shape))
