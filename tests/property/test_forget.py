"""The law of forgetting: the state after a tombstone is the state of a log without the user, but for shared parts."""

import functools
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.aggregate.aggregator import Aggregator
from features.aggregate.stored import aggregate_arrays, restore_aggregates
from features.aggregate_frame import with_aggregates
from features.dataset.aggregate import Aggregate
from features.errors import DatasetError, EventError
from features.frame import build_frame
from features.value.forgotten import Forgotten, ForgottenUsers, hashed, read_forgotten
from models.bundle.bundle import Bundle, write_bundle
from streaming.forget.message import decode_tombstone, encode_tombstone
from streaming.log.protocol import BLANK, Message
from streaming.log.topics import Topics
from streaming.step import Step
from streaming.step_state import restore_step, snapshot_of
from tests.build import clicked_tables, coloured_parts

EPOCH, SALT, TOPICS = datetime(2020, 1, 1, tzinfo=UTC), "ab" * 16, Topics()
EVENTS = 200
START_MS = int(EPOCH.timestamp() * 1_000)
HOUR_US, DEVICES = 3_600_000_000, 3
DECLARED = {
    "seen": Aggregate(by=("user",), value="count", windows=("1d", "all")),
    "taste": Aggregate(by=("user", "item.colour"), value="rate", half_life=("3h",)),
    "variety": Aggregate(by=("user",), value={"distinct": "item"}),
    "each": Aggregate(by=("user", "item"), value="count"),
    "reach": Aggregate(by=("item",), value={"distinct": "user"}),
    "clicks": Aggregate(by=("item",), value="positive", windows=("all",)),
}
OF_DEVICES = DECLARED | {
    "devices": Aggregate(by=("user",), value={"distinct": "device"}),
    "clad": Aggregate(by=("user", "item.colour"), value={"distinct": "device"}),
}
"""The same with counts of a column of the events, for parts with `DEVICES`."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory = tmp_path_factory.mktemp("forget")
    parts = coloured_parts(directory, events=EVENTS, aggregates=OF_DEVICES, every_us=HOUR_US, devices=DEVICES)
    return write_bundle(parts, directory / "bundle")


@pytest.fixture(scope="module")
def without(bundle: Bundle) -> Callable[[str], Aggregator]:
    """The published aggregates as they were if the events of a user had never been read."""
    dataset, plan = bundle.dataset, bundle.schema.aggregates
    frame = build_frame(dataset, clicked_tables(EVENTS, HOUR_US, DEVICES), split=dataset.split, history_length=5)
    numbers = {name: number for number, name in enumerate(frame.users["user_id"])}

    @functools.cache
    def found(user: str) -> Aggregator:
        kept = frame.replace(examples=frame.examples.filter(pl.col("user") != numbers.get(user, -1)))
        return with_aggregates(kept, plan, base_rate=plan.base_rate)[1]

    return found


@dataclass(frozen=True)
class Sent:
    """An event, a tombstone or an item at a second after the start, in a partition.

    Attributes:
        device: Value of the event's column, None for a missing one.
        colour: New colour of the item in the place of an event; "" deletes the item.
    """

    user: str
    second: int
    partition: int = 0
    late_s: int = 0
    forget: bool = False
    item: int = 0
    device: str | None = None
    colour: str | None = None


def message(sent: Sent, offset: int) -> Message:
    at_us = (START_MS + 1_000 * sent.second) * 1_000
    if sent.colour is not None:
        row = {"item_id": f"i{sent.item}", "text": "a thing", "colour": sent.colour}
        data = json.dumps(row).encode() if sent.colour else b""
        return Message(TOPICS.items, 0, offset, f"i{sent.item}".encode(), data, at_us // 1_000)
    if sent.forget:
        value = encode_tombstone(Forgotten(hashed(sent.user, SALT), SALT, at_us))
    else:
        time = EPOCH + timedelta(seconds=sent.second - sent.late_s)
        row = {"user_id": sent.user, "item_id": f"i{sent.item}", "label": 1, "time": time.isoformat()}
        row |= {"device": sent.device} if sent.device else {}
        value = json.dumps(row).encode()
    return Message(TOPICS.events, sent.partition, offset, sent.user.encode(), value, at_us // 1_000)


def messages(sent: list[Sent]) -> list[Message]:
    return [message(one, offset) for offset, one in enumerate(sent)]


def batches(log: list[Message], cuts: list[int]) -> list[list[Message]]:
    """The messages in batches that end at `cuts`."""
    bounds = sorted({0, len(log), *(cut % (len(log) + 1) for cut in cuts)})
    return [log[start:stop] for start, stop in itertools.pairwise(bounds)]


def stepped(bundle: Bundle, log: list[Message], cuts: list[int], *, again_at: int = -1) -> Step:
    """A step after the messages in batches, copied through a snapshot before batch `again_at`."""
    step = Step(bundle, TOPICS, learning_rate=0.01)
    for number, batch in enumerate(batches(log, cuts)):
        if number == again_at:
            kept, step = snapshot_of(step, deltas=(0,), inputs={}), Step(bundle, TOPICS, learning_rate=0.01)
            restore_step(step, kept)
        step.apply(batch, train=False)
    return step


def own_state(step: Step, users: list[str]) -> dict[str, Any]:
    """Histories by id, and aggregates by user of the given users: everything that is no shared part."""
    catalogue = step.catalogue
    numbers = {user: catalogue.user_numbers[user] for user in users if user in catalogue.user_numbers}
    found: dict[str, Any] = {user: step.history_record(number) for user, number in numbers.items()}
    for by, state in step.aggregates.state.states.items():
        if "user" in by:
            order = np.argsort(state.keys)
            found[f"{by}"] = (state.keys[order].tolist(), state.rows[order].tolist())
    for of, pairs in step.aggregates.state.pairs.items():
        if "user" in of[0]:
            found[f"{of}"] = sorted(zip(pairs.hashes.tolist(), pairs.owners.tolist(), strict=True))
    return found


USERS = ["u0", "u3", "new", "other"]
EVENT = st.builds(
    Sent,
    user=st.sampled_from(USERS),
    second=st.just(0),
    partition=st.integers(0, 1),
    late_s=st.integers(0, 40),
    item=st.integers(0, 2),
    device=st.sampled_from([None, "d0", "d1", "new"]),
)
ITEM = st.builds(
    Sent,
    user=st.just(""),
    second=st.just(0),
    item=st.integers(0, 2),
    colour=st.sampled_from(["red", "teal", "pink", ""]),
)


@settings(max_examples=20, deadline=None)
@given(
    events=st.lists(st.one_of(EVENT, EVENT, ITEM), min_size=2, max_size=24),
    user=st.sampled_from(USERS[:3]),
    at=st.integers(0, 24),
    cuts=st.lists(st.integers(0, 30), max_size=4),
    again_at=st.integers(-1, 4),
)
def test_the_state_is_that_of_the_log_without_the_user_s_older_events(
    bundle: Bundle,
    without: Callable[[str], Aggregator],
    events: list[Sent],
    user: str,
    at: int,
    cuts: list[int],
    again_at: int,
) -> None:
    sent = [replace(one, second=10 * place) for place, one in enumerate(events)]
    at = min(at, len(sent))
    tombstone = Sent(user, 10 * at - 5, forget=True)
    whole = [*sent[:at], tombstone, *sent[at:]]
    log = messages(whole)
    step = stepped(bundle, log, cuts, again_at=again_at)
    older = {
        place
        for place, one in enumerate(whole)
        if one.user == user and not one.forget and (place < at or one.second - one.late_s <= tombstone.second)
    }
    # The twin never heard of the user: neither in the log nor in what was published.
    twin = Step(bundle, TOPICS, learning_rate=0.01)
    numbers = twin.catalogue.user_numbers
    published = np.array([numbers[user]] if user in numbers else [], dtype=np.int64)
    twin.history.forget(published)
    restore_aggregates(twin.aggregates.state, aggregate_arrays(without(user)))
    twin.catalogue.forget_users([user])
    left_out = {log[place].offset for place in (at, *older)}
    for batch in batches(log, cuts):
        twin.apply([one for one in batch if one.offset not in left_out], train=False)
    assert own_state(step, USERS) == own_state(twin, USERS)
    assert len(step.removals.users) == 1
    assert all(step.history.visits(number) == [] for number in step.removals.dead)
    snapshot = snapshot_of(step, deltas=(0,), inputs={})
    if not any(one.user == user for place, one in enumerate(whole) if place > at and place not in older):
        assert user not in step.catalogue.user_numbers
        assert user not in snapshot.memory.users


CASES = {
    "a value of a column of the events": [Sent("new", 0, device="d0"), Sent("new", 1, device="d1")],
    "a value between two updates of an item": [
        Sent("", 0, item=0, colour="teal"),
        Sent("new", 1, item=0, device="d0"),
        Sent("", 2, item=0, colour="pink"),
        Sent("", 3, item=0, colour="red"),
    ],
    "a value of a deleted item": [
        Sent("", 0, item=0, colour="teal"),
        Sent("new", 1, item=0, device="d0"),
        Sent("", 2, item=0, colour=""),
    ],
}


@pytest.mark.parametrize("sent", CASES.values(), ids=CASES)
@pytest.mark.parametrize("again", [False, True], ids=["going on", "from a snapshot"])
def test_nothing_of_a_removed_user_is_left(bundle: Bundle, sent: list[Sent], again: bool) -> None:
    old = [*sent, Sent("new", 10, forget=True)]
    later = [Sent("other", one.second, item=one.item, device=one.device) for one in sent if one.user]
    begun = stepped(bundle, messages([*old, *later]), [*range(len(old) + 1)], again_at=len(sent) if again else -1)
    twin = stepped(bundle, messages([*(one for one in sent if not one.user), *later]), [])
    assert own_state(begun, ["new", "other"]) == own_state(twin, ["new", "other"])


def test_tombstones_and_blanks_are_counted_and_no_dead_letters(bundle: Bundle) -> None:
    step = Step(bundle, TOPICS)
    old = Sent("u0", 3, late_s=2)
    log = messages([Sent("u0", 0), Sent("u0", 1, forget=True), old])
    blank = Message(TOPICS.events, 0, 9, None, BLANK, START_MS)
    outcome = step.apply([*log, blank])
    # The event before the tombstone, the tombstone, the late event and the blank message.
    assert (outcome.forgotten, outcome.events, outcome.bad) == (4, 0, [])
    assert [one.counts["records"] for one in outcome.removed] == [1]
    step.apply([message(Sent("u0", 5), 12)])
    assert step.catalogue.user_numbers["u0"] >= step.published_users


@pytest.mark.parametrize(
    "value",
    [b'{"_forget":{}}', b'{"_forget":{"user":"xx","salt":"%s","at_us":1}}' % SALT.encode(), b'{"_forget":7}'],
)
def test_an_invalid_tombstone_is_named(value: bytes) -> None:
    with pytest.raises(EventError, match="_forget"):
        decode_tombstone(value)


def test_an_event_that_mentions_the_field_in_a_text_is_no_tombstone() -> None:
    assert decode_tombstone(b'{"user_id":"\\"_forget\\""}') is None
    assert decode_tombstone(b'{"x": {"_forget": 1}}') is None


def test_a_list_of_forgotten_users_is_read_and_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "forgotten.jsonl"
    path.write_text(json.dumps({"user": hashed("u1", SALT), "salt": SALT, "at_us": 5, "kind": "requested"}) + "\n\n")
    users = read_forgotten(path)
    assert users.until("u1") == 5
    assert users.until("u2") is None
    assert users.left_out(["u1", "u1", "u2"], np.array([5, 6, 0])).tolist() == [True, False, False]
    path.write_text('{"user": "u1"}\n')
    with pytest.raises(DatasetError, match="line 1"):
        read_forgotten(path)
    with pytest.raises(DatasetError, match="topics export"):
        read_forgotten(tmp_path / "missing.jsonl")


def test_the_newest_request_counts() -> None:
    users = ForgottenUsers([Forgotten(hashed("u", SALT), SALT, 9), Forgotten(hashed("u", SALT), SALT, 4)])
    assert users.until("u") == 9
