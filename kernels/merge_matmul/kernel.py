"""Down projection, weighted and added into the rows the expanded rows came from, in one Triton kernel with atomics.

X rows grouped by expert, L experts of width F (K in the kernel), R rows of width H (N in the kernel). The order of the
additions changes from run to run, and with it the last bit of a sum; for the same bits each time, use `nt` and a merge
in index order.
"""

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
from occult_train.kernels.tuning import DEPTH, config, expert_block, launch, rows_bucket, tuned, use_descriptors

HOPPER = [
    config(128, 256, 64, warps=8, stages=4),
    config(128, 128, 64, warps=4, stages=3, resident=2),
    config(64, 128, 64, warps=4, stages=4, resident=2),
]
AMPERE = [
    config(128, 128, 32, warps=8, stages=4),
    config(64, 128, 32, warps=4, stages=4, resident=2),
]


@triton.jit(do_not_specialize=["rows", "experts", "bucket"])
def merge_kernel(
    h_ptr,
    w_ptr,
    out_ptr,
    ends_ptr,
    row_ptr,
    weight_ptr,
    rows,
    experts,
    N,
    K,
    stride_h,
    bucket,
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
    """out[row[x]] += weight[x] * (h[x] w[l]) for the expert l of each x; out is fp32 and zero at first."""
    h, w = h_ptr, w_ptr
    if TMA:
        h = tl.make_tensor_descriptor(h_ptr, [rows, K], [stride_h, 1], [BLOCK_M, BLOCK_K])
        w = tl.make_tensor_descriptor(w_ptr, [experts * N, K], [K, 1], [BLOCK_N, BLOCK_K])
    last_L, row_tiles = count_tiles(ends_ptr, experts, BLOCK_M, BLOCK_L)
    columns = tl.cdiv(N, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), row_tiles * columns, tl.num_programs(0), flatten=FLATTEN):
        expert, row, end, column = find_tile(tile, last_L, ends_ptr, columns, BLOCK_M, BLOCK_L, GROUP_M)
        n = column * BLOCK_N
        source_row = tl.minimum(row + offs_m, end - 1)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in tl.range(0, tl.cdiv(K, BLOCK_K)):
            k = step * BLOCK_K
            if TMA:
                a = h.load([row, k])
            else:
                a = load_k(row_pointers(h, source_row, stride_h, offs_k), k, offs_k, K, EVEN_K)
            b = load_weights(w, expert, n, k, offs_n, offs_k, N, K, False, TMA, EVEN_K)
            acc = matmul(a, b, acc, WIDEN)
        inside = row + offs_m < end
        weight = tl.load(weight_ptr + row + offs_m, mask=inside, other=0.0).to(tl.float32)
        target = tl.load(row_ptr + row + offs_m, mask=inside, other=0)
        mask = inside[:, None] & (n + offs_n < N)[None, :]
        tl.atomic_add(row_pointers(out_ptr, target, N, n + offs_n), acc * weight[:, None], mask=mask, sem="relaxed")


merge_tuned = tuned(HOPPER, AMPERE, key=["experts", "N", "K", "bucket", "TMA"], reset_to_zero=["out_ptr"])(merge_kernel)


def _fake_merge(h_XF: Tensor, w2_LHF: Tensor, ends_L: Tensor, row_X: Tensor, weight_X: Tensor, rows: int) -> Tensor:
    return h_XF.new_empty(rows, w2_LHF.shape[1])


@opaque("occult::merge_matmul", fake=_fake_merge)
def merge_matmul(h_XF: Tensor, w2_LHF: Tensor, ends_L: Tensor, row_X: Tensor, weight_X: Tensor, rows: int) -> Tensor:
    """out[r] = sum over the x with row[x] = r of weight[x] * (h[x] w2[l]^T); zeros for a row that none has.

    Args:
        h_XF: [X, F]; rows may lie further apart than F.
        w2_LHF: [L, H, F], contiguous.
        ends_L: int32 [L], the end of each expert's rows, on the device and never read by the host; the last is X.
        row_X: int32 [X], below `rows`, which nobody checks.
        weight_X: [X], any floating type.
        rows: R.

    Returns:
        [R, H] in the type of h, summed in fp32 and rounded once.

    Raises:
        ValueError: shapes, types, devices or layouts that do not fit.
    """
    check_together(h=h_XF, w2=w2_LHF)
    check_weights("w2", w2_LHF, (None, None, None))
    expanded, (experts, hidden, ffn) = h_XF.shape[0], w2_LHF.shape
    check_rows("h", h_XF, None, ffn)
    check_ends(ends_L, experts, h_XF)
    check_index("row", row_X, h_XF, expanded)
    if tuple(weight_X.shape) != (expanded,) or not weight_X.is_floating_point() or weight_X.device != h_XF.device:
        found = f"{weight_X.dtype} {tuple(weight_X.shape)} on {weight_X.device}"
        raise ValueError(f"weights are {found}; floating point ({expanded},) on {h_XF.device} fits h")
    out_RH = torch.zeros(rows, hidden, dtype=torch.float32, device=h_XF.device)
    if expanded and rows:
        launch(
            merge_tuned,
            h_XF,
            *(h_XF, w2_LHF, out_RH, ends_L, row_X, weight_X.contiguous()),
            *(expanded, experts, hidden, ffn, h_XF.stride(0), rows_bucket(expanded, experts)),
            TMA=use_descriptors(h_XF, w2_LHF),
            EVEN_K=ffn % DEPTH == 0,
            BLOCK_L=expert_block(experts),
        )
    return out_RH.to(h_XF.dtype)
