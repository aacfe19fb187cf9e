"""Laws of a batch of messages: what is read at once equals what is read message by message."""

import base64
import json
from dataclasses import asdict
from typing import Any

import numpy as np
import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from features.dataset.descriptor import Events
from features.errors import EventError, StreamError
from features.history import EventColumns, History
from features.message import Rows, event_rows
from features.wire.decoder import ENVELOPE, Decoded, event_decoder
from models.bundle.delta import Source
from models.table.admission import Admission, Sketch
from models.table.column_rows import ColumnValues
from models.table.schema import Feature, Schema
from streaming.inbox import Inbox, in_order
from streaming.log.protocol import Message
from streaming.log.topics import Topics
from streaming.ranks.pins import sources_of

EVENTS = Events.model_validate(
    {
        "path": "events.csv",
        "user": "user",
        "item": "item",
        "time": {"column": "at", "unit": "s"},
        "label": {"column": "stars", "positive": ">= 4", "negative": "<= 2"},
        "categorical": ["tags"],
    }
)
DECODE = event_decoder(EVENTS)
TOPICS = Topics()

_ids = st.one_of(
    st.integers(-3, 3), st.integers(2**63 - 2, 2**70), st.sampled_from(["a", "5", "", "nul\0"]), st.floats(), st.none()
)
_rows = st.fixed_dictionaries(
    {
        "user": _ids,
        "item": _ids,
        "at": st.sampled_from([1, 2, 2.5, "3", None]),
        "stars": st.sampled_from([1, 5, 3, "4"]),
    },
    optional={
        "tags": st.sampled_from(["x", ["x", "y"], [], None, 7]),
        "_event_id": st.sampled_from([1, "1", 2**64, None]),
        "_schema": st.sampled_from([1, 2]),
        "_backfill": st.booleans(),
        "_version": st.integers(0, 3),
        "other": st.just({"_message": "x"}),
    },
)


def _wrapped(value: bytes) -> bytes:
    return b'{"_message":"%s","_backfill":true}' % base64.b64encode(value)


_json = _rows.map(lambda row: json.dumps(row).encode())
_values = st.one_of(
    _json,
    _json,
    _json,
    _json.map(_wrapped),
    _json.map(lambda value: value[:-1]),
    _json.map(lambda value: value + b"," + value),
    _json.map(lambda value: b"[" + value),
    st.sampled_from([b"", b"\0\0\0\0\1x", b"\xff\xff\xff\xffxxxx", b"null", b'{"user": "\xff"}', b"[" * 5_000]),
)


def _read(value: bytes) -> Decoded | None:
    try:
        found = DECODE.read(value)
    except (EventError, StreamError):
        return None
    assert isinstance(found, Decoded)
    return found


@given(values=st.lists(_values, max_size=12), most=st.sampled_from([1 << 20, 90]))
@settings(max_examples=300)
def test_messages_decoded_at_once_are_those_decoded_one_by_one(values: list[bytes], most: int) -> None:
    rows = DECODE.rows(values, most_bytes=most)
    assert len(rows) == len(values)
    for value, row in zip(values, rows, strict=True):
        expected = _read(value)
        plain = len(value) <= most and not value.startswith(b'{"_message":')
        assert (row is not None) == (plain and expected is not None)
        if row is not None and expected is not None:
            found = Decoded(row[:-ENVELOPE], *row[1 - ENVELOPE :])
            assert repr(found) == repr(expected)


@given(values=st.lists(_json, max_size=12))
def test_an_inbox_filled_at_once_is_the_inbox_filled_one_by_one(values: list[bytes]) -> None:
    read = [(Message("events", 0, number, None, value, number), _read(value)) for number, value in enumerate(values)]
    slow, fast = Inbox(), Inbox()
    for message, decoded in read:
        if decoded is not None:
            assert slow.add(message, decoded) == []
    kept = [message for message, decoded in read if decoded is not None]
    if kept:
        fast.extend(kept, [row for row in DECODE.rows([one.value for one in kept]) if row is not None])
    assert repr(asdict(fast)) == repr(asdict(slow))
    assert fast.appended_us().tolist() == [1_000 * message.timestamp_ms for message in kept]
    assert fast.partitions().tolist() == [message.partition for message in kept]


@given(values=st.lists(_json, min_size=1, max_size=12))
@settings(max_examples=200)
def test_rows_shaped_together_are_the_rows_shaped_one_by_one(values: list[bytes]) -> None:
    rows: list[Any] = [found.row for value in values if (found := _read(value)) is not None]
    frame, bad = event_rows(Rows(DECODE.columns, rows), EVENTS)
    alone = [event_rows(Rows(DECODE.columns, [row]), EVENTS) for row in rows]
    assert sorted(bad) == [number for number, (_, own) in enumerate(alone) if own]
    single = [own.with_columns(event=pl.lit(n, pl.UInt32)) for n, (own, _) in enumerate(alone) if own.height]
    assert frame.rows() == (pl.concat(single).rows() if single else [])


_messages = st.lists(
    st.tuples(st.sampled_from([TOPICS.items, TOPICS.events]), st.integers(0, 2), st.integers(0, 99)), unique=True
).map(lambda places: [Message(*place, None, b"", 0) for place in places])


@given(messages=_messages)
def test_order_and_sources_are_those_of_a_loop(messages: list[Message]) -> None:
    def key(one: Message) -> tuple[bool, str, int, int]:
        return one.topic != TOPICS.items, one.topic, one.partition, one.offset

    ordered = sorted(messages, key=key)
    assert in_order(messages, TOPICS) == ordered
    for polled in (ordered, messages):
        offsets: dict[tuple[str, int], list[int]] = {}
        for message in polled:
            offsets.setdefault((message.topic, message.partition), []).append(message.offset)
        assert sources_of(polled) == [Source(*place, own[0], own[-1]) for place, own in offsets.items()]


@given(
    published=st.lists(st.integers(0, 9), max_size=20),
    batches=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), max_size=6),
)
def test_an_admission_ignores_the_values_that_do_not_wait(published: list[int], batches: list[list[int]]) -> None:
    """The sightings of all values, and those of waiting values alone, leave two admissions in one state."""
    feature = Feature(name="v", of="item", column="v", chunks=1, salt="v")
    schema = Schema(rows=64, dim=4, features=(feature,), history_length=2, numeric=())
    column = pl.Series("v", [f"v{number}" for number in range(10)])

    def admission() -> Admission:
        sketch = Sketch.sized(10)
        keys = ColumnValues(column, schema, feature, Admission.off()).keys(np.array(published, dtype=np.int64))[0]
        sketch.add(keys, np.ones(len(keys), dtype=np.int64))
        return Admission(sketch, 3)

    slow, fast = admission(), admission()
    every, some = (ColumnValues(column, schema, feature, own) for own in (slow, fast))
    for batch in batches:
        index = np.array(batch, dtype=np.int64)
        assert slow.sight(*every.sightings(index)).tolist() == fast.sight(*some.waiting(index)).tolist()
        for left, right in zip(every.lookup(index), some.lookup(index), strict=True):
            assert left.tolist() == right.tolist()
    for name, state in slow.state().items():
        assert np.array_equal(state, fast.state()[name]), name


@given(events=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=30))
def test_visits_of_users_are_the_visits_of_each(events: list[tuple[int, int, int]]) -> None:
    history = History(3)
    users, items, times = (np.array(column, dtype=np.int64) for column in zip(*events, strict=True))
    _, changed = history.advance(EventColumns(users, items, times, np.ones(len(users), dtype=np.bool_)))
    for user, (seen, at) in zip(changed.tolist(), history.visits_of(changed), strict=True):
        assert list(zip(seen, at, strict=True)) == history.visits(user)
