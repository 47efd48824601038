"""Rotary position embedding in one pass; one program a position, all its heads. The formula is in `reference.py`."""

import triton
import triton.language as tl
from torch import Tensor

from occult_train.kernels.launching import power_of_2, quick


@quick
@triton.jit
def _rotate_kernel(
    x, cos, sin, out, S, x_b, x_n, x_s, out_b, out_n, out_s, angle_b, sign,
    N: tl.constexpr, NP: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr,
):  # fmt: skip
    b, s = (tl.program_id(0) // S).to(tl.int64), (tl.program_id(0) % S).to(tl.int64)
    n, h = tl.arange(0, NP)[:, None], tl.arange(0, HP)[None, :]
    known = (n < N) & (h < HALF)
    angle = b * angle_b + s * 2 * HALF + h
    c = tl.load(cos + angle, mask=h < HALF, other=0)
    d = tl.load(sin + angle, mask=h < HALF, other=0) * sign
    at = b * x_b + n * x_n + s * x_s + h
    first = tl.load(x + at, mask=known, other=0).to(tl.float32)
    second = tl.load(x + at + HALF, mask=known, other=0).to(tl.float32)
    to = b * out_b + n * out_n + s * out_s + h
    kind = out.dtype.element_ty
    tl.store(out + to, (first * c - second * d).to(kind), mask=known)
    tl.store(out + to + HALF, (second * c + first * d).to(kind), mask=known)


def rotate(x_BNSD: Tensor, cos: Tensor, sin: Tensor, sign: int = 1) -> Tensor:
    """As the reference's, computed in fp32; sign -1 turns back, which is the gradient.

    Args:
        cos, sin: fp32, contiguous.

    Returns:
        [B, N, S, D], laid out as [B, S, N, D].
    """
    b, n, s, d = x_BNSD.shape
    if cos.shape != sin.shape or tuple(cos.shape[1:]) != (1, s, d) or cos.shape[0] not in (1, b):
        raise ValueError(f"x is {tuple(x_BNSD.shape)}, cos {tuple(cos.shape)} and sin {tuple(sin.shape)}")
    if x_BNSD.stride(3) != 1 or not cos.is_contiguous() or not sin.is_contiguous():
        raise ValueError(f"x has strides {x_BNSD.stride()}; a head's values, cos and sin must be contiguous")
    out = x_BNSD.new_empty(b, s, n, d).transpose(1, 2)
    if out.numel():
        _rotate_kernel[(b * s,)](
            x_BNSD, cos, sin, out, s, *x_BNSD.stride()[:3], *out.stride()[:3],
            cos.stride(0) if len(cos) > 1 else 0, sign,
            N=n, NP=power_of_2(n), HALF=d // 2, HP=power_of_2(d // 2),
        )  # fmt: skip
    return out
