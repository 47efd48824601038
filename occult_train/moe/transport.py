"""How the fused layer's rows cross the network: packed into one payload a direction, own rows never among them.

Both transports give the same rows in the same order. A row on the wire is the token and, on its way out, the expanded
positions and weights of its experts; on its way back in backward, its weight gradients (kernels/movers, `Wire`).
"""

import os
import shutil
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from occult_train.kernels.movers import kernel as movers
from occult_train.kernels.movers.reference import Wire
from occult_train.moe.routes import Counts, Room, Routes, all_gather
from occult_train.parallel.grid import Grid
from occult_train.parallel.queues import Driver, Meeting
from occult_train.parallel.staged import SHARED_MEMORY, HostAllToAll, bytes_needed
from occult_train.parallel.traffic import Traffic


@dataclass(frozen=True)
class Back:
    """Expanded rows of which each arrived row gets the sum: see movers.merge."""

    rows: list[Tensor]
    position_RK: Tensor
    start: int
    weight_RK: Tensor | None = None
    scalar_X: Tensor | None = None


class Exchange(Protocol):
    """One pass out and one back for the tokens of one forward, or of its backward."""

    shared: bool
    """Whether what arrives lies in memory that the next pass overwrites."""

    def fits(self, room: Room) -> bool:
        """Whether `go` may be called with a guess first, and has room for as many rows; alike on all ranks."""
        ...

    def go(self, counts: Counts) -> None:
        """What `begin` had to leave until the host knows the counts. Collective."""
        ...

    def arrived(self, chunk: int) -> Tensor:
        """Rows on the wire of a chunk [R_c, W], by source, then token. Waits for them."""
        ...

    def give_back(self, chunk: int, back: Back) -> None:
        """Send sums back to where each row of the chunk came from."""
        ...

    def returned(self) -> Tensor | None:
        """Rows that came back [S, W], in the order in which they were sent. Waits for them."""
        ...


class Transport(Protocol):
    """Makes exchanges."""

    traffic: Traffic
    one_sided: bool
    """Whether rows can travel before the host knows their number."""

    def gather(self, numbers: Tensor, grid: Grid) -> Tensor:
        """As routes.all_gather. Collective."""
        ...

    def begin(
        self,
        x_TH: Tensor,
        routes: Routes,
        wires: tuple[Wire, Wire],
        passes: tuple[str, str],
        weight_TK: Tensor | None,
        own: movers.Own | None,
    ) -> Exchange:
        """Start to send tokens out, with their experts' positions and weights if weights are given. Collective, and
        the host waits for nothing.

        Args:
            wires: rows out and rows back.
            passes: names of the two passes in `Traffic`.
            own: where to copy tokens for the experts of this device, too.
        """
        ...


def devices_of_one_host(grid: Grid) -> list[int]:
    """CUDA devices of the group's ranks if all run on one host with one each, else none. Collective."""
    if not torch.cuda.is_available() or grid.expert_size == 1:
        return []
    found: list[Any] = [None] * grid.expert_size
    dist.all_gather_object(found, (os.uname().nodename, torch.cuda.current_device()), group=grid.expert_group)
    one_host = len({host for host, _ in found}) == 1 and len(set(found)) == len(found)
    return [device for _, device in found] if one_host else []


def _all_say(answer: bool, grid: Grid) -> bool:
    answers: list[Any] = [None] * grid.expert_size
    dist.all_gather_object(answers, answer, group=grid.expert_group)
    return all(answers)


def _pack(
    x: Tensor, routes: Routes, out: Any, wire: Wire, weight_TK: Tensor | None, own: movers.Own | None, tokens: slice
) -> None:
    g = routes.geometry
    more: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if weight_TK is not None:
        more = (routes.position_TK[tokens], routes.slots_TK[tokens], weight_TK[tokens])
    own = None if own is None else own.of(tokens)
    movers.pack(x[tokens], routes.send_TD[tokens], out, wire, *more, local=g.local, own=own)


class CollectiveTransport:
    """All-to-all, one call a chunk and direction, asynchronous."""

    one_sided = False

    def __init__(self, grid: Grid, traffic: Traffic) -> None:
        self.grid, self.traffic = grid, traffic

    def gather(self, numbers: Tensor, grid: Grid) -> Tensor:
        """As `Transport.gather`."""
        return all_gather(numbers, grid)

    def move(self, target: Tensor, source: Tensor, arrives: list[int], sends: list[int]) -> Any:
        """Start an all-to-all of rows; the result has `wait()`. By the process group's own."""
        return dist.all_to_all_single(target, source, arrives, sends, group=self.grid.expert_group, async_op=True)

    def begin(
        self,
        x_TH: Tensor,
        routes: Routes,
        wires: tuple[Wire, Wire],
        passes: tuple[str, str],
        weight_TK: Tensor | None,
        own: movers.Own | None,
    ) -> "CollectiveExchange":
        """As `Transport.begin`: rows are packed."""
        g, wire = routes.geometry, wires[0]
        payload = wire.empty(x_TH.shape[0] * (g.devices - 1), x_TH)
        if g.devices == 1 and own is not None:
            movers.expand(x_TH, own.position_TK, own.rows_XH, own.weight_TK, own.weight_X)
        for c in range(g.chunks if g.devices > 1 else 0):
            _pack(x_TH, routes, payload, wire, weight_TK, own, slice(c * g.chunk_tokens, (c + 1) * g.chunk_tokens))
        return CollectiveExchange(self, payload, wires[1], passes)


class CollectiveExchange:
    """See `Exchange`."""

    shared = False
    counts: Counts

    def __init__(self, transport: CollectiveTransport, payload: Tensor, back: Wire, passes: tuple[str, str]) -> None:
        self.transport, self.payload, self.back, self.passes = transport, payload, back, passes
        self._out: list[tuple[Any, Tensor]] = []
        self._back: list[Any] = []
        self._returned: Tensor | None = None
        self._kept = [payload]

    def fits(self, room: Room) -> bool:
        """As `Exchange.fits`: an all-to-all must know the counts."""
        return False

    def go(self, counts: Counts) -> None:
        """As `Exchange.go`: all chunks are sent."""
        self.counts = counts
        if counts.segments[-1].chunk is None:
            return
        inbox = self.payload.new_empty(counts.arrived, self.payload.shape[1])
        for c, (sends, arrives) in enumerate(zip(counts.sends_CD, counts.arrives_CD, strict=True)):
            target = inbox[counts.arrived_slice(c)]
            work = self._move(target, self.payload[counts.sent_slice(c)], arrives, sends, self.passes[0])
            self._out.append((work, target))

    def arrived(self, chunk: int) -> Tensor:
        """As `Exchange.arrived`."""
        work, rows = self._out[chunk]
        work.wait()
        return rows

    def give_back(self, chunk: int, back: Back) -> None:
        """As `Exchange.give_back`."""
        counts, wire = self.counts, self.back
        if self._returned is None:
            self._returned = wire.empty(counts.sent, back.rows[0])
        rows = wire.empty(back.position_RK.shape[0], back.rows[0])
        movers.merge(back.rows, back.position_RK, rows, wire, back.weight_RK, back.scalar_X, back.start)
        target = self._returned[counts.sent_slice(chunk)]
        sends, arrives = counts.arrives_CD[chunk], counts.sends_CD[chunk]
        self._back.append(self._move(target, rows, arrives, sends, self.passes[1]))
        self._kept.append(rows)

    def returned(self) -> Tensor | None:
        """As `Exchange.returned`."""
        for work in self._back:
            work.wait()
        self._kept.clear()
        return self._returned

    def _move(self, target: Tensor, source: Tensor, arrives: list[int], sends: list[int], name: str) -> Any:
        traffic = self.transport.traffic
        traffic.add_rows(name, source.shape[0], target.shape[0])
        traffic.add_bytes(name, source.numel() * source.element_size())
        return self.transport.move(target, source, arrives, sends)


class HostTransport(CollectiveTransport):
    """The same through pinned host memory, by copy engines: for the GPUs of one host without peer access."""

    def __init__(self, grid: Grid, traffic: Traffic) -> None:
        super().__init__(grid, traffic)
        if grid.expert_group not in _RINGS:
            _RINGS[grid.expert_group] = HostAllToAll(grid)
        self.move = _RINGS[grid.expert_group]  # type: ignore[method-assign]

    @staticmethod
    def available(grid: Grid) -> bool:
        """Whether the group's GPUs are of one host, which has shared memory for the rings left, if there are none.
        Collective."""
        devices = devices_of_one_host(grid)
        made = grid.expert_group in _RINGS
        room = not devices or made or shutil.disk_usage(SHARED_MEMORY).free >= bytes_needed(grid.expert_size)
        return _all_say(bool(devices) and room, grid)


_RINGS: dict[Any, HostAllToAll] = {}


class SymmetricTransport:
    """One-sided: kernels write rows straight into the other devices' memory, over NVLink.

    Three buffers a process group, shared by all layers: for rows out, rows back, and counts. Each pass ends in a
    barrier of all devices, after which its rows may be read; the other buffer's barrier tells that they have been.
    """

    one_sided = True

    def __init__(self, grid: Grid, traffic: Traffic) -> None:
        self.grid, self.traffic = grid, traffic
        self.boxes = (SymmetricBox.of(grid, "out"), SymmetricBox.of(grid, "back"))
        self.counts = SymmetricBox.of(grid, "counts")

    @staticmethod
    def available(grid: Grid) -> bool:
        """Whether all devices of the group can write each other's memory, and may. NCCL_P2P_DISABLE=1 forbids it.
        Collective."""
        devices = devices_of_one_host(grid)
        here = torch.cuda.current_device() if devices else -1
        allowed = os.environ.get("NCCL_P2P_DISABLE") != "1"
        reach = allowed and all(p == here or torch.cuda.can_device_access_peer(here, p) for p in devices)
        return _all_say(reach and bool(devices), grid)

    def gather(self, numbers: Tensor, grid: Grid) -> Tensor:
        """As `Transport.gather`: a view of one of two places that take turns, good until the next gathering but one.

        Whoever passes the barrier of a gathering knows that all have read what the one before brought.
        """
        box, devices, count = self.counts, grid.expert_size, numbers.numel()
        box.reserve(2 * devices * count * numbers.itemsize, agreed=True)
        box.turn = 1 - box.turn
        first = box.turn * devices * count
        movers.share(numbers, box.address_D, first + grid.expert_rank * count)
        box.barrier()
        return box.numbers(first, devices * count).view(devices, *numbers.shape)

    def begin(
        self,
        x_TH: Tensor,
        routes: Routes,
        wires: tuple[Wire, Wire],
        passes: tuple[str, str],
        weight_TK: Tensor | None,
        own: movers.Own | None,
    ) -> "SymmetricExchange":
        """As `Transport.begin`: rows are written, as many as fit."""
        self.boxes[0].reserve(x_TH.shape[0] * (routes.geometry.devices - 1) * wires[0].nbytes, agreed=False)
        exchange = SymmetricExchange(self, routes, wires, passes, (x_TH, weight_TK))
        exchange.write(own)
        return exchange


class SymmetricExchange:
    """See `Exchange`; one chunk."""

    shared = True
    counts: Counts

    def __init__(
        self,
        transport: SymmetricTransport,
        routes: Routes,
        wires: tuple[Wire, Wire],
        passes: tuple[str, str],
        sources: tuple[Tensor, Tensor | None],
    ) -> None:
        self.transport, self.routes, self.wires, self.passes = transport, routes, wires, passes
        self._sources = sources

    def write(self, own: movers.Own | None = None) -> None:
        """Write all rows that fit, and wait, on the device, until all have done so."""
        box, wire, (x_TH, weight_TK) = self.transport.boxes[0], self.wires[0], self._sources
        peers = movers.Peers(box.address_D, self.routes.layout.put_D, box.nbytes // wire.nbytes)
        _pack(x_TH, self.routes, peers, wire, weight_TK, own, slice(None))
        box.barrier()

    def fits(self, room: Room) -> bool:
        """As `Exchange.fits`."""
        return room.rows * self.wires[0].nbytes <= self.transport.boxes[0].nbytes

    def go(self, counts: Counts) -> None:
        """As `Exchange.go`: if the rows did not fit, all ranks know it, enlarge the buffers and write again."""
        self.counts = counts
        if counts.guessed:
            return
        box, out = self.transport.boxes[0], self.wires[0]
        if counts.most_rows * out.nbytes > box.nbytes:
            box.reserve(counts.most_rows * out.nbytes, agreed=True)
            self.write()
        there_and_back = ((counts.sent, counts.arrived), (counts.arrived, counts.sent))
        for name, wire, (sent, arrived) in zip(self.passes, self.wires, there_and_back, strict=True):
            self.transport.traffic.add_rows(name, sent, arrived)
            self.transport.traffic.add_bytes(name, sent * wire.nbytes)

    def arrived(self, chunk: int) -> Tensor:
        """As `Exchange.arrived`: a view of the shared buffer, good until the next pass out."""
        return self.transport.boxes[0].rows(self.counts.arrived, self.wires[0])

    def give_back(self, chunk: int, back: Back) -> None:
        """As `Exchange.give_back`."""
        box, wire, layout = self.transport.boxes[1], self.wires[1], self.routes.layout
        box.reserve(self.counts.most_rows * wire.nbytes, agreed=True)
        peers = movers.Peers(box.address_D, layout.back_D, box.nbytes // wire.nbytes)
        movers.merge(
            back.rows, back.position_RK, peers, wire, back.weight_RK, back.scalar_X, back.start, layout.arrive_D
        )
        box.barrier()

    def returned(self) -> Tensor:
        """As `Exchange.returned`: a view of the shared buffer, good until the next pass back."""
        return self.transport.boxes[1].rows(self.counts.sent, self.wires[1])


class SymmetricBox:
    """A buffer in symmetric memory, alike on all devices of a group, that grows and never shrinks."""

    address_D: Tensor
    """[D] int64, where it begins in each device's memory, as seen from here."""
    grain = 2**20
    """Bytes of which its size is a multiple."""
    visible = False
    """Whether a kernel shows in profiles when a barrier was passed."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.nbytes = 0
        self.turn = 0
        """Of two places, for whoever uses it so."""
        self._memory: Any = None
        self._meeting: Meeting

    @classmethod
    def of(cls, grid: Grid, name: str) -> "SymmetricBox":
        """The box of this name that all layers of a group share."""
        return _BOXES.setdefault((grid.expert_group, name), cls(grid))

    def reserve(self, nbytes: int, agreed: bool) -> None:
        """Make room for nbytes, and for a barrier if there are none. Collective when it grows.

        Args:
            agreed: all ranks ask for the same number; else they agree on the largest, but only while there is none.
        """
        if self.nbytes and (nbytes <= self.nbytes or not agreed):
            return
        if not agreed:
            wanted = torch.tensor([nbytes], device=_device())
            dist.all_reduce(wanted, dist.ReduceOp.MAX, group=self.grid.expert_group)
            nbytes = int(wanted)
        nbytes = max(nbytes, 1)
        if nbytes > self.nbytes:
            self._grow(-(-nbytes // self.grain) * self.grain)

    def _grow(self, nbytes: int) -> None:
        import torch.distributed._symmetric_memory as symmetric

        torch.cuda.synchronize()
        dist.barrier(group=self.grid.expert_group)
        flags = 4 * self.grid.expert_size
        self._memory = symmetric.empty(nbytes + flags, dtype=torch.uint8, device=_device())
        self._memory[nbytes:].zero_()
        torch.cuda.synchronize()  # before anyone can reach them
        addresses = [int(a) for a in symmetric.rendezvous(self._memory, self.grid.expert_group).buffer_ptrs]
        self.address_D = torch.tensor(addresses, device=_device())
        self._meeting = Meeting(self.grid.expert_rank, [address + nbytes for address in addresses], Driver())
        self.nbytes = nbytes

    def rows(self, count: int, wire: Wire) -> Tensor:
        """The first rows on the wire [count, W], a view."""
        if count == 0:
            return torch.empty(0, wire.width, dtype=wire.dtype, device=_device())
        return self._memory[: count * wire.nbytes].view(wire.dtype).view(count, wire.width)

    def numbers(self, first: int, count: int) -> Tensor:
        """[count] int32 from the first-th on, a view."""
        found: Tensor = self._memory[: self.nbytes].view(torch.int32)[first : first + count]
        return found

    def barrier(self) -> None:
        """All devices of the group have come this far, on their current streams."""
        self._meeting(torch.cuda.current_stream().cuda_stream)
        if self.visible:
            torch.cuda._sleep(1)


_BOXES: dict[tuple[Any, str], SymmetricBox] = {}


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
