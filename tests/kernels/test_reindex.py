"""The index maps between tokens, simplified rows and expanded rows: drawn by hand, against loops, and by property."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from occult_train.kernels.reindex.reference import RowIndex, device_rows, expert_rows, row_experts
from occult_train.parallel.all_to_all import home_first


def ints(rows: list[list[int]], columns: int) -> Tensor:
    """An int64 matrix that keeps its width when it has no rows."""
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), columns)


def loop_device_rows(devices: list[list[int]], order: list[int]) -> tuple[list[int], list[list[int]], list[int]]:
    """row_to_source, source_to_rows and counts of `device_rows`, one (device, token) pair at a time."""
    row_to_token: list[int] = []
    table = [[-1] * len(order) for _ in devices]
    counts = []
    for column, device in enumerate(order):
        before = len(row_to_token)
        for token, used in enumerate(devices):
            if device in used:
                table[token][column] = len(row_to_token)
                row_to_token.append(token)
        counts.append(len(row_to_token) - before)
    return row_to_token, table, counts


def loop_row_experts(
    slots: list[list[int]], order: list[int], local: int
) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """ids, rows and columns of `row_experts`, one (token, k) pair at a time."""
    _, table, counts = loop_device_rows([[s // local for s in row] for row in slots], order)
    ids: list[list[int]] = [[] for _ in range(sum(counts))]
    rows, columns = [], []
    for token, chosen in enumerate(slots):
        row_of = [table[token][order.index(slot // local)] for slot in chosen]
        column_of = []
        for row, slot in zip(row_of, chosen, strict=True):
            column_of.append(len(ids[row]))
            ids[row].append(slot % local)
        rows.append(row_of)
        columns.append(column_of)
    return ids, rows, columns


def loop_expert_rows(ids: list[list[int]], local: int) -> tuple[list[int], list[list[int]], list[int], list[int]]:
    """row_to_source, source_to_rows, entries and counts of `expert_rows`, one (expert, row, m) triple at a time."""
    row_to_source: list[int] = []
    table = [[-1] * len(row) for row in ids]
    entries, counts = [], []
    for expert in range(local):
        before = len(row_to_source)
        for r, row in enumerate(ids):
            for m, found in enumerate(row):
                if found == expert:
                    table[r][m] = len(row_to_source)
                    row_to_source.append(r)
                    entries.append(r * len(row) + m)
        counts.append(len(row_to_source) - before)
    return row_to_source, table, entries, counts


def check_transposes(index: RowIndex) -> None:
    """Row r stands exactly once in source_to_rows, in the line of its source; all else is -1."""
    found = {}
    for source, rows in enumerate(index.source_to_rows.tolist()):
        for row in rows:
            if row != -1:
                assert row not in found
                found[row] = source
    assert found == dict(enumerate(index.row_to_source.tolist()))


@dataclass(frozen=True)
class Choice:
    """Slots that tokens chose, and the layout of devices."""

    slots: list[list[int]]
    k: int
    local: int
    order: list[int]

    @property
    def slots_TK(self) -> Tensor:
        return ints(self.slots, self.k)

    @property
    def devices(self) -> list[list[int]]:
        return [[slot // self.local for slot in row] for row in self.slots]


@st.composite
def choices(draw: st.DrawFn) -> Choice:
    """Any token count from none to a prime above 16, any K up to all experts, rows home first from any rank."""
    devices, local = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    k = draw(st.integers(1, devices * local))
    token = st.permutations(range(devices * local)).map(lambda p: list(p[:k]))
    slots = draw(st.lists(token, max_size=17))
    return Choice(slots, k, local, home_first(draw(st.integers(0, devices - 1)), devices))


@st.composite
def received_ids(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Local ids [R, M] of received rows, -1 anywhere among them, and L."""
    local = draw(st.integers(1, 5))
    columns = draw(st.integers(1, local))
    row = st.permutations(range(local)).map(lambda p: list(p[:columns]))
    keep = st.lists(st.booleans(), min_size=columns, max_size=columns)
    rows = draw(st.lists(st.tuples(row, keep), max_size=19))
    return ints([[e if kept else -1 for e, kept in zip(*pair, strict=True)] for pair in rows], columns), local


def test_device_rows_of_the_docstring() -> None:
    index, counts = device_rows(ints([[0, 0], [1, 0], [1, 1]], 2), [0, 1])
    assert index.row_to_source.tolist() == [0, 1, 1, 2]
    assert index.source_to_rows.tolist() == [[0, -1], [1, 2], [-1, 3]]
    assert counts.tolist() == [2, 2]


def test_device_rows_home_first() -> None:
    """Rank 1 of 3 puts its own rows first: (t0,d1) (t2,d1) | (t1,d0) (t2,d0) | (t0,d2)."""
    index, counts = device_rows(ints([[1, 2], [0, 0], [0, 1]], 2), [1, 0, 2])
    assert index.row_to_source.tolist() == [0, 2, 1, 2, 0]
    assert index.source_to_rows.tolist() == [[0, -1, 4], [-1, 2, -1], [1, 3, -1]]
    assert counts.tolist() == [2, 2, 1]


def test_device_rows_all_tokens_to_one_device() -> None:
    index, counts = device_rows(ints([[2, 2], [2, 2], [2, 2]], 2), [1, 0, 2])
    assert index.row_to_source.tolist() == [0, 1, 2]
    assert index.source_to_rows.tolist() == [[-1, -1, 0], [-1, -1, 1], [-1, -1, 2]]
    assert counts.tolist() == [0, 0, 3]


@pytest.mark.parametrize("devices", [1, 3])
def test_device_rows_without_tokens(devices: int) -> None:
    index, counts = device_rows(ints([], 4), list(range(devices)))
    assert index.row_to_source.shape == (0,)
    assert index.source_to_rows.shape == (0, devices)
    assert counts.tolist() == [0] * devices


def test_row_experts_home_first() -> None:
    """L = 2, so slots 0 1 | 2 3 | 4 5; rank 1 has rows (t0,d1) | (t1,d0) | (t0,d2) (t1,d2)."""
    slots = ints([[3, 4, 2], [1, 5, 4]], 3)
    index, counts = device_rows(slots // 2, [1, 0, 2])
    ids, rows, columns = row_experts(index, slots, [1, 0, 2], 2)
    assert counts.tolist() == [1, 1, 2]
    assert ids.tolist() == [[1, 0], [1, -1], [0, -1], [1, 0]]
    assert rows.tolist() == [[0, 2, 0], [1, 3, 3]]
    assert columns.tolist() == [[0, 0, 1], [0, 0, 1]]


@pytest.mark.parametrize(("k", "local", "width"), [(1, 4, 1), (3, 2, 2), (6, 3, 3)])
def test_row_experts_has_room_for_min_k_l(k: int, local: int, width: int) -> None:
    slots = ints([list(range(k))], k)
    order = [0, 1]
    index, _ = device_rows(slots // local, order)
    assert row_experts(index, slots, order, local)[0].shape == (index.row_to_source.numel(), width)


def test_row_experts_without_tokens() -> None:
    slots = ints([], 3)
    index, _ = device_rows(slots // 2, [1, 0])
    ids, rows, columns = row_experts(index, slots, [1, 0], 2)
    assert ids.shape == (0, 2)
    assert rows.shape == columns.shape == (0, 3)


def test_expert_rows_with_an_unused_expert() -> None:
    """Expert 0: rows 1, 2; expert 1: none; expert 2: rows 0, 2."""
    index, entries, counts = expert_rows(ints([[2, -1], [0, -1], [2, 0]], 2), 3)
    assert counts.tolist() == [2, 0, 2]
    assert index.row_to_source.tolist() == [1, 2, 0, 2]
    assert entries.tolist() == [2, 5, 0, 4]
    assert index.source_to_rows.tolist() == [[2, -1], [0, -1], [3, 1]]


@pytest.mark.parametrize("rows", [0, 5])
def test_expert_rows_when_nothing_is_chosen(rows: int) -> None:
    index, entries, counts = expert_rows(ints([[-1, -1]] * rows, 2), 3)
    assert index.row_to_source.shape == entries.shape == (0,)
    assert index.source_to_rows.tolist() == [[-1, -1]] * rows
    assert index.source_to_rows.shape == (rows, 2)
    assert counts.tolist() == [0, 0, 0]


def test_expert_rows_all_to_one_expert() -> None:
    index, entries, counts = expert_rows(ints([[1]] * 7, 1), 2)
    assert index.row_to_source.tolist() == entries.tolist() == list(range(7))
    assert counts.tolist() == [0, 7]


@given(choices())
@settings(max_examples=80, deadline=None)
def test_device_rows_against_a_loop(choice: Choice) -> None:
    index, counts = device_rows(choice.slots_TK // choice.local, choice.order)
    row_to_token, table, expected = loop_device_rows(choice.devices, choice.order)
    assert index.row_to_source.tolist() == row_to_token
    assert index.source_to_rows.tolist() == table
    assert counts.tolist() == expected


@given(choices())
@settings(max_examples=80, deadline=None)
def test_row_experts_against_a_loop(choice: Choice) -> None:
    index, _ = device_rows(choice.slots_TK // choice.local, choice.order)
    ids, rows, columns = row_experts(index, choice.slots_TK, choice.order, choice.local)
    width = min(choice.k, choice.local)
    expected_ids, expected_rows, expected_columns = loop_row_experts(choice.slots, choice.order, choice.local)
    assert ids.tolist() == [row + [-1] * (width - len(row)) for row in expected_ids]
    assert rows.tolist() == expected_rows
    assert columns.tolist() == expected_columns


@given(received_ids())
@settings(max_examples=80, deadline=None)
def test_expert_rows_against_a_loop(received: tuple[Tensor, int]) -> None:
    ids, local = received
    index, entries, counts = expert_rows(ids, local)
    row_to_source, table, expected_entries, expected_counts = loop_expert_rows(ids.tolist(), local)
    assert index.row_to_source.tolist() == row_to_source
    assert index.source_to_rows.tolist() == table
    assert entries.tolist() == expected_entries
    assert counts.tolist() == expected_counts


@given(choices())
@settings(max_examples=80, deadline=None)
def test_device_rows_properties(choice: Choice) -> None:
    index, counts = device_rows(choice.slots_TK // choice.local, choice.order)
    check_transposes(index)
    # one row a distinct device of a token, -1 exactly where a token does not go
    distinct = [set(row) for row in choice.devices]
    assert index.row_to_source.numel() == int(counts.sum()) == sum(map(len, distinct))
    goes = [[device in used for device in choice.order] for used in distinct]
    assert (index.source_to_rows >= 0).tolist() == goes
    # device by device, tokens ascend within each
    device_of_row = [d for d, n in zip(range(len(choice.order)), counts.tolist(), strict=True) for _ in range(n)]
    keys = list(zip(device_of_row, index.row_to_source.tolist(), strict=True))
    assert all(a < b for a, b in pairwise(keys))


@given(choices())
@settings(max_examples=80, deadline=None)
def test_row_experts_loses_no_assignment(choice: Choice) -> None:
    index, counts = device_rows(choice.slots_TK // choice.local, choice.order)
    ids, rows, columns = row_experts(index, choice.slots_TK, choice.order, choice.local)
    # reading back through (row, column) gives the slots, and nothing else is in the table
    device_of_row = torch.tensor(choice.order).repeat_interleave(counts)
    assert torch.equal(device_of_row[rows] * choice.local + ids[rows, columns], choice.slots_TK)
    assert int((ids >= 0).sum()) == choice.slots_TK.numel()
    # every row carries something, padding only at the end
    assert (ids[:, 0] >= 0).all()
    assert ((ids[:, 1:] < 0) | (ids[:, :-1] >= 0)).all()


@given(received_ids())
@settings(max_examples=80, deadline=None)
def test_expert_rows_properties(received: tuple[Tensor, int]) -> None:
    ids, local = received
    index, entries, counts = expert_rows(ids, local)
    check_transposes(index)
    assert torch.equal(index.source_to_rows >= 0, ids >= 0)
    # expanded rows in the order of their experts, rows ascending within each
    expert_X = ids.reshape(-1)[entries]
    assert torch.equal(expert_X, torch.arange(local).repeat_interleave(counts))
    keys = list(zip(expert_X.tolist(), index.row_to_source.tolist(), strict=True))
    assert all(a < b for a, b in pairwise(keys))


@given(choices())
@settings(max_examples=60, deadline=None)
def test_states_only_grow(choice: Choice) -> None:
    """rows(original) <= rows(simplified) <= rows(expanded), over all devices together."""
    index, counts = device_rows(choice.slots_TK // choice.local, choice.order)
    ids, _, _ = row_experts(index, choice.slots_TK, choice.order, choice.local)
    blocks = ids.split(counts.tolist())
    expanded = sum(expert_rows(block, choice.local)[0].row_to_source.numel() for block in blocks)
    assert len(choice.slots) <= index.row_to_source.numel() <= expanded == choice.slots_TK.numel()


@pytest.mark.parametrize("wrong", [4, 5, 400])
def test_an_expert_of_another_device_is_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"local expert id {wrong} on a device of 4"):
        expert_rows(torch.tensor([[0, -1], [3, wrong]]), 4)
