"""Parts that a client of Kafka gives the log, and that the log gives a client."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from streaming.log.protocol import Follower, Positions, Reader, Transactor


class Membership(NamedTuple):
    """Identity under which positions of a group are committed.

    Attributes:
        group: Name of the group.
        generation: Generation of the group, -1 for a committer that did not join.
        member: Id of the member, empty for a committer that did not join.
    """

    group: str
    generation: int = -1
    member: str = ""


@runtime_checkable
class GroupReader(Protocol):
    """Reader whose positions a transaction can commit."""

    def committable(self) -> Positions:
        """Returns `position()`. Raises LogError if this reader may not commit it."""
        ...

    def membership(self) -> Membership:
        """Returns the identity that the broker compares with the group's state."""
        ...

    def returned(self) -> int:
        """Returns the number of messages returned so far, to be passed to `settle` when they are committed."""
        ...

    def settle(self, returned: int) -> None:
        """Notes that the first `returned` messages are before the committed position."""
        ...


class MessagePlaces(Protocol):
    """Part of the log that a transaction needs."""

    def place(self, topic: str, key: bytes | None, value: bytes, partition: int | None = None) -> int | None:
        """Checks a message and returns its partition. None: the key chooses, as Java clients do.

        Raises:
            LogError: The topic or the partition does not exist.
            OversizedError: The message is larger than the log accepts.
        """
        ...


class StreamClient(Protocol):
    """Client that sole readers, followers and transactors run on."""

    name: str

    def sole_reader(self, partitions: Sequence[tuple[str, int]], *, group: str, start: Positions | None) -> Reader:
        """Returns a reader of all these partitions; see `EventLog.reader`."""
        ...

    def follow(self, topic: str, starts: Mapping[int, int]) -> Follower:
        """Returns a follower from the offset of each partition on; see `EventLog.follow`."""
        ...

    def transactor(self, transactional_id: str, places: MessagePlaces) -> Transactor:
        """Returns a transactor; see `EventLog.transactor`."""
        ...
