"""How many groups (devices, or nodes) the K-sets touch, kept up to date while experts change places.

E experts, G groups, U distinct sets of K experts with weights; `group_E[e]` is where expert e is. The cost is
Σ_u weight_u · |groups(u)|: with devices for groups, C_T times the sum of weights.
"""

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Sets:
    """Distinct sets with weights, and which of them each expert is in. Immutable; shared by spreads.

    Args:
        members_UK: [U, K] experts of each set.
        weight_U: [U] how often each occurs; whole numbers.
        experts: E.
    """

    def __init__(self, members_UK: npt.NDArray[np.int16], weight_U: Floats, experts: int) -> None:
        self.members_UK, self.weight_U, self.experts = members_UK, weight_U, experts
        expert = self.members_UK.ravel()
        order = np.argsort(expert, kind="stable")
        self._rows = (order // max(self.members_UK.shape[1], 1)).astype(np.int32)
        self._start = np.concatenate(([0], np.cumsum(np.bincount(expert, minlength=experts))))

    @classmethod
    def of(cls, sets_NK: npt.NDArray[np.integer], experts: int) -> "Sets":
        """From the experts of N tokens [N, K], in ascending order for each token."""
        return cls(*distinct(sets_NK), experts)

    def sample(self, size: int, random: np.random.Generator) -> "Sets":
        """At most `size` of the sets, drawn by weight; each that is drawn keeps how often it was."""
        rows = self.weight_U.size
        if rows <= size:
            return self
        drawn = random.choice(rows, size, p=self.weight_U / self.weight_U.sum())
        chosen, times = np.unique(drawn, return_counts=True)
        return Sets(self.members_UK[chosen], times.astype(np.float64), self.experts)

    @property
    def pins_moved(self) -> float:
        """Members of sets that an exchange of two experts has to recount, on average."""
        return 2 * self.members_UK.size * self.members_UK.shape[1] / self.experts

    @property
    def total(self) -> float:
        """Sum of weights: tokens."""
        return float(self.weight_U.sum())

    def rows_of(self, expert: int) -> npt.NDArray[np.int32]:
        """Sets that hold an expert, ascending."""
        return self._rows[self._start[expert] : self._start[expert + 1]]


def distinct(sets_NK: npt.NDArray[np.integer]) -> tuple[npt.NDArray[np.int16], Floats]:
    """Distinct rows [U, K] int16 in ascending order and how often each occurs [U]."""
    rows_NK = np.ascontiguousarray(sets_NK, dtype=">i2")  # big-endian bytes compare as the numbers do
    n, k = rows_NK.shape
    if n == 0 or k == 0:
        return np.zeros((0, k), np.int16), np.zeros(0)
    packed, times = np.unique(rows_NK.view(f"V{2 * k}").ravel(), return_counts=True)
    return packed.view(">i2").reshape(-1, k).astype(np.int16), times.astype(np.float64)


def group_counts(sets: Sets, group_E: Ints, groups: int) -> npt.NDArray[np.int8]:
    """How many members of each set are in each group [U, G]."""
    rows = sets.members_UK.shape[0]
    flat = (np.arange(rows)[:, None] * groups + group_E[sets.members_UK]).ravel()
    return np.bincount(flat, minlength=rows * groups).astype(np.int8).reshape(rows, groups)


def touched(sets: Sets, group_E: Ints, groups: int) -> float:
    """Σ_u weight_u · |groups(u)|."""
    return float(((group_counts(sets, group_E, groups) > 0).sum(1) * sets.weight_U).sum())


class Spread:
    """The cost of one grouping of the experts, and of every exchange of two of them.

    `zero_EG[e, g]` is the weight of sets with e that do not touch group g; `alone_EE[e, f]` that of sets with e and f
    in which e is the only one of its group. Exchanging a of group A with b of group B changes the cost by
    zero[a, B] + zero[b, A] − alone[a, a] − alone[b, b] + alone[a, b] + alone[b, a]:
    a adds B where nothing of B was and frees A where it was alone, b likewise, and sets with both stay as they are.
    Weights are whole numbers, so sums in fp64 are exact.
    """

    def __init__(self, sets: Sets, group_E: Ints, groups: int) -> None:
        self.sets, self.group_E, self.groups = sets, group_E.copy(), groups
        experts, rows = sets.experts, sets.members_UK.shape[0]
        self.counts_UG = group_counts(sets, self.group_E, groups)
        self.cost = float(((self.counts_UG > 0).sum(1) * sets.weight_U).sum())
        self.zero_EG = np.zeros((experts, groups))
        self.alone_EE = np.zeros((experts, experts))
        self._in_one = np.zeros(rows, dtype=bool)
        every = np.arange(rows, dtype=np.int32)
        for group in range(groups):
            self._count(every, group, 1.0)

    def changes(self) -> Floats:
        """Cost change of exchanging each two experts [E, E]; 0 for two of one group."""
        into_EE = self.zero_EG[:, self.group_E] + self.alone_EE
        gain_E = self.alone_EE.diagonal()
        change_EE = into_EE + into_EE.T - gain_E[:, None] - gain_E[None, :]
        change_EE[self.group_E[:, None] == self.group_E[None, :]] = 0.0
        return change_EE

    def exchange(self, a: int, b: int) -> None:
        """Exchange two experts of different groups."""
        group_a, group_b = int(self.group_E[a]), int(self.group_E[b])
        with_a, with_b = self.sets.rows_of(a), self.sets.rows_of(b)
        self._in_one[with_a] = True
        only_b = with_b[~self._in_one[with_b]]
        self._in_one[with_a] = False
        self._in_one[with_b] = True
        only_a = with_a[~self._in_one[with_a]]
        self._in_one[with_b] = False
        rows = np.concatenate((with_a, only_b))
        before = self._touched(rows, group_a, group_b)
        for group in (group_a, group_b):
            self._count(rows, group, -1.0)
        self.group_E[a], self.group_E[b] = group_b, group_a
        for some, source, target in ((only_a, group_a, group_b), (only_b, group_b, group_a)):
            self.counts_UG[some, source] -= 1
            self.counts_UG[some, target] += 1
        for group in (group_a, group_b):
            self._count(rows, group, 1.0)
        self.cost += self._touched(rows, group_a, group_b) - before

    def _touched(self, rows: npt.NDArray[np.int32], one: int, other: int) -> float:
        touched = (self.counts_UG[rows, one] > 0).astype(np.int64) + (self.counts_UG[rows, other] > 0)
        return float((touched * self.sets.weight_U[rows]).sum())

    def _count(self, rows: npt.NDArray[np.int32], group: int, sign: float) -> None:
        """Add what `rows` contribute, by touching a group not at all or in one expert, to the two tables."""
        experts, sets = self.sets.experts, self.sets
        count = self.counts_UG[rows, group]
        none, single = rows[count == 0], rows[count == 1]
        k = sets.members_UK.shape[1]
        weights = np.repeat(sets.weight_U[none], k)
        self.zero_EG[:, group] += sign * np.bincount(sets.members_UK[none].ravel(), weights, minlength=experts)
        members = sets.members_UK[single].astype(np.int64)
        here = self.group_E[members] == group
        pair = members[here][:, None] * experts + members
        weights = np.repeat(sets.weight_U[single], k)
        table = np.bincount(pair.ravel(), weights, minlength=experts * experts)
        self.alone_EE += sign * table.reshape(experts, experts)
