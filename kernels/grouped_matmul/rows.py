"""The kernel of `nt` and `nn`: rows of each expert times the expert's weights."""

import triton
import triton.language as tl

from occult_train.kernels.grouped_matmul.tiles import count_tiles, find_tile, load_k, matmul, row_pointers
from occult_train.kernels.tuning import config, tuned

HOPPER = [
    config(128, 256, 64, warps=8, stages=4, flatten=True),
    config(128, 256, 64, warps=8, stages=4),
    config(256, 128, 64, warps=8, stages=4, flatten=True),
    config(128, 128, 64, warps=4, stages=3, resident=2, flatten=True),
    config(64, 256, 64, warps=4, stages=4, flatten=True),
    config(64, 128, 64, warps=4, stages=4, resident=2, flatten=True),
]
AMPERE = [
    config(128, 256, 32, warps=8, stages=4),
    config(128, 128, 32, warps=4, stages=4),
    config(64, 128, 32, warps=4, stages=4, resident=2),
]


@triton.jit
def load_weights(source, expert, n, k, offs_n, offs_k, N, K, NN: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr):
    """[BLOCK_K, BLOCK_N] of one expert's weights, stored [K, N] with NN, else [N, K]; 0 beyond K, any value beyond N.

    A descriptor sees the weights of all experts as one matrix: a block that goes beyond an expert's N reads the next
    expert's, whose products are never stored. Beyond K that would count, so NN has descriptors only for even K.
    """
    if TMA and NN:
        return source.load([expert * K + k, n])
    elif TMA:
        return tl.trans(source.load([expert * N + n, k]))
    elif NN:
        mask = (n + offs_n < N)[None, :]
        if not EVEN_K:
            mask &= (k + offs_k < K)[:, None]
        first = source + expert.to(tl.int64) * N * K
        return tl.load(first + (k + offs_k)[:, None] * N + (n + offs_n)[None, :], mask=mask, other=0.0)
    else:
        first = source + expert.to(tl.int64) * N * K
        return tl.trans(
            load_k(first + tl.minimum(n + offs_n, N - 1)[:, None] * K + offs_k[None, :], k, offs_k, K, EVEN_K)
        )


@triton.jit(do_not_specialize=["rows", "experts", "bucket"])
def rows_kernel(
    x_ptr,
    w_ptr,
    x2_ptr,
    w2_ptr,
    out_ptr,
    ends_ptr,
    index_ptr,
    rows,
    experts,
    N,
    K,
    stride_x,
    stride_x2,
    stride_out,
    bucket,
    NN: tl.constexpr,
    DUAL: tl.constexpr,
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
    """out[r] = x[r] w[l] (+ x2[r] w2[l] with DUAL) for the expert l of row r; x[index[r]] in place of x[r] with GATHER.

    Programs go through tiles of the output until none is left. With DUAL the second pair follows the first in the same
    loop, so the pipeline of loads never drains in between. FLATTEN makes one loop of tiles and steps, in which loads of
    the next tile are under way while one is stored.
    """
    x, x2, w, w2 = x_ptr, x2_ptr, w_ptr, w2_ptr
    if TMA and not GATHER:
        x = tl.make_tensor_descriptor(x_ptr, [rows, K], [stride_x, 1], [BLOCK_M, BLOCK_K])
        if DUAL:
            x2 = tl.make_tensor_descriptor(x2_ptr, [rows, K], [stride_x2, 1], [BLOCK_M, BLOCK_K])
    if TMA and NN:
        w = tl.make_tensor_descriptor(w_ptr, [experts * K, N], [N, 1], [BLOCK_K, BLOCK_N])
        if DUAL:
            w2 = tl.make_tensor_descriptor(w2_ptr, [experts * K, N], [N, 1], [BLOCK_K, BLOCK_N])
    elif TMA:
        w = tl.make_tensor_descriptor(w_ptr, [experts * N, K], [K, 1], [BLOCK_N, BLOCK_K])

    last_L, row_tiles = count_tiles(ends_ptr, experts, BLOCK_M, BLOCK_L)
    columns = tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), row_tiles * columns, tl.num_programs(0), flatten=FLATTEN):
        expert, row, end, column = find_tile(tile, last_L, ends_ptr, columns, BLOCK_M, BLOCK_L, GROUP_M)
        n = column * BLOCK_N
        source_row = tl.minimum(row + offs_m, end - 1)
        if GATHER:
            source_row = tl.load(index_ptr + source_row)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in tl.range(0, 2 * steps if DUAL else steps):
            x_now, w_now, k, stride = x, w, step * BLOCK_K, stride_x
            if DUAL:
                if step >= steps:
                    x_now, w_now, k, stride = x2, w2, (step - steps) * BLOCK_K, stride_x2
            if TMA and not GATHER:
                a = x_now.load([row, k])
            else:
                a = load_k(row_pointers(x_now, source_row, stride, offs_k), k, offs_k, K, EVEN_K)
            b = load_weights(w_now, expert, n, k, offs_n, offs_k, N, K, NN, TMA, EVEN_K)
            acc = matmul(a, b, acc, WIDEN)
        mask = (row + offs_m < end)[:, None] & (n + offs_n < N)[None, :]
        tl.store(
            row_pointers(out_ptr, row + offs_m, stride_out, n + offs_n), acc.to(out_ptr.dtype.element_ty), mask=mask
        )


rows_tuned = tuned(HOPPER, AMPERE, key=["experts", "N", "K", "bucket", "NN", "DUAL", "GATHER", "TMA"])(rows_kernel)
