"""The trainer: reads `items` and `events`, steps, and commits deltas, dead letters and positions in one transaction.

Commit order of a micro-batch:

1. Poll the inputs.
2. Step in memory.
3. In one transaction, append the deltas and the dead letters and commit the positions.
4. Count the messages.

A crash before the commit of (3) leaves no trace. After the commit, nothing is missing. On start, `streaming.restore`
restores the state from the newest snapshot and the log after it.

With `run_ahead`, (1) and (2) of a micro-batch overlap (3) of the micro-batch before it. Transactions still follow each
other, so the log is the same. If a transaction fails, the step that was done meanwhile is lost with it.

One trainer owns a bundle's table. When a second trainer starts, the first trainer is fenced at its next commit.

With several partitions the table has a row range for each, and N processes share the partitions; see
`streaming.ranks`. Process 0 leads: it polls, pins the inputs of the step in the topic `steps`, and then all processes
do the step. Each row range commits its deltas alone. A step that some ranges have at a start is done again from its
pin, and the ranges that lack it commit it.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from features import tracing as trace
from features.errors import LogError, OversizedError, RegistryError, StreamError, is_fault
from features.wire.decoder import rows_of
from features.wire.schemas import Schemas
from models.bundle import delta
from models.bundle.bundle import Bundle
from streaming.dead_letter import KEPT_BYTES, encode_dead_letter
from streaming.fold import first_deltas
from streaming.forget.message import encode_line
from streaming.forget.removal import SHARED
from streaming.fresh_events import LATENESS_S
from streaming.log.protocol import EventLog, InputReader, Message, Positions, Transaction, ends_of
from streaming.log.topics import Topics
from streaming.ranks.background import BackgroundCommit
from streaming.ranks.command import Command, decode_command, encode_command, step_command
from streaming.ranks.deal import Deal
from streaming.ranks.peers import NoPeers, StreamPeers, together
from streaming.ranks.pins import Marks, marks, messages_of, sources_of
from streaming.ranks.seat import Seat
from streaming.ranks.writer import RangeWriter
from streaming.restore import group_of, input_topics, restored, start_of
from streaming.shared.reads import SharedReads
from streaming.snapshot import Snapshot, Snapshots
from streaming.step import Step
from streaming.step_result import POISON, Address, Rejected, StepResult, address
from streaming.step_state import gathered, restore_step, snapshot_of

# A late event is no sign of a wrong topic.
_HARMLESS = frozenset({"late"})
# The share of faulty messages is judged over the last `_WINDOW` messages, from `_ENOUGH` messages on.
_WINDOW = 1_000
_ENOUGH = 100
# Smallest limit of a delta's size when the log refuses larger deltas.
_LEAST_BYTES = 128 * 1024
_GROUP_EVERY_S = 3_600.0
_LOGGER = logging.getLogger(__name__)


@dataclass
class Totals:
    """Counts since the trainer started. messages = events + neutral + duplicates + items + deleted + stale + forgotten
    + bad. An Arrow batch counts as many messages as it has rows.

    Attributes:
        batches: Number of committed micro-batches.
        failed_snapshots: Number of snapshots that could not be written.
        causes: Number of rejected messages by cause.
        messages, events, neutral, duplicates, items, deleted, stale, forgotten, bad, unknown_items: As in `StepResult`.
    """

    messages: int = 0
    events: int = 0
    neutral: int = 0
    duplicates: int = 0
    items: int = 0
    deleted: int = 0
    stale: int = 0
    forgotten: int = 0
    bad: int = 0
    unknown_items: int = 0
    batches: int = 0
    failed_snapshots: int = 0
    causes: dict[str, int] = field(default_factory=dict)

    def add(self, outcome: StepResult) -> None:
        """Counts the result of a step on a batch."""
        self.batches += 1
        self.messages += outcome.rows
        self.bad += outcome.rejected
        for name in ("events", "neutral", "duplicates", "items", "deleted", "stale", "forgotten", "unknown_items"):
            setattr(self, name, getattr(self, name) + getattr(outcome, name))
        for bad in outcome.bad:
            self.causes[bad.cause] = self.causes.get(bad.cause, 0) + bad.rows


@dataclass(frozen=True)
class TrainerOptions:
    """Options of a trainer.

    Attributes:
        batch: Largest number of rows that a micro-batch reads from each topic, but at least one message.
        wait_s: Longest time that a micro-batch waits for events, seconds.
        lateness_s: Largest age of an event, seconds, as in `Step`.
        learning_rate: Learning rate of the table, as in `Step`.
        most_bad: Largest share of faulty messages among the last thousand. A larger share stops the stream.
        snapshot_every_s: Time between snapshots, seconds.
        peers: Connections to the other processes of the stream. Default: this process is alone.
        reads: Reads the inputs once for several trainers of this process. Default: the trainer has its own readers.
    """

    batch: int = 256
    wait_s: float = 0.05
    lateness_s: float = LATENESS_S
    learning_rate: float | None = None
    most_bad: float = 0.5
    snapshot_every_s: float = 300.0
    peers: StreamPeers = field(default_factory=NoPeers)
    reads: SharedReads | None = None


class Trainer:
    """Trains one bundle's table from the log. Among several processes, it trains this process's share.

    Args:
        log: Log of the inputs and the deltas. Absent topics are created.
        bundle: Bundle whose published table is the first state.
        topics: Names of the topics.
        snapshots: Directory for regular copies of the state. Without snapshots, a start reads the whole log.
        schemas: Schemas of messages in Avro and Protobuf.
        watch: Called with the messages and the result of every committed batch.
        failpoint: Called with a name at points of a batch: `before pin`, `after pin`, `after step`, `after produce`,
            `after offsets`, `after commit` and `after batch`. A test that raises or exits there shows the state that a
            crash leaves.
    """

    def __init__(
        self,
        log: EventLog,
        bundle: Bundle,
        *,
        topics: Topics,
        options: TrainerOptions = TrainerOptions(),
        snapshots: Snapshots | None = None,
        schemas: Schemas | None = None,
        watch: Callable[[list[Message], StepResult], None] = lambda messages, outcome: None,
        failpoint: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._log = log
        self._bundle = bundle
        self._topics = topics
        self._options = options
        self._snapshots = snapshots
        self._schemas = schemas or Schemas()
        # Rows of the largest message of the last batch, by topic: the next batch polls as many messages as may fit.
        self._rows_each: dict[str, int] = {}
        self._watch = watch
        self._failpoint = failpoint
        self._recent_faults: deque[bool] = deque(maxlen=_WINDOW)
        self._limit_bytes = delta.DELTA_BYTES
        self._group_due = time.monotonic() + _GROUP_EVERY_S
        self.totals = Totals()
        log.create_topics(topics.partitions())
        self._seat = self._seat_of(options.peers)
        self._start = start_of(log, bundle, topics)
        self._open()
        self._snapshot_due = time.monotonic() + options.snapshot_every_s

    def _seat_of(self, peers: StreamPeers) -> Seat:
        """Returns the place of this process. The log decides the number of partitions."""
        topics = self._topics
        partitions = len(self._log.end_offsets(topics.deltas))
        if topics.parts not in (1, partitions):
            raise StreamError(
                f"TESSERA_PARTITIONS={topics.parts}, but {topics.deltas} has {partitions} partitions, which stay for "
                f"the topic's life; set TESSERA_PARTITIONS={partitions}, or another TESSERA_TOPIC_PREFIX"
            )
        deal = Deal(partitions, peers.processes, peers.rank)
        if partitions > 1:
            self._log.create_topics({topics.steps: 1})
        return Seat(deal, peers)

    def _open(self) -> None:
        self._background = BackgroundCommit()
        # Fences the trainer before first, so that the state restored below is final.
        self._writer = RangeWriter(self._log, self._topics, self._bundle.id, self._seat.deal, self._failpoint)
        self._readers: list[InputReader] = []
        try:
            self._marks = self._shared_marks()
            self.step, positions = self._restored()
            ahead = self._marks.sources if self._marks is not None else []
            positions |= {(source.topic, source.partition): source.last + 1 for source in ahead}
            if self._seat.leads:
                # Each topic has its own reader, so that a flood of events does not delay items.
                self._readers = [self._reader(topic, positions) for topic in input_topics(self._topics)]
            if self._marks is not None and ahead:
                self._do_again(self._marks)
        except BaseException:
            self._writer.close()
            raise

    def _reader(self, topic: str, start: Positions) -> InputReader:
        if self._options.reads is not None:
            return self._options.reads.reader(self._log, topic, start)
        return self._log.reader([topic], group=group_of(self._bundle, topic), sole=True, start=start)

    def _shared_marks(self) -> Marks | None:
        """Returns the state of the log as the leader reads it after all processes have fenced theirs."""
        deal, peers = self._seat.deal, self._seat.peers
        if deal.partitions == 1:
            return None
        peers.gather(b"")
        found = b""
        if self._seat.leads:
            state = marks(
                self._log,
                self._topics,
                self._bundle.id,
                deal.partitions,
                begin=first_deltas(self._log, self._bundle, self._topics),
                floor=self._snapshot_seq,
            )
            found = encode_command(Command("start", marks=state))
        shared = decode_command(peers.share(found)).marks
        assert shared is not None
        self._writer.done = list(shared.done)
        return shared

    def _snapshot_seq(self) -> int:
        """Returns the number of the newest snapshot's step, 0 without a snapshot."""
        snapshot = self._snapshots.newest(self._bundle) if self._snapshots is not None else None
        return 0 if snapshot is None else snapshot.seq

    def _do_again(self, state: Marks) -> None:
        """Does the pinned step that some row range lacks. The ranges that have the step do not write it again."""
        command = Command("idle")
        if self._seat.leads:
            messages = messages_of(self._log, state.sources)
            command = step_command(messages, poison=state.poison, snapshot=False)
        self._do(self._tell(command))

    def _tell(self, command: Command) -> Command:
        """Returns the leader's command in every process."""
        if self._seat.deal.processes == 1:
            return command
        return decode_command(self._seat.peers.share(encode_command(command)))

    def follow(self) -> bool:
        """Does the leader's next command. Every process but the leader calls it until it returns False.

        Raises:
            FencedError: Another stream has taken over.
            StreamError: A process went away, or the stream cannot go on.
            LogError: The log does not answer.
        """
        command = self._tell(Command("idle"))
        self._do(command)
        return command.kind != "end"

    def _do(self, command: Command) -> None:
        if command.kind == "step":
            poison = None if command.poison is None else frozenset(command.poison)
            self._batch(command.batch(), poison=poison, snapshot=command.snapshot)
        elif command.kind == "snapshot":
            self._snapshot()

    def run_ahead(self) -> int:
        """Processes one micro-batch like `run_once`, but may return before the batch is committed.

        The next call does its step meanwhile. An error of the commit is raised there, or by `settle`. A stream of
        several row ranges commits before the return.
        """
        return self.run_once(ahead=True)

    def settle(self) -> None:
        """Returns when all batches are committed; raises as `run_once`."""
        self._background.wait()

    def run_once(self, *, wait_s: float | None = None, ahead: bool = False) -> int:
        """Processes one micro-batch.

        Args:
            wait_s: Longest wait for events, seconds. Default: the option `wait_s`.
            ahead: See `run_ahead`.

        Returns:
            Number of messages of the batch, 0 if no message arrived in time.

        Raises:
            FencedError: Another trainer has taken over this bundle's table.
            StreamError: Too many of the last messages were faulty, or a batch fails as a whole.
            LogError: The log does not answer. State and log may differ now, so the caller must start a new trainer.
        """
        waits = (0.0, self._options.wait_s if wait_s is None else wait_s)
        topics = input_topics(self._topics)
        read = [self._poll(*each) for each in zip(topics, self._readers, waits, strict=True)]
        messages = [message for part in read for message in part]
        if not messages:
            self._tell(Command("idle"))
        snapshot = self._snapshots is not None and time.monotonic() >= self._snapshot_due
        if messages and self._seat.deal.partitions > 1:
            self._writer.pin(self.step.seq + 1, sources_of(messages))
        if messages and self._seat.deal.processes > 1:
            self._tell(step_command(messages, poison=None, snapshot=snapshot))
        try:
            if messages:
                self._batch(messages, snapshot=snapshot, ahead=ahead and self._seat.deal.partitions == 1)
            else:
                self.settle()
        except OversizedError as error:
            if self._seat.deal.partitions > 1:
                raise self._refused(error) from error
            self._cut_smaller(error)
            return self.run_once(wait_s=wait_s, ahead=ahead)
        return len(messages)

    def _batch(
        self,
        messages: list[Message],
        *,
        poison: frozenset[Address] | None = None,
        snapshot: bool,
        ahead: bool = False,
    ) -> None:
        """Does a step on messages, and commits it."""
        with trace.batch(self._bundle.id, self._topics.deltas, self.step.seq + 1) as span:
            with trace.span("step"):
                outcome = self._step(messages, poison)
            self._failpoint("after step")
            sources = outcome.deltas[-1].sources
            inputs = [f"{source.topic}-{source.partition} {source.first}..{source.last}" for source in sources]
            span.note(messages=len(messages), bad=len(outcome.bad), inputs=inputs)
            self._judge(messages, outcome.bad)
            commit = self._commit_of(messages, outcome)
            if ahead:
                self._background.start(commit)
            else:
                self.settle()
                commit()
        if snapshot:
            self.settle()
            self._snapshot_due = time.monotonic() + self._options.snapshot_every_s
            self._keep(self._snapshot())

    def _commit_of(self, messages: list[Message], outcome: StepResult) -> Callable[[], None]:
        """Returns the commit of the last step. The caller may do the next step before the commit, or meanwhile."""
        seq, payloads = self.step.seq, list(zip(outcome.ranges, outcome.payloads, strict=True))
        # Commits idle topics too at times, since the log forgets the position of a group that is idle.
        every = time.monotonic() >= self._group_due
        positions = self._read_positions(input_topics(self._topics) if every else {one.topic for one in messages})
        span = trace.span("commit", deltas=len(outcome.deltas))

        def beside(transaction: Transaction) -> None:
            self._write(transaction, outcome, seq)
            _commit_positions(transaction, positions)
            self._failpoint("after offsets")

        def commit() -> None:
            began = time.perf_counter()
            with span:
                together(self._seat.peers, lambda: self._writer.commit(seq, payloads, beside))
            outcome.transaction_s = time.perf_counter() - began
            if every:
                self._group_due = time.monotonic() + _GROUP_EVERY_S
            if self._marks is not None:
                self._marks = Marks(seq, [seq] * self._seat.deal.partitions)
            self.totals.add(outcome)
            self._watch(messages, outcome)
            self._failpoint("after batch")

        return commit

    def _poll(self, topic: str, reader: InputReader, wait_s: float) -> list[Message]:
        """Returns the next messages of a topic, up to `batch` rows. Messages beyond go back to the reader."""
        most = self._options.batch
        messages = reader.poll(max(1, most // self._rows_each.get(topic, 1)), wait_s)
        rows = [rows_of(message.value) for message in messages]
        self._rows_each[topic] = max(rows, default=1)
        count = max(1, int(np.searchsorted(np.cumsum(rows), most, side="right")))
        if messages[count:]:
            reader.unread(messages[count:])
        return messages[:count]

    def _read_positions(self, topics: Collection[str]) -> dict[str, Positions]:
        """Returns the positions after the last poll, by group. Only the leader has readers."""
        if not self._seat.leads:
            return {}
        readers = zip(input_topics(self._topics), self._readers, strict=True)
        return {group_of(self._bundle, topic): reader.position() for topic, reader in readers if topic in topics}

    def confirm(self) -> None:
        """Commits the positions without a step, between two batches. Only the leader calls it.

        An idle trainer thereby learns that another trainer has taken over, and the log keeps its positions.

        Raises:
            FencedError: Another trainer has taken over this bundle's table.
            LogError: The log does not answer.
        """
        self.settle()
        positions = self._read_positions(input_topics(self._topics))
        self._writer.confirm(lambda transaction: _commit_positions(transaction, positions))

    def write_snapshot(self) -> None:
        """Writes a snapshot of the state after the last batch.

        Raises:
            StreamError: The snapshot could not be written, or not sent to an object store. The stream may continue.
        """
        if self._snapshots is None:
            return
        self.settle()
        self._snapshot_due = time.monotonic() + self._options.snapshot_every_s
        self._tell(Command("snapshot"))
        self._snapshots.write(self._snapshot())
        self._snapshots.await_sent(self._bundle.id)

    def _snapshot(self) -> Snapshot:
        """Returns the state of all processes in the leader, and the state of this process in the others."""
        # The last batch wrote the newest delta of this bundle, so every later end of the topic is a valid position.
        snapshot = snapshot_of(self.step, deltas=ends_of(self._log, self._topics.deltas), inputs=self.positions())
        return replace(snapshot, arrays=snapshot.arrays | gathered(snapshot.arrays, self._seat))

    def _keep(self, snapshot: Snapshot) -> None:
        """Writes a snapshot, or logs a warning. Without the snapshot a start only takes longer."""
        if self._snapshots is None or not self._seat.leads:
            return
        try:
            self._snapshots.write(snapshot)
        except StreamError as error:
            self.totals.failed_snapshots += 1
            _LOGGER.warning("%s", error)

    def drained(self) -> bool:
        """Returns whether both input topics are read to their ends, and all of it is committed."""
        self.settle()
        return not any(self.lag().values())

    def lag(self) -> dict[tuple[str, int], int]:
        """Returns the number of offsets that are not read yet, by topic and partition."""
        position = self.positions()
        return {
            (topic, number): max(0, end - position.get((topic, number), 0))
            for topic in input_topics(self._topics)
            for number, end in self._log.end_offsets(topic).items()
        }

    def end(self) -> None:
        """Tells the other processes that the stream ends. Only the leader calls it, between two batches."""
        self._tell(Command("end"))

    def close(self) -> None:
        """Closes the readers and the transactors. Committed batches stay. A commit under way ends before."""
        self._background.close()
        for reader in self._readers:
            reader.close()
        self._writer.close()

    def positions(self) -> Positions:
        """Returns the next offset to read of every partition of the inputs."""
        return {partition: offset for reader in self._readers for partition, offset in reader.position().items()}

    def _write(self, transaction: Transaction, outcome: StepResult, seq: int) -> None:
        kept = min(KEPT_BYTES, self._limit_bytes // 4)
        for bad in outcome.bad:
            letter = encode_dead_letter(bad.message, bad.cause, bad.reason, kept_bytes=kept, bundle=self._bundle.id)
            transaction.append(self._topics.dead_letters, letter)
        for removed in outcome.removed:
            line = encode_line(
                "removed",
                removed.request,
                bundle=self._bundle.id,
                seq=seq,
                removed=removed.counts,
                shared=list(SHARED),
            )
            transaction.append(self._topics.forgotten, line)
        self._failpoint("after produce")

    def _refused(self, error: OversizedError) -> LogError:
        """Returns the error of a delta that a topic refuses. A pinned step cannot be cut in another way."""
        return LogError(
            f"{self._topics.deltas} or {self._topics.dead_letters}: {error}; set max.message.bytes of these topics to "
            f"{2 * self._limit_bytes} or more, and start the stream again"
        )

    def _cut_smaller(self, error: OversizedError) -> None:
        """Restores the state of the last commit and halves the size limit of deltas.

        A topic may have a smaller limit than the default. A record that no smaller delta can hold becomes a dead
        letter.
        """
        if self._limit_bytes // 2 < _LEAST_BYTES:
            topics = f"{self._topics.deltas} or {self._topics.dead_letters}"
            raise LogError(
                f"{topics}: refuses messages of {self._limit_bytes} bytes; set max.message.bytes of these topics to "
                f"{2 * _LEAST_BYTES} or more"
            ) from error
        self._limit_bytes //= 2
        _LOGGER.warning("%s; deltas are cut to %d bytes from here on", error, self._limit_bytes)
        self.close()
        self._open()

    def _judge(self, messages: list[Message], bad: list[Rejected]) -> None:
        """Raises StreamError if too many of the last messages are faulty.

        The batch is not committed then, so its messages do not end among the dead letters.
        """
        faulty = {address(rejected.message) for rejected in bad if rejected.cause not in _HARMLESS}
        self._recent_faults += [bool(faulty) and address(message) in faulty for message in messages]
        count, of = sum(self._recent_faults), len(self._recent_faults)
        if of >= _ENOUGH and count > self._options.most_bad * of:
            example = next((rejected.reason for rejected in bad if address(rejected.message) in faulty), "")
            raise StreamError(
                f"{count} of the last {of} messages are faulty, such as: {example}. Is this the right topic for the "
                f"dataset {self._bundle.dataset.name}? Fix the producer, or allow a larger share"
            )

    # Poison: a message at which the step raises.

    def _step(self, messages: list[Message], poison: frozenset[Address] | None = None) -> StepResult:
        """Does a step. Given poison was found before, by a run that committed the step in some row range."""
        try:
            return self.step.apply(messages, poison=poison or frozenset())
        except (RegistryError, StreamError):
            # No message is at fault: the registry does not answer, or a schema must stop the stream.
            raise
        except BaseException as error:
            if not is_fault(error):
                raise
            return self._without_poison(messages, error)

    def _without_poison(self, messages: list[Message], error: BaseException) -> StepResult:
        # The state is restored from the log.
        self.settle()
        before, positions = self._restored()
        # Writes a snapshot, so that the search for the next poison reads only the log after it.
        pristine = snapshot_of(before, deltas=ends_of(self._log, self._topics.deltas), inputs=positions)
        if self._seat.deal.partitions == 1:
            self._keep(pristine)
        reasons = self._poisonous(messages, pristine)
        self.step = self._new_step(pristine)
        try:
            outcome = self.step.apply(messages, poison=frozenset(reasons))
        except BaseException as fault:
            if not is_fault(fault):
                raise
            raise StreamError(
                f"the step fails at a batch of {len(messages)} messages from {address(messages[0])} on, and at no "
                f"message alone: {type(fault).__name__}: {fault}; report the error with these messages"
            ) from error
        outcome.bad = [
            replace(rejected, reason=f"{rejected.reason} ({reasons[address(rejected.message)]})")
            if rejected.cause == POISON
            else rejected
            for rejected in outcome.bad
        ]
        return outcome

    def _poisonous(self, messages: list[Message], pristine: Snapshot) -> dict[Address, str]:
        """Finds the messages at which the step raises alone. Returns the error text by message address."""
        try:
            self._new_step(pristine).apply(messages)
            return {}
        except BaseException as error:
            if not is_fault(error):
                raise
            if len(messages) == 1:
                return {address(messages[0]): f"{type(error).__name__}: {error}"}
        middle = len(messages) // 2
        return self._poisonous(messages[:middle], pristine) | self._poisonous(messages[middle:], pristine)

    def _new_step(self, snapshot: Snapshot | None) -> Step:
        options = self._options
        step = Step(
            self._bundle,
            self._topics,
            lateness_s=options.lateness_s,
            learning_rate=options.learning_rate,
            limit_bytes=self._limit_bytes,
            trained_until=self._start.trained_until,
            schemas=self._schemas,
            seat=self._seat,
        )
        if snapshot is not None:
            restore_step(step, snapshot)
        return step

    # Restore.

    def _restored(self) -> tuple[Step, Positions]:
        snapshot = self._snapshots.newest(self._bundle) if self._snapshots is not None else None
        step = self._new_step(snapshot)
        return restored(self._log, self._topics, snapshot, step, self._start.positions, self._marks)


def _commit_positions(transaction: Transaction, positions: Mapping[str, Positions]) -> None:
    for group, position in positions.items():
        transaction.commit_positions(group, position)
