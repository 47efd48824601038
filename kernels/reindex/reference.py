"""Index maps between the three states of the token matrix (Occult, section on BRIM), in plain torch.

T tokens, K experts a token, D devices, L experts a device, S simplified rows (token, device), M = min(K, L) experts a
simplified row can have, X expanded rows (row, expert). -1 stands for "none".
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowIndex:
    """Rows made from sources, each row from one source: row r is a copy of source row_to_source[r].

    row_to_source [R] and its transpose source_to_rows [N, C] (the rows of a source, -1 where it has fewer than C).
    """

    row_to_source: Tensor
    source_to_rows: Tensor


def device_rows(device_TC: Tensor, order: list[int]) -> tuple[RowIndex, Tensor]:
    """BRIM_0: one row for each (token, device) pair, ordered by device in `order`, then by token.

    Args:
        device_TC: [T, C] int64, devices that token t goes to; repeats count once.
        order: the D devices in the order of the rows.

    Returns:
        the index, whose source_to_rows [T, D] has column j for device order[j], and the rows per device [D].

    Example, T=3, D=2, order [0, 1], devices [[0, 0], [1, 0], [1, 1]]: rows (t0,d0) (t1,d0) | (t1,d1) (t2,d1), so
    row_to_source [0, 1, 1, 2], source_to_rows [[0, -1], [1, 2], [-1, 3]] and counts [2, 2].
    """
    tokens, devices = device_TC.shape[0], len(order)
    goes_TD = torch.zeros(tokens, devices, dtype=torch.bool, device=device_TC.device)
    goes_TD.scatter_(1, device_TC, True)
    goes_DT = goes_TD[:, order].t().contiguous()
    flat = goes_DT.view(-1)
    row_DT = torch.where(flat, flat.cumsum(0) - 1, -1).view(devices, tokens)
    row_to_token = flat.nonzero().view(-1) % max(tokens, 1)
    return RowIndex(row_to_token, row_DT.t().contiguous()), goes_DT.sum(1)


def row_experts(index: RowIndex, slots_TK: Tensor, order: list[int], local: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which of a token's K experts each simplified row carries.

    Args:
        index: from `device_rows` of slots_TK // local.
        slots_TK: [T, K] int64 slots of the chosen experts.
        local: L, experts a device holds.

    Returns:
        ids_SM [S, M] int64, experts on the row's device as local ids 0..L-1, in the order of k, -1 padded at the end;
        row_TK and column_TK [T, K], where in ids_SM the k-th expert of token t stands.
    """
    k = slots_TK.shape[1]
    device_TK = slots_TK // local
    position = torch.empty(len(order), dtype=torch.int64, device=slots_TK.device)
    position[torch.tensor(order, device=slots_TK.device)] = torch.arange(len(order), device=slots_TK.device)
    row_TK = index.source_to_rows.gather(1, position[device_TK])
    same_TKK = device_TK[:, :, None] == device_TK[:, None, :]
    column_TK = same_TKK.tril(-1).sum(2)
    ids_SM = slots_TK.new_full((index.row_to_source.numel(), min(k, local)), -1)
    ids_SM[row_TK, column_TK] = slots_TK % local
    return ids_SM, row_TK, column_TK


def expert_rows(ids_RM: Tensor, local: int) -> tuple[RowIndex, Tensor, Tensor]:
    """BRIM_1: one expanded row for each (received row, local expert) pair, grouped by expert, then by row.

    Args:
        ids_RM: [R, M] int64 local expert ids, -1 for none.
        local: L.

    Returns:
        the index with row_to_source [X] and source_to_rows [R, M]; entry_X [X], the flat position in ids_RM of each
        expanded row; and rows per expert [L].

    Raises:
        ValueError: an id of L or more, which would be an expert of another device.
    """
    flat = ids_RM.reshape(-1)
    if flat.numel() and int(flat.max()) >= local:
        raise ValueError(f"local expert id {int(flat.max())} on a device of {local} experts")
    key = torch.where(flat < 0, local, flat)
    count_all = torch.bincount(key, minlength=local + 1)
    counts_L = count_all[:local]
    entry_X = torch.argsort(key, stable=True)[: int(counts_L.sum())]
    rows_RM = torch.full_like(flat, -1)
    rows_RM[entry_X] = torch.arange(entry_X.numel(), device=flat.device)
    columns = max(ids_RM.shape[1], 1)
    return RowIndex(entry_X // columns, rows_RM.view_as(ids_RM)), entry_X, counts_L
