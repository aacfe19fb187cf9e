"""Seat: the share of this process, and its connections to the other processes."""

from dataclasses import dataclass, field

from streaming.ranks.deal import Deal
from streaming.ranks.peers import NoPeers, StreamPeers


@dataclass(frozen=True)
class Seat:
    """Place of a process among the N processes of a stream.

    Attributes:
        deal: Share of this process.
        peers: Connections to the other processes.
    """

    deal: Deal = field(default_factory=Deal)
    peers: StreamPeers = field(default_factory=NoPeers)

    @property
    def leads(self) -> bool:
        """True for the process that reads the inputs, pins the steps and writes the records."""
        return self.deal.rank == 0
