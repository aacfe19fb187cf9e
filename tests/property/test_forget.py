"""The law of forgetting: the state after a tombstone is the state of a log without the user, but for shared parts."""

import itertools
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.dataset.aggregate import Aggregate
from features.errors import DatasetError, EventError
from features.value.forgotten import Forgotten, ForgottenUsers, hashed, read_forgotten
from models.bundle.bundle import Bundle, write_bundle
from streaming.forget.message import decode_tombstone, encode_tombstone
from streaming.log.protocol import BLANK, Message
from streaming.log.topics import Topics
from streaming.step import Step
from streaming.step_state import restore_step, snapshot_of
from tests.build import coloured_parts

EPOCH, SALT, TOPICS = datetime(2020, 1, 1, tzinfo=UTC), "ab" * 16, Topics()
START_MS = int(EPOCH.timestamp() * 1_000)
DECLARED = {
    "seen": Aggregate(by=("user",), value="count", windows=("1d", "all")),
    "taste": Aggregate(by=("user", "item.colour"), value="rate", half_life=("3h",)),
    "variety": Aggregate(by=("user",), value={"distinct": "item"}),
    "clicks": Aggregate(by=("item",), value="positive", windows=("all",)),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory = tmp_path_factory.mktemp("forget")
    parts = coloured_parts(directory, events=200, aggregates=DECLARED, every_us=3_600_000_000)
    return write_bundle(parts, directory / "bundle")


@dataclass(frozen=True)
class Sent:
    """An event or a tombstone at a second after the start, in a partition."""

    user: str
    second: int
    partition: int = 0
    late_s: int = 0
    forget: bool = False


def message(sent: Sent, offset: int) -> Message:
    at_us = (START_MS + 1_000 * sent.second) * 1_000
    if sent.forget:
        value = encode_tombstone(Forgotten(hashed(sent.user, SALT), SALT, at_us))
    else:
        time = EPOCH + timedelta(seconds=sent.second - sent.late_s)
        row = {"user_id": sent.user, "item_id": f"i{sent.second % 40}", "label": 1, "time": time.isoformat()}
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
            kept, step = snapshot_of(step, deltas=0, inputs={}), Step(bundle, TOPICS, learning_rate=0.01)
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
    found["pairs"] = {
        of: sorted(pairs.keys().tolist()) for of, pairs in step.aggregates.state.pairs.items() if "user" in of[0]
    }
    return found


USERS = ["u0", "u3", "new", "other"]
EVENT = st.builds(
    Sent, user=st.sampled_from(USERS), second=st.just(0), partition=st.integers(0, 1), late_s=st.integers(0, 40)
)


@settings(max_examples=20, deadline=None)
@given(
    events=st.lists(EVENT, min_size=2, max_size=24),
    user=st.sampled_from(USERS[:3]),
    at=st.integers(0, 24),
    cuts=st.lists(st.integers(0, 30), max_size=4),
    again_at=st.integers(-1, 4),
)
def test_the_state_is_that_of_the_log_without_the_user_s_older_events(
    bundle: Bundle, events: list[Sent], user: str, at: int, cuts: list[int], again_at: int
) -> None:
    sent = [Sent(one.user, 10 * place, one.partition, one.late_s) for place, one in enumerate(events)]
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
    twin.aggregates.forget(published)
    twin.catalogue.forget_users([user])
    left_out = {log[place].offset for place in (at, *older)}
    for batch in batches(log, cuts):
        twin.apply([one for one in batch if one.offset not in left_out], train=False)
    assert own_state(step, USERS) == own_state(twin, USERS)
    assert len(step.removals.users) == 1
    assert all(step.history.visits(number) == [] for number in step.removals.dead)
    snapshot = snapshot_of(step, deltas=0, inputs={})
    if not any(one.user == user for place, one in enumerate(whole) if place > at and place not in older):
        assert user not in step.catalogue.user_numbers
        assert user not in snapshot.memory.users


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
