"""Proves a sample of answers: walks the log once and compares each record with the states of its window."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from features.errors import EventError
from models.bundle import delta
from models.bundle.bundle import Bundle
from serving.skew.compare import ServedComparison, WrongRow
from serving.skew.record import SkewRecord, decode, digests
from serving.skew.report import SkewReport
from serving.skew.state import SkewState, as_stored
from streaming.log.protocol import BLANK, EventLog, Offsets, ends_of, offset_in
from streaming.log.topics import Topics
from streaming.snapshot import Snapshot

_OTHER, _STALE = "other bundle", "store away"
_BEFORE, _BEYOND = "before the snapshot", "beyond the log"


@dataclass(frozen=True)
class SkewLimits:
    """Allowances of a comparison.

    Attributes:
        clock_ms: Largest difference of the clocks of a server and the log, milliseconds. A delta that was appended this
            long after an answer may still be in it.
        late_s: Longest time that a server may be behind the log, seconds.
    """

    clock_ms: int = 1_000
    late_s: float = 60.0


def read_records(
    log: EventLog, topics: Topics, *, since_ms: int = 0, until_ms: int | None = None
) -> tuple[list[SkewRecord], int]:
    """Reads the records of the topic `skew`.

    Args:
        log: The log.
        topics: Names of the topics.
        since_ms: Time from which records were appended, milliseconds since 1970.
        until_ms: Time before which records were appended, milliseconds since 1970. None: all that the log has now.

    Returns:
        The records, and the number of messages that are no records of this release.
    """
    found, unreadable = [], 0
    ends = log.end_offsets(topics.skew) if until_ms is None else log.offsets_at(topics.skew, until_ms)
    for partition, start in log.offsets_at(topics.skew, since_ms).items():
        for message in log.read(topics.skew, partition, start, ends[partition]):
            if message.value == BLANK:
                continue
            try:
                found.append(decode(message.value))
            except EventError:
                unreadable += 1
    return found, unreadable


def prove(
    log: EventLog,
    bundle: Bundle,
    topics: Topics,
    records: Iterable[SkewRecord],
    *,
    snapshot: Snapshot | None = None,
    limits: SkewLimits = SkewLimits(),
) -> SkewReport:
    """Compares records of served answers with the fold of the log.

    Args:
        log: Log with the deltas.
        bundle: Bundle of the records. Records of other bundles are skipped and counted.
        topics: Names of the topics.
        records: Records to compare.
        snapshot: Snapshot with which the fold starts. None: the fold starts with the bundle. Earlier records are
            skipped and counted.
        limits: Allowances of the comparison.

    Raises:
        LogError: The log does not answer, or deltas are no longer kept; give a snapshot.
    """
    report = SkewReport(bundle.id)
    state, ends = SkewState(log, bundle, topics, snapshot), ends_of(log, topics.deltas)
    walk = _Walk(state, report, limits, len(ends))
    walk.wait(records)
    for message, _ in state.steps():
        walk.look()
        walk.start(message.partition, message.offset, message.timestamp_ms)
        # A step's deltas come in the order of partitions. None of a later step was appended before the last of them.
        if message.partition == len(ends) - 1:
            walk.close(message.timestamp_ms - limits.clock_ms)
    walk.look()
    for partition, end in enumerate(ends):
        walk.start(partition, end, None)
    walk.close(None)
    if walk.wrong:
        _name_rows(log, bundle, topics, walk.wrong, report, ends=ends, published=state.stored)
    report.differences.sort(key=lambda difference: -difference.count)
    return report


class _Walk:
    """Comparisons of a walk through the log: records that wait for their first state, and records in their window.

    A record's window begins where the first of the partitions is at the record's position, since the server may have
    lacked that partition's next delta.
    """

    def __init__(self, state: SkewState, report: SkewReport, limits: SkewLimits, partitions: int) -> None:
        self._state, self._report, self._limits = state, report, limits
        self._waiting: dict[int, SkewRecord] = {}
        self._orders: list[list[int]] = [[] for _ in range(partitions)]
        self._active: list[ServedComparison] = []
        self.wrong: list[WrongRow] = []

    def wait(self, records: Iterable[SkewRecord]) -> None:
        """Queues the records that can be compared, and counts the others."""
        for number, record in enumerate(records):
            reason = self._reason(record)
            if reason:
                self._report.skipped[reason] += 1
            else:
                self._waiting[number] = record
        # The first record to compare is the last of its partition's list.
        for partition, order in enumerate(self._orders):
            order += sorted(
                self._waiting, key=lambda number: offset_in(self._waiting[number].positions, partition), reverse=True
            )

    def look(self) -> None:
        """Compares the open records with the present state."""
        for comparison in self._active:
            if not comparison.done:
                comparison.look(self._state)

    def start(self, partition: int, offset: int, appended_ms: int | None) -> None:
        """Opens the records whose position in a partition is at most an offset.

        Args:
            partition: The partition.
            offset: Offset of the partition's next delta.
            appended_ms: Time at which that delta was appended, milliseconds since 1970. None at the end of the log.
        """
        order = self._orders[partition]
        while order:
            waiting = self._waiting.get(order[-1])
            if waiting is not None and offset_in(waiting.positions, partition) > offset:
                return
            number = order.pop()
            if waiting is not None:
                self._open(self._waiting.pop(number), partition, offset, appended_ms)

    def _open(self, record: SkewRecord, partition: int, offset: int, appended_ms: int | None) -> None:
        bundle = self._state.bundle
        comparison = ServedComparison(record, bundle.schema, bundle.dataset.events.varying)
        comparison.look(self._state)
        self._active.append(comparison)
        behind_s = 0.0 if appended_ms is None else (record.time_ms - appended_ms) / 1_000
        if behind_s > self._limits.late_s:
            position = offset_in(record.positions, partition)
            shown = {"request": record.id, "item": "", "served": position, "expected": offset + 1}
            self._report.difference("log offset", "late").add(1, [shown | {"behind_s": round(behind_s, 1)}])

    def close(self, before_ms: int | None) -> None:
        """Closes the records that match, or that were answered before a time.

        Args:
            before_ms: The time, milliseconds since 1970. None closes all, and skips records that still wait.
        """
        left = []
        for comparison in self._active:
            if comparison.done or before_ms is None or comparison.served.time_ms < before_ms:
                self.wrong += comparison.close(self._state, self._report)
            else:
                left.append(comparison)
        self._active = left
        if before_ms is None:
            self._report.skipped[_BEYOND] += len(self._waiting)
            self._waiting = {}
            self._report.skipped = +self._report.skipped

    def _reason(self, record: SkewRecord) -> str:
        if record.bundle != self._state.bundle.id:
            return _OTHER
        if record.stale:
            return _STALE
        before = any(offset_in(record.positions, number) < start for number, start in enumerate(self._state.start))
        return _BEFORE if before else ""


def _name_rows(
    log: EventLog,
    bundle: Bundle,
    topics: Topics,
    wrong: list[WrongRow],
    report: SkewReport,
    *,
    ends: Offsets,
    published: Callable[..., NDArray[np.float32]],
) -> None:
    """Adds rows that no state of their window has: an earlier or later version of the row, or of no version."""
    storages = {row.storage for row in wrong}
    rows = np.unique(np.array([row.row for row in wrong], dtype=np.int64))
    versions: dict[tuple[int, int], int] = {}
    for storage in storages:
        found = digests(published(storage, rows, published=True))
        versions |= dict.fromkeys(zip(rows.tolist(), found.tolist(), strict=True), 0)
    starts = log.offsets_at(topics.deltas, 0)
    parts = (log.read(topics.deltas, number, starts[number], end) for number, end in enumerate(ends))
    for message in itertools.chain.from_iterable(parts):
        change = delta.decode(message.value)
        chosen = np.isin(change.row_numbers, rows) if change.bundle == bundle.id else np.zeros(0, dtype=np.bool_)
        if not chosen.any():
            continue
        for storage in storages:
            found = digests(as_stored(change.vectors[chosen], storage))
            pairs = zip(change.row_numbers[chosen].tolist(), found.tolist(), strict=True)
            versions |= dict.fromkeys(pairs, change.seq)
    for row in wrong:
        version = versions.get((row.row, row.digest))
        kind = "damaged row" if version is None else "other version"
        served = "no version" if version is None else f"batch {version}"
        for feature in row.features:
            shown = {"request": row.request, "item": "", "row": row.row, "served": served}
            shown["expected"] = f"the version at log offset {', '.join(map(str, row.position))}"
            report.difference(feature, kind).add(1, [shown])
