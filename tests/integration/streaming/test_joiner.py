"""The joiner's rows are the rows of the exported topics and of the twin, whatever crash or restart comes between."""

import contextlib
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import polars as pl
import pytest

from features.dataset.descriptor import Events
from features.dataset.logs.impressions import load_impressions, row_message
from features.dataset.tables import shape_events
from features.errors import FencedError
from features.message import Rows, event_rows
from features.shown.message import Impression, Outcome, encode
from features.shown.rule import JoinRule
from features.value.forgotten import Forgotten, hashed
from features.wire.decoder import event_decoder
from streaming.forget.message import encode_line
from streaming.log.protocol import EventLog
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from streaming.shown.export import export_topic
from streaming.shown.joiner import Joiner
from tests.property.test_shown import shop, twin

COUNT = int(os.environ.get("SHOWN_IMPRESSIONS", "300"))
TOPICS, SALT = Topics("j"), "ab" * 16
EVENTS = Events.model_validate(
    {
        "from": "impressions",
        "path": "shown.jsonl",
        "outcomes_path": "done.jsonl",
        "outcomes": ["click", "buy"],
        "window": "10s",
        "request": {"device": {"type": "category", "default": "web"}},
        "candidate": {"price_now": {"type": "number", "default": 9.0}},
    }
)
RULE = JoinRule(("click", "buy"), 10_000)
NOW: list[int] = [0]


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EventLog]:
    """A log of three partitions whose appends carry the times that a test sets."""
    fake = SimpleNamespace(
        **{name: getattr(time, name) for name in dir(time)} | {"time_ns": lambda: NOW[0] * 1_000_000}
    )
    monkeypatch.setattr("streaming.log.sqlite.time", fake)
    opened = LocalLog(tmp_path / "log.db")
    opened.create_topics(TOPICS.partitions(3))
    yield opened
    opened.close()


def fill(log: EventLog, messages: list[tuple[Impression | Outcome, int]]) -> None:
    """Appends messages at their times."""
    for message, at in messages:
        NOW[0] = at
        topic, key = (
            (TOPICS.outcomes, message.impression) if isinstance(message, Outcome) else (TOPICS.impressions, message.id)
        )
        log.append(topic, [(key.encode(), encode(message))])


def appended(log: EventLog) -> list[bytes]:
    """All rows in the topic of events, by their content."""
    ends = log.end_offsets(TOPICS.events)
    return sorted(message.value for part, end in ends.items() for message in log.read(TOPICS.events, part, 0, end))


class Crash(Exception):
    """A fault in a transaction."""


def test_rows_of_stream_and_files_and_twin_are_equal(log: EventLog, tmp_path: Path) -> None:
    messages = sorted(shop(COUNT, 3), key=lambda pair: pair[1])
    # The newest message closes every window, also where the files end.
    messages.append((Impression("end", "u", 1, "b", "m", items=["x"]), messages[-1][1] + RULE.horizon_ms + 1))
    expected = [row for row in twin(messages, RULE) if row.impression != "end"]
    draw = random.Random(5)
    third = len(messages) // 3
    for start in range(0, len(messages), third):
        fill(log, messages[start : start + third])
        deadly = draw.randrange(1, 4)

        def crash(name: str, left: list[int] = [deadly]) -> None:  # noqa: B006
            left[0] -= 1
            if not left[0]:
                raise Crash

        now = messages[min(start + third, len(messages)) - 1][1]
        joiner = Joiner(log, EVENTS, TOPICS, clock=lambda now=now: now, failpoint=crash)
        try:
            joiner.drain()
        except Crash:
            joiner.close()
            joiner = Joiner(log, EVENTS, TOPICS, clock=lambda now=now: now)
            joiner.drain()
        joiner.close()
    last = Joiner(log, EVENTS, TOPICS, clock=lambda: messages[-1][1] + 10_000)
    last.drain()
    counts = last.counts
    last.close()
    assert appended(log) == sorted(row_message(row, EVENTS) for row in expected)
    assert (counts["open"], counts["row"]) == (1, len(expected))
    assert counts["late"] > 0
    assert export_topic(log, TOPICS.impressions, tmp_path / "shown.jsonl") == log_size(log, TOPICS.impressions)
    export_topic(log, TOPICS.outcomes, tmp_path / "done.jsonl")
    table = load_impressions(EVENTS, tmp_path)
    rows = [{name: value for name, value in row.items() if value is not None} for row in table.frame.to_dicts()]
    assert sorted(map(msgspec.json.encode, rows)) == sorted(
        msgspec.json.encode(msgspec.json.decode(message)) for message in appended(log)
    )
    # Shaped as a frame and as a step shapes them: with defaults, in the order of the rows' content.
    decode = event_decoder(EVENTS)
    streamed, bad = event_rows(Rows(decode.columns, [decode(message).row for message in appended(log)]), EVENTS)
    assert bad == {}
    order = ["time", "user_id", "item_id", "price_now", "label"]
    shaped = shape_events(table, EVENTS)[0].with_columns(pl.concat_list("device"))
    columns = [*order, "device"]
    assert streamed.select(columns).sort(columns).equals(shaped.select(columns).sort(columns))
    assert set(shaped["price_now"]) == {1.5, 2.0, 9.0}
    assert set(shaped["device"].list.first()) == {"tv", "phone", "web"}


def log_size(log: EventLog, topic: str) -> int:
    """Number of messages of a topic."""
    return sum(log.end_offsets(topic).values())


def test_rows_of_forgotten_users_are_left_out_and_rows_of_their_new_lives_are_not(log: EventLog) -> None:
    messages = sorted(shop(COUNT, 7), key=lambda pair: pair[1])
    messages.append((Impression("end", "u", 1, "b", "m", items=["x"]), messages[-1][1] + RULE.horizon_ms + 1))
    rows = [row for row in twin(messages, RULE) if row.impression != "end"]
    gone = sorted({row.user for row in rows})[:3]
    times = sorted(row.time_ms for row in rows if row.user in gone)
    at_us = 1_000 * times[len(times) // 2]
    fill(log, messages)
    requests = [Forgotten(hashed(user, SALT), SALT, at_us) for user in gone]
    log.append(TOPICS.forgotten, [(None, encode_line("requested", request)) for request in requests])

    def crash(name: str) -> None:
        raise Crash

    # The rows are left out by the joiner that crashes, and again by the next.
    with contextlib.closing(
        Joiner(log, EVENTS, TOPICS, clock=lambda: messages[-1][1] + 10_000, failpoint=crash)
    ) as one:
        with pytest.raises(Crash):
            one.drain()
    with contextlib.closing(Joiner(log, EVENTS, TOPICS, clock=lambda: messages[-1][1] + 10_000)) as last:
        last.drain()
        counts = last.counts
    left = [row for row in rows if row.user not in gone or 1_000 * row.time_ms > at_us]
    assert appended(log) == sorted(row_message(row, EVENTS) for row in left)
    assert counts["forgotten"] == len(rows) - len(left) > 0
    assert any(row.user in gone for row in left)


def test_a_second_joiner_fences_the_first(log: EventLog) -> None:
    fill(log, sorted(shop(20, 1), key=lambda pair: pair[1]))
    first = Joiner(log, EVENTS, TOPICS, clock=lambda: 10**9)
    second = Joiner(log, EVENTS, TOPICS, clock=lambda: 10**9)
    with pytest.raises(FencedError):
        first.drain()
    second.drain()
    assert len(appended(log)) == second.counts["row"] > 0
    first.close()
    second.close()


def test_an_impression_with_a_clock_that_is_ahead_closes_no_window(log: EventLog) -> None:
    fill(log, [(Impression("a", "u", 100_000, "b", "m", items=["x"]), 100_000)])
    fill(log, [(Impression("b", "u", 10**12, "b", "m", items=["x"]), 100_100)])
    with_clock = Joiner(log, EVENTS, TOPICS, clock=lambda: 101_000)
    with_clock.drain()
    assert with_clock.counts["open"] == 2
    fill(log, [(Outcome("a", "x", 101_000), 101_500)])
    with_clock.close()
    later = Joiner(log, EVENTS, TOPICS, clock=lambda: 100_000 + RULE.horizon_ms + 6_000)
    later.drain()
    later.close()
    (row, ahead) = map(msgspec.json.decode, appended(log))
    assert {row["click"], ahead["click"]} == {0, 1}
    assert max(row["time"], ahead["time"]) == 100_100 + 300_000
