"""Users are forgotten while the stream runs: store, mirror, snapshots and log lose them, and everything agrees."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from features.errors import LogError, StreamError
from features.hashing import fingerprint
from features.shown.consumed import FULL, HEAD, PAGE, SCHEMA, page_ids
from features.shown.policy import Policy
from features.value.forgotten import Forgotten, ForgottenUsers
from models.bundle import aggregate_record, delta, record
from models.bundle.bundle import Bundle, write_bundle
from serving.ranking.mirror import Mirror
from serving.ranking.service import RankService
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from serving.store.verify import replay, verify
from serving.store.writer import StoreWriter, position_of
from streaming.dead_letter import encode_dead_letter, move_waiting, put_back, read_dead_letters
from streaming.fold import Fold
from streaming.forget.message import Line
from streaming.forget.request import audit, forget
from streaming.forget.retention import rewrite
from streaming.log.protocol import BLANK, EventLog, Message
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from streaming.snapshot import Snapshots
from streaming.trainer import Trainer, TrainerOptions
from tests.build import coloured_parts, corrected_bundle
from tests.property.test_forget import DEVICES, HOUR_US, OF_DEVICES

SECRETS = [f"secret-{number}" for number in range(6)]
OPTIONS = TrainerOptions(batch=16, wait_s=0.2, most_bad=1.0)


POLICIES = {"unseen": Policy(leave_out_consumed=True)}


def consumed() -> pl.DataFrame:
    """Returns consumed items of published users: a full page and more."""
    keys = fingerprint([f"x{number}" for number in range(2 * (PAGE + 5))])
    users = [f"u{number % 2}" for number in range(len(keys))]
    return pl.DataFrame({"user_id": users, "key": keys}, schema=SCHEMA)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory = tmp_path_factory.mktemp("forget")
    parts = coloured_parts(directory, events=200, aggregates=OF_DEVICES, every_us=HOUR_US, devices=DEVICES)
    parts = replace(parts, dataset=parts.dataset.model_copy(update={"policies": POLICIES}), consumed=consumed())
    # The correction keeps labelled items of each user, which are forgotten too.
    return corrected_bundle(write_bundle(parts, directory / "bundle"), directory / "corrected")


def events(
    users: list[str], *, start: int, count: int, age: timedelta = timedelta(0)
) -> list[tuple[bytes | None, bytes]]:
    """Events that begin now less an age, user by user."""
    found: list[tuple[bytes | None, bytes]] = []
    begin = datetime.now(UTC) - age
    for number in range(start, start + count):
        user = users[number % len(users)]
        row = {
            "user_id": user,
            "item_id": f"i{number % 40}",
            "label": int(number % 7 > 1),
            "time": (begin + timedelta(microseconds=number)).isoformat(),
            "device": f"d{number % 2}",
            "_event_id": f"{number}",
        }
        found.append((user.encode(), json.dumps(row).encode()))
    return found


class _Killed(Exception):
    pass


class Site:
    """A stream whose trainer dies inside transactions, its store, and its snapshots."""

    def __init__(self, log: EventLog, topics: Topics, bundle: Bundle, directory: Path) -> None:
        self.log, self.topics, self.bundle, self.store = log, topics, bundle, MemoryStore()
        log.create_topics(topics.partitions(2))
        self.directory = directory / "snapshots"
        self.snapshots = Snapshots(self.directory)
        fill_store(self.store, bundle)
        self.mirror = Mirror(self.store, bundle.id, bundle.schema.aggregates)
        self.service = RankService(bundle, self.store)
        self.die_at: set[int] = set()
        self._visits = self.crashes = 0

    def drain(self) -> None:
        """Runs to the end of the log, through as many crashes as there are."""
        while True:
            trainer = Trainer(
                self.log,
                self.bundle,
                topics=self.topics,
                options=OPTIONS,
                snapshots=self.snapshots,
                failpoint=self._fail,
            )
            try:
                while not trainer.drained():
                    trainer.run_once()
                trainer.write_snapshot()
                break
            except _Killed:
                self.crashes += 1
            finally:
                with contextlib.suppress(LogError):
                    trainer.close()
        with contextlib.closing(StoreWriter(self.log, self.bundle.id, self.store, topics=self.topics)) as writer:
            # A loaded broker answers late, and an empty answer ends the drain.
            while writer.run_once(wait_s=2.0):
                pass
        self.service.refresh()

    def _fail(self, place: str) -> None:
        self._visits += 1
        if self._visits in self.die_at:
            raise _Killed

    def agrees(self) -> None:
        """Store, fold, a fold from the snapshot, another store and the mirror have one state."""
        snapshot = self.snapshots.newest(self.bundle)
        for of in (None, snapshot):
            assert verify(self.log, self.bundle, self.store, self.topics, snapshot=of).difference == ""
        other = MemoryStore()
        replay(self.log, self.bundle, other, self.topics, snapshot)
        assert verify(self.log, self.bundle, other, self.topics).difference == ""
        end = self.log.end_offsets(self.topics.deltas)[0]
        for message in self.log.read(self.topics.deltas, 0, 0, end):
            self.mirror.fold(delta.decode(message.value))
        fresh = Mirror(self.store, self.bundle.id, self.bundle.schema.aggregates)
        for by, state in fresh._aggregates.states.items():
            ours = self.mirror._aggregates.states[by].compacted()
            assert sorted(ours.keys.tolist()) == sorted(state.keys.tolist())
            assert not ours.differ(state.keys, state.rows).any()

    def holds(self, user: str) -> list[str]:
        """Places that hold a user's id."""
        found = []
        for kind in (record.HISTORY, record.FORGOTTEN, HEAD, FULL, aggregate_record.AGGREGATE):
            stored = [
                name + repr(data) for chunk in self.store.scan_records(self.bundle.id, kind) for name, data in chunk
            ]
            found += [f"store {kind}"] * any(user in text for text in stored)
        files = [path for path in self.directory.rglob("*") if path.is_file()]
        found += [str(path) for path in files if user.encode() in path.read_bytes()]
        found += ["server"] * (user in self.service._catalogue.user_numbers)
        return found


@pytest.fixture
def site(log: EventLog, topics: Topics, bundle: Bundle, tmp_path: Path) -> Site:
    return Site(log, topics, bundle, tmp_path)


def test_users_are_forgotten_under_crashes_and_everything_agrees(site: Site) -> None:
    # u0 and u1 are published, the others come with the stream; u5 stays.
    users = ["u0", "u1", *SECRETS, "u5"]
    gone = ["u0", "u1", *SECRETS[:4]]
    site.log.append(site.topics.events, events(users, start=0, count=90, age=timedelta(minutes=10)))
    site.die_at = {3, 6}
    site.drain()
    assert site.holds(SECRETS[0])
    site.log.append(site.topics.events, events(users, start=90, count=30, age=timedelta(minutes=5)))
    forget(site.log, site.topics, gone, by="test")
    # Late events of forgotten users, and events of the others.
    site.log.append(site.topics.events, events(users, start=120, count=45, age=timedelta(minutes=2)))
    site.die_at = {site._visits + visit for visit in (1, 4, 7)}
    site.drain()
    assert site.crashes == 5
    # The second snapshot replaces those from before.
    site.log.append(site.topics.events, events(["u5"], start=165, count=3))
    site.drain()
    site.agrees()
    for user in SECRETS[:4]:
        assert site.holds(user) == []
    assert site.store.read_records(site.bundle.id, HEAD, ["u5"]) != [None]
    snapshot = site.snapshots.newest(site.bundle)
    assert snapshot is not None
    for name in ("consumed_users", "consumed_page_users"):
        assert name == "consumed_page_users" or len(snapshot.arrays[name])
        assert not set(snapshot.arrays[name].tolist()) & set(snapshot.memory.dead)
    for user in ("u0", "u1"):
        assert site.store.read_records(site.bundle.id, record.HISTORY, [user]) == [None]
        assert site.store.read_records(site.bundle.id, HEAD, [user]) == [None]
        assert site.store.read_records(site.bundle.id, FULL, page_ids(user, 3)) == [None] * 3
        assert user not in site.service._catalogue.user_numbers
        answer = site.service.rank(user, ["i1", "i2"], 2)
        assert not answer.known_user
    assert site.holds(SECRETS[4])
    lines = list(audit(site.log, site.topics))
    assert [line.kind for line in lines] == ["requested"] * len(gone) + ["removed"] * len(gone)
    named = ForgottenUsers([_request(line) for line in lines])
    assert named.named(users) == gone
    assert all(line.removed["records"] == 1 and line.removed["visits"] > 0 for line in lines[len(gone) :])
    assert all("table rows" in line.shared for line in lines[len(gone) :])


def _request(line: Line) -> Forgotten:
    return Forgotten(line.user, line.salt, line.at_us)


def test_a_forgotten_user_begins_a_new_life(site: Site) -> None:
    site.log.append(site.topics.events, events(["u0", "u5"], start=0, count=20, age=timedelta(minutes=1)))
    forget(site.log, site.topics, ["u0"], by="test")
    site.drain()
    site.log.append(site.topics.events, events(["u0"], start=100, count=2))
    site.drain()
    site.drain()
    site.agrees()
    (payload,) = site.store.read_records(site.bundle.id, record.HISTORY, ["u0"])
    assert payload is not None
    assert len(record.decode_history(payload).items) == 2
    again = forget(site.log, site.topics, ["u0"], by="test")
    site.drain()
    site.agrees()
    assert site.store.read_records(site.bundle.id, record.HISTORY, ["u0"]) == [None]
    assert len({line.user for line in audit(site.log, site.topics)}) == len(again) == 1


def test_the_rewritten_log_holds_no_id_and_restarts_and_verifies(bundle: Bundle, tmp_path: Path) -> None:
    log = LocalLog(tmp_path / "log.db")
    site = Site(log, Topics(), bundle, tmp_path)
    users = [*SECRETS, "u5"]
    broken = [(SECRETS[0].encode(), json.dumps({"user_id": SECRETS[0]}).encode())]
    log.append("events", [*events(users, start=0, count=60, age=timedelta(minutes=10)), *broken])
    shown = {"kind": "shown", "id": "r", "user": SECRETS[1], "time_ms": 5, "bundle": bundle.id, "model": "m"}
    log.append("impressions", [(b"r", json.dumps(shown).encode())])
    site.drain()
    forget(log, site.topics, SECRETS[:5], by="test")
    snapshot = site.snapshots.newest(bundle)
    assert snapshot is not None
    stored = position_of(site.store, bundle.id, "deltas") or ()
    # The requests are newer than the snapshot.
    assert (early := rewrite(log, bundle, site.topics, snapshot, stored=stored)).counts == {}
    assert early.newer == 5
    log.append("events", events(users, start=60, count=20, age=timedelta(minutes=2)))
    site.drain()
    snapshot = site.snapshots.newest(bundle)
    assert snapshot is not None
    with pytest.raises(StreamError, match="stream --once"):
        rewrite(log, bundle, site.topics, snapshot, stored=(snapshot.deltas[0] - 1,))
    before = {message.offset: message for message in log.read("events", 0, 0, 10**6)}
    done = rewrite(log, bundle, site.topics, snapshot, stored=snapshot.deltas)
    assert done.counts["events"] > 40
    assert done.counts["impressions"] == done.counts["deadletters"] == 1
    assert done.newer == 0
    site.snapshots.prune(bundle, snapshot.seq)
    after = {message.offset: message for message in log.read("events", 0, 0, 10**6)}
    assert after.keys() == before.keys()
    kept = [
        offset for offset, message in before.items() if b"u5" in message.value or SECRETS[5].encode() in message.value
    ]
    assert [after[offset] for offset in kept] == [before[offset] for offset in kept]
    assert {message.value for message in after.values()} >= {BLANK}
    assert rewrite(log, bundle, site.topics, snapshot, stored=snapshot.deltas).counts == {}
    log.append("events", events(["u5"], start=90, count=10))
    site.drain()
    site.agrees()
    log.close()
    raw = b"".join(path.read_bytes() for path in tmp_path.glob("log.db*"))
    for user in SECRETS[:5]:
        assert user.encode() not in raw
        assert site.holds(user) == []
    assert SECRETS[5].encode() in raw
    # A store that missed the removal finds the ids by their hashes, and a start without snapshots works.
    log = LocalLog(tmp_path / "log.db")
    late = MemoryStore()
    fill_store(late, bundle)
    late.write_records(bundle.id, record.HISTORY, [SECRETS[0]], [1], [b"old"])
    with contextlib.closing(StoreWriter(log, bundle.id, late, topics=site.topics)) as writer:
        while writer.run_once():
            pass
    assert late.read_records(bundle.id, record.HISTORY, [SECRETS[0]]) == [None]
    fold = Fold(log, bundle, site.topics)
    fold.advance()
    with contextlib.closing(Trainer(log, bundle, topics=site.topics, options=OPTIONS)) as trainer:
        assert (trainer.step.ranker.table.weight.numpy().view(np.uint32) == fold.weight.view(np.uint32)).all()
    log.close()


def test_kafka_deletes_only_when_told_to(kafka_log: EventLog, topics: Topics, bundle: Bundle, tmp_path: Path) -> None:
    site = Site(kafka_log, topics, bundle, tmp_path)
    site.log.append(topics.events, events(SECRETS, start=0, count=30, age=timedelta(minutes=1)))
    forget(site.log, topics, SECRETS, by="test")
    site.drain()
    snapshot = site.snapshots.newest(bundle)
    assert snapshot is not None
    stored = position_of(site.store, bundle.id, topics.deltas) or ()
    with pytest.raises(StreamError, match="stream --once"):
        rewrite(kafka_log, bundle, topics, snapshot, stored=(), delete_records=True)
    with pytest.raises(StreamError, match="delete-records"):
        rewrite(kafka_log, bundle, topics, snapshot, stored=stored)
    done = rewrite(kafka_log, bundle, topics, snapshot, stored=stored, delete_records=True)
    assert done.counts[topics.events] >= 36
    for partition, oldest in kafka_log.offsets_at(topics.events, 0).items():
        assert oldest == kafka_log.end_offsets(topics.events)[partition]
    assert done.counts[topics.deltas] > 0
    site.log.append(topics.events, events(["u5"], start=90, count=10))
    site.drain()
    assert verify(site.log, bundle, site.store, topics, snapshot=site.snapshots.newest(bundle)).difference == ""


def test_waiting_letters_of_others_move_once(log: EventLog, topics: Topics) -> None:
    log.create_topics(topics.partitions())
    for number, user in enumerate(["staying", SECRETS[0], "back", "staying-2", SECRETS[1], "newer"]):
        broken = Message(topics.events, 0, number, user.encode(), b'{"user_id": "%s"}' % user.encode(), 0)
        log.append(topics.dead_letters, [(None, encode_dead_letter(broken, "late", "why"))])
    numbers = {one.letter.key: one.number for one in read_dead_letters(log, topics)}
    put_back(log, topics, [numbers[b"back"]], {})
    changed = {numbers[user.encode()]: BLANK for user in SECRETS[:2]}
    last = max(changed) + 1
    # A letter of several rows may lose some of them.
    fewer = Message(topics.events, 0, 3, b"staying-2", b"fewer", 0)
    changed[numbers[b"staying-2"]] = encode_dead_letter(fewer, "late", "why")
    for _ in range(2):
        move_waiting(log, topics, last, changed=changed)
        kept = [one for one in read_dead_letters(log, topics) if one.waits and one.number >= last]
        assert [one.letter.key for one in kept] == [b"newer", b"staying", b"staying-2"]
        assert [one.letter.offset for one in kept] == [5, 0, 3]
        assert kept[-1].letter.value == b"fewer"


@pytest.fixture
def kafka_log(kafka_address: str) -> Iterator[EventLog]:
    from streaming.log.kafka import KafkaLog

    with contextlib.closing(KafkaLog(kafka_address)) as opened:
        yield opened
