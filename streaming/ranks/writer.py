"""Writer of the row ranges of one process: each range has a partition of the deltas and a transactional id."""

from collections.abc import Callable, Sequence

from models.bundle.delta import SNAPSHOT_SEQ, Source
from streaming.log.protocol import EventLog, Transaction, Transactor
from streaming.log.topics import Topics
from streaming.ranks.deal import Deal
from streaming.ranks.pins import VERSION, Pin, encode_pin


class RangeWriter:
    """Writes the deltas of the own row ranges, and the pins of the leader. Opening it fences all earlier writers.

    Attributes:
        done: Number of the last step of each row range that the log has, by number. The caller sets it at a start.

    Args:
        log: Log of the deltas.
        topics: Names of the topics.
        bundle: Id of the bundle.
        deal: Share of this process.
        failpoint: Called with a name at points of a step; see `Trainer`.
    """

    def __init__(
        self, log: EventLog, topics: Topics, bundle: str, deal: Deal, failpoint: Callable[[str], None]
    ) -> None:
        self._topics, self._bundle, self._deal, self._failpoint = topics, bundle, deal, failpoint
        self.done = [SNAPSHOT_SEQ] * deal.partitions
        self._transactors: dict[int, Transactor] = {}
        self._pins: Transactor | None = None
        name = f"{topics.prefix}{bundle}"
        try:
            if deal.partitions > 1 and deal.rank == 0:
                self._pins = log.transactor(f"steps-{name}")
            for number in deal.own:
                place = f"-{number}" if deal.partitions > 1 else ""
                self._transactors[number] = log.transactor(f"trainer-{name}{place}")
        except BaseException:
            self.close()
            raise

    def pin(self, seq: int, sources: Sequence[Source]) -> None:
        """Pins the inputs of a step. Only the leader of several partitions pins.

        Raises:
            FencedError: Another leader has taken over.
        """
        if self._pins is None:
            return
        self._failpoint("before pin")
        pin = Pin(VERSION, self._bundle, seq, list(sources), self._deal.processes)
        with self._pins.begin() as transaction:
            transaction.append(self._topics.steps, encode_pin(pin), partition=0)
        self._failpoint("after pin")

    def commit(self, seq: int, payloads: Sequence[tuple[int, bytes]], beside: Callable[[Transaction], None]) -> None:
        """Commits a step in each own row range that lacks it, one range after the other.

        Args:
            seq: Number of the step.
            payloads: Row range and bytes of each delta.
            beside: Adds to the transaction of row range 0 what is committed with it.

        Raises:
            FencedError: Another process has taken over a row range.
            OversizedError: The topic refuses a delta of this size.
        """
        for number, transactor in self._transactors.items():
            if self.done[number] >= seq:
                continue
            with transactor.begin() as transaction:
                for own, payload in payloads:
                    if own == number:
                        transaction.append(self._topics.deltas, payload, partition=number)
                if number == 0:
                    beside(transaction)
                else:
                    self._failpoint("after produce")
            self.done[number] = seq
            self._failpoint("after commit")

    def confirm(self, beside: Callable[[Transaction], None]) -> None:
        """Commits a transaction without a step under the id of row range 0, if this process has it.

        Args:
            beside: Adds the contents of the transaction, at least one.

        Raises:
            FencedError: Another process has taken over row range 0.
        """
        if 0 in self._transactors:
            with self._transactors[0].begin() as transaction:
                beside(transaction)

    def close(self) -> None:
        """Closes the transactors. Committed steps stay."""
        for transactor in [*self._transactors.values(), *([self._pins] if self._pins is not None else [])]:
            transactor.close()
