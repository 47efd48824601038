"""What really crossed the network, counted where it is handed to the collective."""

from dataclasses import dataclass, field

PASSES = ("dispatch", "combine", "combine_backward", "dispatch_backward")
"""The four exchanges of a MoE layer in the order in which they happen: x out, y back, dy out, dx back."""


@dataclass
class Traffic:
    """Rows and bytes that this rank sent to and received from *other* ranks, by pass.

    Rows count token vectors. Bytes count everything in the collectives of the pass, metadata included.
    """

    rows_sent: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PASSES, 0))
    rows_between_nodes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PASSES, 0))
    """Of those sent, rows to ranks of other nodes."""
    rows_received: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PASSES, 0))
    bytes_sent: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PASSES, 0))

    def add_rows(self, name: str, sent: int, received: int, between_nodes: int = 0) -> None:
        """Count token rows of pass `name`."""
        self.rows_sent[name] += sent
        self.rows_between_nodes[name] += between_nodes
        self.rows_received[name] += received

    def add_bytes(self, name: str, sent: int) -> None:
        """Count bytes handed to a collective in pass `name`."""
        self.bytes_sent[name] += sent

    def drain(self) -> "Traffic":
        """Return the counts so far and start again from zero."""
        tables = (self.rows_sent, self.rows_between_nodes, self.rows_received, self.bytes_sent)
        taken = Traffic(*map(dict, tables))
        for counts in tables:
            for name in counts:
                counts[name] = 0
        return taken
