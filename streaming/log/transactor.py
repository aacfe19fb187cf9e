"""Transactions of a client of Kafka: what all clients do alike. Only one transaction of a transactor is open."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from features.errors import FencedError, LogError
from streaming.log.client import GroupReader, Membership, MessagePlaces
from streaming.log.faults import foreign_reader, open_already
from streaming.log.protocol import Positions, Reader


class ClientTransaction(ABC):
    """Open transaction of a client; see `Transaction` for the contract.

    Args:
        doing: Operation that errors name.
        places: Log of the messages.
    """

    def __init__(self, doing: str, places: MessagePlaces) -> None:
        self._doing = doing
        self._places = places
        self._read: list[tuple[GroupReader, int]] = []

    @abstractmethod
    def append(self, topic: str, value: bytes, *, key: bytes | None = None, partition: int | None = None) -> None: ...

    def commit_offsets(self, reader: Reader) -> None:
        if not isinstance(reader, GroupReader):
            raise foreign_reader(reader)
        # The broker compares the generation in membership() with the group's. The group's name alone would skip this
        # check and let a reader that lost its partitions commit.
        self._send_positions(reader.membership(), reader.committable())
        self._read.append((reader, reader.returned()))

    def commit_positions(self, group: str, positions: Positions) -> None:
        self._send_positions(Membership(group), positions)

    @abstractmethod
    def _send_positions(self, membership: Membership, positions: Positions) -> None: ...

    def commit(self) -> None:
        """Commits the transaction, and tells the readers."""
        self._commit()
        for reader, returned in self._read:
            reader.settle(returned)

    @abstractmethod
    def _commit(self) -> None: ...


class ClientTransactor(ABC):
    """Writer of a client's transactions; see `Transactor` for the contract.

    Args:
        transactional_id: Name of the writer.
    """

    def __init__(self, transactional_id: str) -> None:
        self._doing = f"transactor {transactional_id!r}"
        self._open = False
        self._broken: LogError | None = None

    @contextmanager
    def begin(self) -> Iterator[ClientTransaction]:
        if self._open:
            raise open_already(self._doing)
        if self._broken:
            raise self._broken
        self._open = True
        try:
            with self._named(self._doing):
                transaction = self._begin()
                try:
                    yield transaction
                    transaction.commit()
                except BaseException as error:
                    self._abandon(error)
                    raise
        finally:
            self._open = False

    def _abandon(self, reason: BaseException) -> None:
        fault = self._fault(reason)
        if isinstance(fault, FencedError):
            self._broken = fault
        try:
            with self._named(f"{self._doing}: make a new transactor; this one cannot continue"):
                self._abort()
        except LogError as error:
            # The body's own error is the one to show; this error is for the caller of the next begin. The broker aborts
            # an open transaction when the id's next holder comes, or at the transaction's timeout.
            self._broken = self._broken or error

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def _begin(self) -> ClientTransaction: ...

    @abstractmethod
    def _abort(self) -> None: ...

    @abstractmethod
    def _named(self, doing: str) -> AbstractContextManager[None]:
        """Converts the client's errors in the body into LogError."""

    @abstractmethod
    def _fault(self, reason: BaseException) -> BaseException:
        """Returns the LogError for an error of the client, and any other error as it is."""
