"""The matmuls of `reference.py` over torch's own grouped kernel (CUTLASS), for bf16 on sm_90.

`torch._grouped_mm` of torch 2.11 to 2.13. On sm_90 in bf16 it reads the ends on the device; elsewhere, and in other
types, it copies them to the host and multiplies expert by expert, so `supported` says no there. Every stride must be a
multiple of 16 bytes, and there must be fewer than 1024 experts (one thread each prepares them).
"""

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from occult_train.kernels.compiling import opaque
from occult_train.kernels.launching import quick

ALIGNMENT = 16


def supported(dtype: torch.dtype, device: torch.device, widths: Iterable[int], experts: int) -> bool:
    """Whether the library's fast kernel takes rows and weights of these widths (in elements) on this device."""
    if dtype != torch.bfloat16 or device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return 0 < experts < 1024 and all(width > 0 and width * dtype.itemsize % ALIGNMENT == 0 for width in widths)


def nt(x_XK: Tensor, w_LNK: Tensor, ends_L: Tensor) -> Tensor:
    """Rows of expert l times w[l] transposed: [X, N]."""
    return nn(x_XK, w_LNK.transpose(1, 2), ends_L)


def nn(
    g_XK: Tensor, w_LKN: Tensor, ends_L: Tensor, g2_XK: Tensor | None = None, w2_LKN: Tensor | None = None
) -> Tensor:
    """Rows of expert l times w[l], plus those of a second pair if given (rounded to bf16 before the sum): [X, N]."""
    if g_XK.shape[0] == 0:
        return g_XK.new_empty(0, w_LKN.shape[2])
    out = torch._grouped_mm(g_XK, w_LKN, offs=ends_L)
    if g2_XK is not None and w2_LKN is not None:
        out += torch._grouped_mm(g2_XK, w2_LKN, offs=ends_L)
    return out


def _fake_tn(a_XM: Tensor, b_XN: Tensor, ends_L: Tensor) -> Tensor:
    return a_XM.new_empty(ends_L.shape[0], a_XM.shape[1], b_XN.shape[1])


@opaque("occult::library_tn", fake=_fake_tn)
def tn(a_XM: Tensor, b_XN: Tensor, ends_L: Tensor) -> Tensor:
    """Transposed rows of a times rows of b for each expert: [L, M, N], zeros for an expert without rows.

    The library takes empty groups only with rows stored along M and N, as they are here, and does not promise what it
    writes for them; so on the GPU their zeros are written after it.
    """
    if a_XM.shape[0] == 0:
        return a_XM.new_zeros(ends_L.shape[0], a_XM.shape[1], b_XN.shape[1])
    out = torch._grouped_mm(a_XM.t(), b_XN, offs=ends_L)
    if out.is_cuda:
        zero_empty(out, ends_L)
    return out


def zero_empty(out_LMN: Tensor, ends_L: Tensor) -> None:
    """Write zeros for experts without rows, in place; for the others nothing is read or written."""
    block = 4096
    size = out_LMN.stride(0)
    _zero_empty_kernel[(out_LMN.shape[0], -(-size // (16 * block)))](out_LMN, ends_L, size, BLOCK=block, TURNS=16)


@quick
@triton.jit
def _zero_empty_kernel(out_ptr, ends_ptr, size, BLOCK: tl.constexpr, TURNS: tl.constexpr):
    expert = tl.program_id(0)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    if tl.load(ends_ptr + expert) == start:
        for turn in range(TURNS):
            offset = (tl.program_id(1) * TURNS + turn) * BLOCK + tl.arange(0, BLOCK)
            zeros = tl.zeros((BLOCK,), dtype=out_ptr.dtype.element_ty)
            tl.store(out_ptr + expert.to(tl.int64) * size + offset, zeros, mask=offset < size)
