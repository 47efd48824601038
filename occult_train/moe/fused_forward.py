"""The fused layer's forward. Symbols as in `fused.py`."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from occult_train.kernels.movers import kernel as movers
from occult_train.kernels.movers.reference import Wire
from occult_train.moe.fused_steps import EXTRAS, Steps
from occult_train.moe.lane import HERE, Lane
from occult_train.moe.routes import Counts, Room, Routes, Segment
from occult_train.moe.transport import Back

if TYPE_CHECKING:
    from occult_train.moe.fused import FusedExperts


class Forward:
    """1 dispatch; for each segment 2 expand, 3 gate and up, SwiGLU, down, 4 merge and give back; 5 combine at home.

    The host knows the numbers of rows only once the routing has come back from the device, the one time it waits in a
    layer. A one-sided transport need not know them: room is made for as many rows as there were of late and some more,
    everything is launched, and only then the host waits, while the device is busy. If the room was too little, which
    all ranks find out alike, steps 2 to 5 are done again. A collective must know the numbers first; dispatch and the
    expansion of own rows are under way by then.
    """

    def __init__(
        self, layer: "FusedExperts", routes: Routes, x: Tensor, weights: Tensor, experts: tuple[Tensor, ...],
        keep: bool, lane: Lane = HERE,
    ) -> None:  # fmt: skip
        self.layer, self.routes, self.x, self.weights, self.keep, self.lane = layer, routes, x, weights, keep, lane
        self.experts = experts
        self.out, self.back = (Wire(x.shape[1], weights.shape[1], x.dtype, extras) for extras in (EXTRAS, 0))
        self.kept: list[Tensor] = []
        """For backward: of each segment the pre-activations, unless recomputed, then the rows that arrived."""
        self.own_y: list[Tensor] = []
        self._guessed: Room | None = None

    def run(self) -> Tensor:
        """[T, H]."""
        self.begin()
        self.send()
        self.compute()
        y = self.combine()
        return y if self.settle() else self.combine()

    def begin(self) -> None:
        """Step 1, as far as it goes without knowing numbers of rows."""
        room, passes = self.layer.room, ("dispatch", "combine")
        self.early_XH: Tensor | None = self.x.new_empty(room.expanded if room else 0, self.x.shape[1])
        own = movers.Own(self.routes.own_TK, self.early_XH)
        wires = self.out, self.back
        self.exchange = self.layer.transport.begin(self.x, self.routes, wires, passes, self.weights, own)

    def send(self) -> None:
        """The rest of step 1. The host waits if the room cannot be guessed."""
        room = self.layer.room
        if room is not None and self.exchange.fits(room):
            self._guessed = room
            self.steps = self._plan(room.guess())
        else:
            self._plan_counted(self._count())

    def settle(self) -> bool:
        """After step 4: wait for the counts if it was done on a guess. Returns whether that was right; if not, steps 2
        to 4 are done again, and step 5 is to be. Collective."""
        if self._guessed is None:
            return True
        counts = self._count()
        if self._guessed.holds(counts):
            self.steps = self._plan(counts)
            self._trim(counts)
            return True
        self.kept.clear()
        self._plan_counted(counts)
        self.compute()
        return False

    def compute(self) -> None:
        """Steps 2 to 4."""
        for g, segment in enumerate(self.steps.segments):
            arrived = None if segment.chunk is None else self.exchange.arrived(segment.chunk)
            y_XH = self._experts(g, self._expand(g, segment, arrived))
            if arrived is not None:
                self._give_back(segment, arrived, y_XH)
            if segment.own:
                self.own_y = [y_XH]
            del y_XH

    def combine(self) -> Tensor:
        """Step 5."""
        routes = self.routes
        returned = self.exchange.returned()
        return movers.combine(self.own_y, routes.own_TK, returned, routes.send_TD, self.back, self.weights)[0]

    def _count(self) -> Counts:
        """Waits for the device, and makes room for the next forward."""
        counts = self.routes.counts()
        self.layer.room = (self.layer.room or Room()).after(counts)
        return counts

    def _plan_counted(self, counts: Counts) -> None:
        if self.layer.transport.one_sided:
            self.routes = self.routes.with_all_room()
        self.steps = self._plan(counts)

    def _plan(self, counts: Counts) -> Steps:
        self.exchange.go(counts)
        return Steps(self.layer.matmul, self.layer.transport, self.routes, counts, self.layer.recompute)

    def _trim(self, counts: Counts) -> None:
        """Leave out what was room for more."""
        *activations, arrived = self.kept or [None]
        if arrived is not None:
            self.kept = [*(part[: counts.expanded] for part in activations), arrived[: counts.arrived]]

    def _expand(self, g: int, segment: Segment, arrived: Tensor | None) -> Tensor:
        """Step 2."""
        sources = self.steps.sources(segment, self.x, self.weights, arrived)
        early_XH, self.early_XH = self.early_XH, None
        if g == 0 and early_XH is not None and len(early_XH) >= segment.rows:
            return self.steps.expand(sources[1:], segment, early_XH[: segment.rows])
        return self.steps.expand(sources, segment, self.x.new_empty(segment.rows, self.x.shape[1]))

    def _experts(self, g: int, x_XH: Tensor) -> Tensor:
        """Step 3: [X, H] -> [X, H]."""
        keep = self.keep and not self.layer.recompute
        w1, w2, w3 = self.experts
        kept, h_XF = self.steps.activations(x_XH, w1, w3, g, keep)
        self.kept += kept
        return self.layer.matmul.nt(h_XF, w2, self.routes.layout.relative_GL[g])

    def _give_back(self, segment: Segment, arrived: Tensor, y_XH: Tensor) -> None:
        """Step 4."""
        if self.keep:  # first: once all have given back, peers may overwrite shared memory
            self.kept.append(arrived.clone() if self.exchange.shared else arrived)
        assert segment.chunk is not None
        position, weight = self.out.extra(arrived, 0, torch.int32), self.out.extra(arrived, 1, torch.float32)
        with self.lane.aside(y_XH):
            self.exchange.give_back(segment.chunk, Back([y_XH], position, segment.start, weight))
