"""Row movement of the fused layer, in plain torch: expand, pack, merge, combine.

T tokens, H width, K experts a token, D devices, X expanded rows, R received rows, S sent rows. Positions are int32, -1
for none (see kernels/positions). A row on the wire is H values, then, from the next multiple of 16 bytes on, K words
of 4 bytes for each of its `extras`: expanded positions (int32), weights (fp32), weight gradients (fp32).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Wire:
    """Shape of a row on the wire."""

    hidden: int
    top_k: int
    dtype: torch.dtype
    extras: int
    """How many groups of K words follow the row."""

    @cached_property
    def first_word(self) -> int:
        """Where the extras begin, in words of 4 bytes."""
        return -(-self.hidden * self.dtype.itemsize // 16) * 4

    @cached_property
    def nbytes(self) -> int:
        """Bytes of a row, a multiple of 32: so is the address of each row, if that of the first is."""
        return -(-(self.first_word + self.extras * self.top_k) * 4 // 32) * 32

    @cached_property
    def width(self) -> int:
        """Elements of `dtype` in a row."""
        return self.nbytes // self.dtype.itemsize

    def empty(self, rows: int, like: Tensor) -> Tensor:
        """[rows, width] uninitialised."""
        return torch.empty(rows, self.width, dtype=self.dtype, device=like.device)

    def values(self, wire: Tensor) -> Tensor:
        """The rows [R, H], a view."""
        return wire[:, : self.hidden]

    def extra(self, wire: Tensor, number: int, dtype: torch.dtype) -> Tensor:
        """Group `number` of the extras [R, K], a view as int32 or float32."""
        start = self.first_word + number * self.top_k
        return wire.view(dtype)[:, start : start + self.top_k]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def expand(
    x_NH: Tensor, position_NK: Tensor, out_XH: Tensor, weight_NK: Tensor | None = None, weight_X: Tensor | None = None,
    start: int = 0, arrive_D: Tensor | None = None,
) -> None:  # fmt: skip
    """Copy row n to out[position[n, k] - start] for each k, and weight[n, k] to weight_X there; not beyond its end.

    Given arrive_D, rows from its last number on are not there.
    """
    if arrive_D is not None:
        position_NK = position_NK[: int(arrive_D[-1])]
        x_NH = x_NH[: len(position_NK)]
        weight_NK = None if weight_NK is None else weight_NK[: len(position_NK)]
    for k in range(position_NK.shape[1]):
        there = (position_NK[:, k] >= 0) & (position_NK[:, k] - start < out_XH.shape[0])
        at = position_NK[there, k].long() - start
        out_XH[at] = x_NH[there]
        if weight_X is not None:
            assert weight_NK is not None
            weight_X[at] = weight_NK[there, k]


def pack(
    x_TH: Tensor, send_TD: Tensor, out: Tensor, wire: Wire,
    position_TK: Tensor | None = None, slots_TK: Tensor | None = None, weight_TK: Tensor | None = None, local: int = 0,
) -> None:  # fmt: skip
    """Copy token t to out[send[t, d]] for each device d that it needs, with the positions of its experts there (-1 for
    its others) and all its weights if given (2 extras)."""
    for d in range(send_TD.shape[1]):
        there = send_TD[:, d] >= 0
        at = send_TD[there, d].long()
        wire.values(out)[at] = x_TH[there]
        if position_TK is not None:
            assert slots_TK is not None
            assert weight_TK is not None
            held = slots_TK[there] // local == d
            wire.extra(out, 0, torch.int32)[at] = torch.where(held, position_TK[there], -1)
            wire.extra(out, 1, torch.float32)[at] = weight_TK[there].float()


def _sum(rows: list[Tensor], position_NK: Tensor, weight_NK: Tensor | None, start: int = 0) -> Tensor:
    dtype = _wide(rows[0].dtype)
    total = torch.zeros(position_NK.shape[0], rows[0].shape[1], dtype=dtype, device=rows[0].device)
    for k in range(position_NK.shape[1]):
        there = position_NK[:, k] >= 0
        at = position_NK[there, k].long() - start
        value = sum(r[at].to(dtype) for r in rows)
        total[there] += value if weight_NK is None else value * weight_NK[there, k, None].to(dtype)
    return total


def merge(
    rows: list[Tensor], position_RK: Tensor, out: Tensor, wire: Wire,
    weight_RK: Tensor | None = None, scalar_X: Tensor | None = None, start: int = 0,
) -> None:  # fmt: skip
    """out[r] = sum over k of weight[r, k] * sum of rows[i][position[r, k] - start], in fp32 and in the order of k.

    With scalar_X the row's extra 0 is scalar_X[position[r, k] - start], 0 where there is none.
    """
    wire.values(out).copy_(_sum(rows, position_RK, weight_RK, start))
    if scalar_X is not None:
        found = (
            scalar_X[(position_RK - start).clamp(min=0).long()] if scalar_X.numel() else torch.zeros_like(position_RK)
        )
        wire.extra(out, 0, torch.float32).copy_(torch.where(position_RK >= 0, found, 0))


def combine(
    rows: list[Tensor], own_TK: Tensor, returned: Tensor, send_TD: Tensor, wire: Wire,
    weight_TK: Tensor | None = None, scalar_X: Tensor | None = None, slots_TK: Tensor | None = None, local: int = 0,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Sum at home: this device's experts as in `merge`, then the rows that came back, by device, in fp32.

    Returns:
        [T, H]; and with scalar_X [T, K], each expert's scalar, from here or from extra 0 of the row that came back.
    """
    total = _sum(rows, own_TK, weight_TK)
    for d in range(send_TD.shape[1]):
        there = send_TD[:, d] >= 0
        total[there] += wire.values(returned)[send_TD[there, d].long()].to(total.dtype)
    if scalar_X is None:
        return total.to(rows[0].dtype), None
    assert slots_TK is not None
    scalars = torch.zeros(own_TK.shape, dtype=torch.float32, device=own_TK.device)
    here = own_TK >= 0
    scalars[here] = scalar_X[own_TK[here].long()]
    at_TK = send_TD.gather(1, slots_TK // local)
    t, k = (at_TK >= 0).nonzero(as_tuple=True)
    scalars[t, k] = wire.extra(returned, 0, torch.float32)[at_TK[t, k].long(), k]
    return total.to(rows[0].dtype), scalars
