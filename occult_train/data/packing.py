"""Examples (a prompt and its response) laid whole into pieces of equal length, with the loss on responses alone.

Legend: S sequence length, D examples, P pieces of an epoch. A piece has room for S + 1 tokens, of which the first S
are inputs and the last S labels. What is left of it is padding, which no loss counts.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from occult_train.data.indexed import IndexedReader
from occult_train.errors import DataError


class Packing:
    """How a corpus of examples fills pieces: the longest first, each where the least room is left for it.

    The number of pieces follows from the examples' lengths, not from their order. An example longer than S + 1 tokens
    loses its end; one of whose response nothing would be left is left out.

    Args:
        reader: the corpus, opened with its prompts.
        sequence_length: S.

    Raises:
        DataError: no example is left.
    """

    def __init__(self, reader: IndexedReader, sequence_length: int) -> None:
        assert reader.prompts is not None
        self.reader, self.room = reader, sequence_length + 1
        lengths = np.diff(reader.offsets)
        taken = np.minimum(lengths, self.room)
        self.kept = np.flatnonzero(np.maximum(reader.prompts, 1) < taken)
        self.left_out = len(lengths) - len(self.kept)
        self.cut = int((lengths[self.kept] > self.room).sum())
        if not len(self.kept):
            raise DataError(
                f"{reader.bin_path} has no example whose prompt is shorter than the {self.room} tokens of one sample "
                f"(data.sequence_length={sequence_length} plus 1)"
            )
        self.sizes: NDArray[np.int64] = taken[self.kept]
        piece_of = np.array(pack(np.sort(self.sizes)[::-1].tolist(), self.room))
        self._by_piece = np.argsort(piece_of, kind="stable")
        self.pieces = int(piece_of.max()) + 1
        self._bounds = np.searchsorted(piece_of[self._by_piece], np.arange(self.pieces + 1))

    @property
    def remark(self) -> str:
        """What of the corpus is not used; empty if all is."""
        if not self.cut and not self.left_out:
            return ""
        text = f"{self.reader.bin_path}: {self.cut} of {len(self.reader)} examples end behind data.sequence_length and"
        return f"{text} are cut there, {self.left_out} are left out, whose prompts alone are as long"

    def laid(self, order: NDArray[np.int64]) -> "Packs":
        """The pieces, where examples of equal length take places in the order `order` [D]."""
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        longest_first = self.kept[np.lexsort((rank[self.kept], -self.sizes))]
        return Packs(self, longest_first[self._by_piece], self._bounds, rank)


class Packs:
    """Pieces to read. `examples` are those of all pieces, one piece after the other, which `bounds` [P + 1] part."""

    def __init__(
        self, packing: Packing, examples: NDArray[np.int64], bounds: NDArray[np.int64], rank: NDArray[np.int64]
    ) -> None:
        self.reader, self.room = packing.reader, packing.room
        self._examples, self._bounds, self._rank = examples, bounds, rank

    def piece(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Of each of S + 1 places the token, the example it is of, counted from 0, and whether a loss predicts it."""
        examples = self._examples[self._bounds[number] : self._bounds[number + 1]]
        tokens, counted = np.empty(self.room, np.int64), np.zeros(self.room, np.bool_)
        documents, at = np.full(self.room, len(examples)), 0
        for place, example in enumerate(examples[np.argsort(self._rank[examples])].tolist()):
            begin, end = self.reader.offsets[example : example + 2].tolist()
            stop = min(at + end - begin, self.room)
            tokens[at:stop] = self.reader.read(begin, begin + stop - at)
            documents[at:stop] = place
            assert self.reader.prompts is not None
            # an example's first token would be predicted from the one before it
            counted[at + max(int(self.reader.prompts[example]), 1) : stop] = True
            at = stop
        tokens[at:] = tokens[at - 1]
        return tokens, documents, counted


def pack(sizes: Sequence[int], room: int) -> list[int]:
    """The piece of each item, best fit: the fullest piece that still has room, else a new one.

    Args:
        sizes: from 1 to room, in descending order.
        room: of a piece.
    """
    found, pieces = [], 0
    with_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys, ascending
    for size in sizes:
        at = bisect_left(rooms, size)
        left = rooms[at] if at < len(rooms) else room
        if at < len(rooms):
            piece = with_room[left].pop()
            if not with_room[left]:
                del with_room[rooms.pop(at)]
        else:
            piece, pieces = pieces, pieces + 1
        left -= size
        if left:
            if left not in with_room:
                insort(rooms, left)
            with_room.setdefault(left, []).append(piece)
        found.append(piece)
    return found
