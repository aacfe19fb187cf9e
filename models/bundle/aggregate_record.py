"""Records of aggregates: the keys that a micro-batch changed, together in its deltas, and each by itself in a store.

Shape letters: N keys, W width of a group's rows (`features.aggregate.state`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from features.aggregate.aggregator import Aggregator
from features.aggregate.plan import AggregatePlan
from features.aggregate.state import GroupState
from features.errors import EventError
from models.bundle import record
from models.bundle.delta import Record

BATCH: Final = "aggregates"
"""Kind of a record in a delta. The id is the group's number, with a part's number if the batch has several."""
AGGREGATE: Final = "aggregate"
"""Kind of a record in a store. The id is `key_id` of a key, or `WATERMARK`; an empty payload is a forgotten key."""
WATERMARK: Final = "watermark"
"""Id of the record of the newest event's time, int64."""
_COUNT_BYTES: Final = 8

Keys = NDArray[np.uint64]
Rows = NDArray[np.int64]


def key_id(group: int, key: int) -> str:
    """Returns the id of a key's record.

    Args:
        group: Number of the group in the plan.
        key: Key in the group.
    """
    return f"{group}.{key:016x}"


def batch_records(group: int, keys: Keys, rows: Rows, *, limit: int) -> Iterator[Record]:
    """Yields the records of a group's changed keys (N,) with their rows (N, W), each of at most `limit` bytes."""
    most = max(1, (limit - 64) // (8 + 8 * rows.shape[1]))
    for number, start in enumerate(range(0, len(keys), most)):
        part = slice(start, start + most)
        payload = b"".join(
            (
                len(keys[part]).to_bytes(_COUNT_BYTES, "little"),
                keys[part].astype("<u8").tobytes(),
                rows[part].astype("<i8").tobytes(),
            )
        )
        yield Record(BATCH, f"{group}.{number}" if number else str(group), payload)


def decode_batch(changed: Record) -> tuple[int, Keys, Rows]:
    """Returns group, keys (N,) and rows (N, W) of a record of the kind `BATCH`.

    Raises:
        EventError: The record has other content.
    """
    try:
        group, count = int(changed.id.partition(".")[0]), int.from_bytes(changed.payload[:_COUNT_BYTES], "little")
        keys = np.frombuffer(changed.payload, dtype="<u8", count=count, offset=_COUNT_BYTES).astype(np.uint64)
        rows = np.frombuffer(changed.payload, dtype="<i8", offset=_COUNT_BYTES * (1 + count)).astype(np.int64)
        return group, keys, rows.reshape(count, -1)
    except ValueError as error:
        raise EventError(f"record of aggregates {changed.id!r}: {error}") from error


def watermark_record(watermark: int) -> Record:
    """Returns the record of the newest event's time."""
    return Record(AGGREGATE, WATERMARK, watermark.to_bytes(8, "little", signed=True))


def expanded(records: Iterable[Record]) -> Iterator[Record]:
    """Yields the records of deltas as a store has them: a batch of aggregates as one record a key."""
    for one in records:
        if one.kind != BATCH:
            yield one
            continue
        group, keys, rows = decode_batch(one)
        yield from _by_key(group, keys, rows)


def state_records(aggregator: Aggregator, published: Aggregator | None = None) -> Iterator[Record]:
    """Yields the records of a state, as a store has them.

    Args:
        aggregator: The state.
        published: If given, only the keys with other rows than here.
    """
    if not aggregator.plan.columns:
        return
    for group, (by, state) in enumerate(aggregator.states.items()):
        keys, rows = state.keys, state.rows
        if published is not None:
            changed = np.flatnonzero(published.states[by].differ(keys, rows))
            keys, rows = keys[changed], rows[changed]
        yield from _by_key(group, keys, rows)
    yield watermark_record(aggregator.watermark)


def apply(aggregator: Aggregator, records: Iterable[Record]) -> int:
    """Sets the keys that a delta's records name to their rows, and the watermark.

    A forgotten key keeps a row without an event.

    Returns:
        Number of forgotten keys.
    """
    states, forgotten = list(aggregator.states.values()), 0
    for one in records:
        if one.kind == BATCH:
            group, keys, rows = decode_batch(one)
            states[group].put(keys, rows)
        elif one.kind == AGGREGATE and one.id == WATERMARK:
            aggregator.watermark = int.from_bytes(one.payload, "little", signed=True)
        elif one.kind == AGGREGATE and not one.payload:
            _clear(states, one.id)
            forgotten += 1
        elif one.kind == record.FORGOTTEN:
            names = record.decode_forgotten_record(one.payload).aggregates
            for name in names:
                _clear(states, name)
            forgotten += len(names)
    return forgotten


def _clear(states: Sequence[GroupState], name: str) -> None:
    """Gives the key of a record, by the record's id, a row without an event."""
    number, _, key = name.partition(".")
    state = states[int(number)]
    state.put(np.array([int(key, 16)], dtype=np.uint64), state.fresh_row[None])


def restored(plan: AggregatePlan, payloads: Mapping[str, bytes | None]) -> Aggregator:
    """Returns a state that has some keys.

    Args:
        plan: Plan of the aggregates.
        payloads: Records by id, as a store has them; None for a key that it lacks.

    Raises:
        EventError: A record has another size than the plan's.
    """
    found = Aggregator(plan)
    by_group: dict[int, list[tuple[str, bytes]]] = {}
    for name, payload in payloads.items():
        if not payload:
            continue
        if name == WATERMARK:
            found.watermark = int.from_bytes(payload, "little", signed=True)
            continue
        group, _, key = name.partition(".")
        by_group.setdefault(int(group), []).append((key, payload))
    states = list(found.states.values())
    for number, chosen in by_group.items():
        width = states[number].width
        data = b"".join(payload for _, payload in chosen)
        if len(data) != 8 * width * len(chosen):
            raise EventError(f"record of aggregates in group {number}: expected {8 * width} bytes each")
        keys = np.array([int(key, 16) for key, _ in chosen], dtype=np.uint64)
        states[number].put(keys, np.frombuffer(data, dtype="<i8").astype(np.int64).reshape(-1, width))
    return found


def _by_key(group: int, keys: Keys, rows: Rows) -> Iterator[Record]:
    width = 8 * rows.shape[1]
    data = rows.astype("<i8").tobytes()
    names: Sequence[int] = keys.tolist()
    for number, key in enumerate(names):
        yield Record(AGGREGATE, key_id(group, key), data[number * width : (number + 1) * width])
