"""The kernel of `tn`: transposed rows of each expert times other rows of it, the gradient of the expert's weights."""

import triton
import triton.language as tl

from occult_train.kernels.grouped_matmul.tiles import matmul, swizzle
from occult_train.kernels.tuning import config, tuned

HOPPER = [
    config(128, 256, 64, warps=8, stages=3),
    config(256, 128, 64, warps=8, stages=3),
    config(128, 128, 64, warps=4, stages=3, resident=2),
    config(128, 256, 64, warps=8, stages=4),
]
AMPERE = [
    config(128, 256, 32, warps=8, stages=3),
    config(128, 128, 32, warps=4, stages=4),
]


@triton.jit
def load_rows(ptr, index_ptr, k, end, offs_k, stride, column, columns, GATHER: tl.constexpr):
    """[BLOCK_K, columns] of rows k and on, through the index if GATHER; 0 from row `end` on."""
    row = k + offs_k
    inside = row < end
    if GATHER:
        row = tl.load(index_ptr + row, mask=inside, other=0)
    ptrs = ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(ptrs, mask=inside[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit(do_not_specialize=["rows", "experts", "bucket"])
def outer_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    ends_ptr,
    index_a_ptr,
    index_b_ptr,
    rows,
    experts,
    M,
    N,
    stride_a,
    stride_b,
    bucket,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    SEGMENTS: tl.constexpr,
    TMA: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    RESIDENT: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """out[l] = sum over the rows r of expert l, in all segments, of a[r] outer b[r]; zeros if it has none.

    Descriptors cannot stop at an expert's last row, so with TMA the last, incomplete block of rows is loaded through
    pointers, which can, and multiplied after the loop.
    """
    a_rows, b_rows = a_ptr, b_ptr
    if TMA and not GATHER_A:
        a_rows = tl.make_tensor_descriptor(a_ptr, [rows, M], [stride_a, 1], [BLOCK_K, BLOCK_M])
    if TMA and not GATHER_B:
        b_rows = tl.make_tensor_descriptor(b_ptr, [rows, N], [stride_b, 1], [BLOCK_K, BLOCK_N])
    high = tl.cdiv(M, BLOCK_M)
    across = tl.cdiv(N, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), experts * high * across, tl.num_programs(0)):
        expert = tile // (high * across)
        tile_m, tile_n = swizzle(tile % (high * across), high, across, GROUP_M)
        offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for segment in tl.range(0, SEGMENTS):  # one, as a rule: then there is no loop
            group = segment * experts + expert
            start = tl.load(ends_ptr + group - 1, mask=group > 0, other=0)
            end = tl.load(ends_ptr + group)
            if TMA:
                tail = end - (end - start) % BLOCK_K
                for k in tl.range(start, tail, BLOCK_K):
                    if GATHER_A:
                        a = load_rows(a_ptr, index_a_ptr, k, end, offs_k, stride_a, offs_m, M, GATHER_A)
                    else:
                        a = a_rows.load([k, tile_m * BLOCK_M])
                    if GATHER_B:
                        b = load_rows(b_ptr, index_b_ptr, k, end, offs_k, stride_b, offs_n, N, GATHER_B)
                    else:
                        b = b_rows.load([k, tile_n * BLOCK_N])
                    acc = matmul(tl.trans(a), b, acc, WIDEN)
                if tail < end:
                    a = load_rows(a_ptr, index_a_ptr, tail, end, offs_k, stride_a, offs_m, M, GATHER_A)
                    b = load_rows(b_ptr, index_b_ptr, tail, end, offs_k, stride_b, offs_n, N, GATHER_B)
                    acc = matmul(tl.trans(a), b, acc, WIDEN)
            else:
                for k in tl.range(start, end, BLOCK_K):
                    a = load_rows(a_ptr, index_a_ptr, k, end, offs_k, stride_a, offs_m, M, GATHER_A)
                    b = load_rows(b_ptr, index_b_ptr, k, end, offs_k, stride_b, offs_n, N, GATHER_B)
                    acc = matmul(tl.trans(a), b, acc, WIDEN)
        out_ptrs = out_ptr + (expert.to(tl.int64) * M + offs_m)[:, None] * N + offs_n[None, :]
        mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


outer_tuned = tuned(HOPPER, AMPERE, key=["experts", "M", "N", "bucket", "GATHER_A", "GATHER_B", "TMA"])(outer_kernel)
