"""Gate and up projection with SwiGLU in one Triton kernel, rows read through an index; see `reference.py`.

R rows of width H (K in the kernel), X rows grouped by expert, L experts of width F (N in the kernel). bf16, fp16 or
fp32, sums and SwiGLU in fp32.
"""

from typing import Literal, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from occult_train.kernels.compiling import opaque
from occult_train.kernels.grouped_matmul.checks import (
    check_ends,
    check_index,
    check_rows,
    check_together,
    check_weights,
)
from occult_train.kernels.grouped_matmul.rows import load_weights
from occult_train.kernels.grouped_matmul.tiles import count_tiles, find_tile, load_k, matmul, row_pointers
from occult_train.kernels.tuning import (
    DEPTH,
    config,
    expert_block,
    launch,
    rows_bucket,
    tuned,
    use_descriptors,
)

HOPPER = [
    config(128, 128, 64, warps=8, stages=4, flatten=True),
    config(128, 128, 64, warps=8, stages=4),
    config(128, 64, 64, warps=4, stages=3, resident=2, flatten=True),
    config(64, 128, 64, warps=4, stages=4, flatten=True),
    config(64, 64, 64, warps=4, stages=4, resident=2, flatten=True),
]
AMPERE = [
    config(128, 64, 32, warps=4, stages=4),
    config(64, 64, 32, warps=4, stages=4, resident=2),
]


@triton.jit(do_not_specialize=["rows", "experts", "bucket"])
def swiglu_kernel(
    x_ptr,
    w1_ptr,
    w3_ptr,
    a_ptr,
    b_ptr,
    h_ptr,
    ends_ptr,
    index_ptr,
    rows,
    experts,
    N,
    K,
    stride_x,
    bucket,
    KEEP: tl.constexpr,
    GATHER: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    RESIDENT: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """a, b and h of `gather_swiglu`, tile by tile, a tile of gate and the same tile of up together.

    Both read a block of rows once, which halves the traffic of gathered rows against two products.
    """
    x, w1, w3 = x_ptr, w1_ptr, w3_ptr
    if TMA:
        if not GATHER:
            x = tl.make_tensor_descriptor(x_ptr, [rows, K], [stride_x, 1], [BLOCK_M, BLOCK_K])
        w1 = tl.make_tensor_descriptor(w1_ptr, [experts * N, K], [K, 1], [BLOCK_N, BLOCK_K])
        w3 = tl.make_tensor_descriptor(w3_ptr, [experts * N, K], [K, 1], [BLOCK_N, BLOCK_K])
    last_L, row_tiles = count_tiles(ends_ptr, experts, BLOCK_M, BLOCK_L)
    columns = tl.cdiv(N, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), row_tiles * columns, tl.num_programs(0), flatten=FLATTEN):
        expert, row, end, column = find_tile(tile, last_L, ends_ptr, columns, BLOCK_M, BLOCK_L, GROUP_M)
        n = column * BLOCK_N
        source_row = tl.minimum(row + offs_m, end - 1)
        if GATHER:
            source_row = tl.load(index_ptr + source_row)
        gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in tl.range(0, tl.cdiv(K, BLOCK_K)):
            k = step * BLOCK_K
            if TMA and not GATHER:
                rows_now = x.load([row, k])
            else:
                rows_now = load_k(row_pointers(x, source_row, stride_x, offs_k), k, offs_k, K, EVEN_K)
            gate = matmul(
                rows_now, load_weights(w1, expert, n, k, offs_n, offs_k, N, K, False, TMA, EVEN_K), gate, WIDEN
            )
            up = matmul(rows_now, load_weights(w3, expert, n, k, offs_n, offs_k, N, K, False, TMA, EVEN_K), up, WIDEN)
        out = (row + offs_m).to(tl.int64)[:, None] * N + (n + offs_n)[None, :]
        mask = (row + offs_m < end)[:, None] & (n + offs_n < N)[None, :]
        gate = gate.to(h_ptr.dtype.element_ty)
        up = up.to(h_ptr.dtype.element_ty)
        if KEEP:
            tl.store(a_ptr + out, gate, mask=mask)
            tl.store(b_ptr + out, up, mask=mask)
        gate = gate.to(tl.float32)
        h = gate * tl.sigmoid(gate) * up.to(tl.float32)
        tl.store(h_ptr + out, h.to(h_ptr.dtype.element_ty), mask=mask)


swiglu_tuned = tuned(HOPPER, AMPERE, key=["experts", "N", "K", "bucket", "KEEP", "GATHER", "TMA"])(swiglu_kernel)


@overload
def gather_swiglu(
    rows_RH: Tensor, index_X: Tensor | None, w1_LFH: Tensor, w3_LFH: Tensor, ends_L: Tensor, keep: Literal[True] = True
) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
def gather_swiglu(
    rows_RH: Tensor, index_X: Tensor | None, w1_LFH: Tensor, w3_LFH: Tensor, ends_L: Tensor, keep: Literal[False]
) -> Tensor: ...


def gather_swiglu(
    rows_RH: Tensor, index_X: Tensor | None, w1_LFH: Tensor, w3_LFH: Tensor, ends_L: Tensor, keep: bool = True
) -> tuple[Tensor, Tensor, Tensor] | Tensor:
    """Pre-activations a and b of gate and up, and h = silu(a) * b, computed from a and b as rounded.

    Args:
        rows_RH: [R, H]; rows may lie further apart than H.
        index_X: int32 [X], the row that each expanded row is a copy of, below R, which nobody checks; None for rows
            that are grouped by expert already.
        w1_LFH, w3_LFH: [L, F, H], contiguous.
        ends_L: int32 [L], the end of each expert's rows, on the device and never read by the host; the last is X.
        keep: False for h alone, when there will be no backward.

    Returns:
        a, b and h, each [X, F] in the type of the rows; or h.

    Raises:
        ValueError: shapes, types, devices or layouts that do not fit.
    """
    return (_keep if keep else _forget)(rows_RH, index_X, w1_LFH, w3_LFH, ends_L)


def _fake_keep(
    rows_RH: Tensor, index_X: Tensor | None, w1_LFH: Tensor, w3_LFH: Tensor, ends_L: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    h_XF = _fake_forget(rows_RH, index_X, w1_LFH, w3_LFH, ends_L)
    return torch.empty_like(h_XF), torch.empty_like(h_XF), h_XF


@opaque("occult::gather_swiglu", fake=_fake_keep)
def _keep(
    rows_RH: Tensor, index_X: Tensor | None, w1_LFH: Tensor, w3_LFH: Tensor, ends_L: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    h_XF = _output(rows_RH, index_X, w1_LFH, w3_LFH, ends_L)
    a_XF, b_XF = torch.empty_like(h_XF), torch.empty_like(h_XF)
    _run(rows_RH, index_X, w1_LFH, w3_LFH, ends_L, a_XF, b_XF, h_XF)
    return a_XF, b_XF, h_XF


def _fake_forget(rows_RH: Tensor, index_X: Tensor | None, w1_LFH: Tensor, w3_LFH: Tensor, ends_L: Tensor) -> Tensor:
    return rows_RH.new_empty(rows_RH.shape[0] if index_X is None else index_X.shape[0], w1_LFH.shape[1])


@opaque("occult::gather_swiglu_inference", fake=_fake_forget)
def _forget(rows_RH: Tensor, index_X: Tensor | None, w1_LFH: Tensor, w3_LFH: Tensor, ends_L: Tensor) -> Tensor:
    h_XF = _output(rows_RH, index_X, w1_LFH, w3_LFH, ends_L)
    _run(rows_RH, index_X, w1_LFH, w3_LFH, ends_L, None, None, h_XF)
    return h_XF


def _output(rows: Tensor, index: Tensor | None, w1: Tensor, w3: Tensor, ends: Tensor) -> Tensor:
    """h, not yet computed, once the arguments fit."""
    check_together(rows=rows, w1=w1, w3=w3)
    check_weights("w1", w1, (None, None, None))
    check_weights("w3", w3, w1.shape)
    check_rows("rows", rows, None, w1.shape[2])
    check_index("index", index, rows)
    check_ends(ends, w1.shape[0], rows)
    return _fake_forget(rows, index, w1, w3, ends)


def _run(
    rows: Tensor,
    index: Tensor | None,
    w1: Tensor,
    w3: Tensor,
    ends: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    h: Tensor,
) -> None:
    experts, ffn, hidden = w1.shape
    if h.shape[0] == 0:
        return
    launch(
        swiglu_tuned,
        rows,
        *(rows, w1, w3, a, b, h, ends, index),
        *(h.shape[0], experts, ffn, hidden, rows.stride(0), rows_bucket(h.shape[0], experts)),
        KEEP=a is not None,
        GATHER=index is not None,
        TMA=use_descriptors(w1, w3, rows if index is None else None),
        EVEN_K=hidden % DEPTH == 0,
        BLOCK_L=expert_block(experts),
    )
