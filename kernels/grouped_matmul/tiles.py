"""What the grouped matmul kernels share: which expert a tile belongs to, products, loads with tails.

Rows are grouped by expert and `ends` holds the end of each group, on the device only: the host launches as many
programs as the card has multiprocessors, and each program finds its tiles by itself.
"""

import triton
import triton.language as tl


@triton.jit
def count_tiles(ends_ptr, experts, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr):
    """Row tiles of all experts up to and with each one, as [BLOCK_L], and their sum.

    Example, BLOCK_M 4, ends [5, 5, 6]: groups of 5, 0 and 1 rows, so 2, 0 and 1 tiles: [2, 2, 3] and 3.
    """
    expert_L = tl.arange(0, BLOCK_L)
    end_L = tl.load(ends_ptr + expert_L, mask=expert_L < experts, other=0)
    start_L = tl.load(ends_ptr + expert_L - 1, mask=(expert_L > 0) & (expert_L < experts), other=0)
    last_L = tl.cumsum((end_L - start_L + BLOCK_M - 1) // BLOCK_M, 0)
    return last_L, tl.max(last_L, 0)


@triton.jit
def find_tile(tile, last_L, ends_ptr, columns, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, GROUP_M: tl.constexpr):
    """Expert, first row, end of the expert's rows and column tile of one tile.

    Tiles are numbered expert by expert, so that programs at work at the same time share the weights in L2; within an
    expert, GROUP_M row tiles go through all column tiles together.

    Example, ends [5, 5, 6], BLOCK_M 4, 2 columns, GROUP_M 1: tiles 0 to 5 are (expert 0, row 0, columns 0 and 1),
    (expert 0, row 4, columns 0 and 1), (expert 2, row 5, columns 0 and 1).
    """
    # experts whose tiles all come before this one; the greatest pair (their tiles, expert + 1) gives both at once
    before_L = tl.where(last_L * columns <= tile, (last_L.to(tl.int64) << 20) + tl.arange(0, BLOCK_L) + 1, 0)
    found = tl.max(before_L, 0)
    expert = (found & 0xFFFFF).to(tl.int32)
    first_tile = (found >> 20).to(tl.int32)
    end = tl.load(ends_ptr + expert)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    tile_m, tile_n = swizzle(tile - first_tile * columns, (end - start + BLOCK_M - 1) // BLOCK_M, columns, GROUP_M)
    return expert, start + tile_m * BLOCK_M, end, tile_n


@triton.jit
def swizzle(tile, rows, columns, GROUP_M: tl.constexpr):
    """Row and column of a tile when GROUP_M rows of tiles go through all columns together."""
    group = tile // (GROUP_M * columns)
    height = tl.minimum(rows - group * GROUP_M, GROUP_M)
    within = tile - group * GROUP_M * columns
    return group * GROUP_M + within % height, within // height


@triton.jit
def matmul(a, b, acc, WIDEN: tl.constexpr):
    """acc + a b. WIDEN is for Triton's interpreter, whose bf16 products are wrong."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def row_pointers(ptr, row, stride, offs_k):
    """[rows, BLOCK_K] pointers; rows times stride goes beyond 32 bits."""
    return ptr + row.to(tl.int64)[:, None] * stride + offs_k[None, :]


@triton.jit
def load_k(ptrs, k, offs_k, K, EVEN_K: tl.constexpr):
    """Columns k to k + BLOCK_K of some rows, 0 beyond K."""
    if EVEN_K:
        return tl.load(ptrs + k)
    return tl.load(ptrs + k, mask=(offs_k < K - k)[None, :], other=0.0)
