"""Topics in Avro, Protobuf and Arrow: the state that JSON gives, under crashes, outages and faulty messages."""

import base64
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from features.errors import LogError, RegistryError, StreamError
from features.wire.arrow import encode_batch
from features.wire.decoder import DecodedBatch, event_decoder
from models.bundle.bundle import Bundle, write_bundle
from streaming.dead_letter import Filed, causes, put_back, read_dead_letters, waiting
from streaming.forget.request import forget
from streaming.forget.retention import rewrite
from streaming.log.protocol import BLANK, EventLog
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from streaming.snapshot import Snapshots
from streaming.trainer import Trainer, TrainerOptions
from tessera.messages import FORMATS, encoded
from tessera.settings import Settings
from tests.build import coloured_parts
from tests.integration.streaming.test_exactly_once import bits
from tests.property.test_forget import DECLARED
from tests.schema_registry import StubRegistry, schema_registry

BATCH = 16
OPTIONS = TrainerOptions(batch=BATCH, wait_s=0.2, most_bad=1.0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory = tmp_path_factory.mktemp("formats")
    parts = coloured_parts(directory, events=200, aggregates=DECLARED, every_us=3_600_000_000)
    return write_bundle(parts, directory / "bundle")


@pytest.fixture
def registry() -> Iterator[StubRegistry]:
    with schema_registry() as running:
        yield running


class Site:
    """A log with one topic of a format, and the trainer on it."""

    def __init__(self, log: EventLog, topics: Topics, bundle: Bundle, registry: StubRegistry, directory: Path) -> None:
        self.log, self.topics, self.bundle, self.registry, self.directory = log, topics, bundle, registry, directory
        log.create_topics(topics.partitions())
        self.settings = Settings(home=directory, schema_registry=registry.address)
        self.snapshots: Snapshots | None = None
        self.refused: list[int] = []

    def send(self, topic: str, rows: list[dict[str, Any]], kind: str, *, size: int = BATCH) -> list[bytes]:
        messages = encoded(self.settings, topic, [json.dumps(row).encode() for row in rows], kind, rows=size)
        self.log.append(topic, [(None, message) for message in messages])
        return messages

    def open(self, **more: Any) -> Any:
        schemas = self.settings.schemas(self.refused)
        options = more.pop("options", OPTIONS)
        given = {"options": options, "snapshots": self.snapshots, "schemas": schemas, **more}
        return contextlib.closing(Trainer(self.log, self.bundle, topics=self.topics, **given))

    def letters(self) -> list[Filed]:
        """The dead letters. A broker shows a committed transaction a moment after it has answered the commit."""
        give_up = time.monotonic() + 20
        while not (found := read_dead_letters(self.log, self.topics)) and time.monotonic() < give_up:
            time.sleep(0.05)
        return found

    def drain(self, **more: Any) -> Trainer:
        with self.open(**more) as trainer:
            while not trainer.drained():
                trainer.run_once(wait_s=0.3)
            return trainer


@pytest.fixture
def site(log: EventLog, topics: Topics, bundle: Bundle, registry: StubRegistry, tmp_path: Path) -> Site:
    return Site(log, topics, bundle, registry, tmp_path)


def events(count: int, *, start: int = 0, age: timedelta = timedelta(0)) -> list[dict[str, Any]]:
    begin = datetime.now(UTC) - age
    return [
        {
            "user_id": f"u{number % 7}",
            "item_id": f"i{number % 40}",
            "label": int(number % 5 > 1),
            "time": (begin + timedelta(microseconds=number)).isoformat(),
            "_event_id": f"e{number}",
        }
        for number in range(start, start + count)
    ]


def items(count: int) -> list[dict[str, Any]]:
    return [{"item_id": f"new{n}", "text": f"a red thing of kind{n}", "colour": "red"} for n in range(count)]


def state(trainer: Trainer) -> dict[str, Any]:
    """The state without the times of messages, which differ between sends."""
    found = bits(trainer.step)
    found["memory"] = replace_memory(found["memory"])
    return found


def replace_memory(memory: Any) -> Any:
    return {name: getattr(memory, name) for name in ("users", "items", "item_records", "arrivals")}


def test_the_same_rows_give_the_same_state_in_every_format(
    log: EventLog, bundle: Bundle, registry: StubRegistry, topics: Topics, tmp_path: Path
) -> None:
    found = {}
    rows = [*events(4 * BATCH), *events(3, age=timedelta(hours=2)), *events(2 * BATCH, start=4 * BATCH)]
    for kind in FORMATS:
        own = Site(log, Topics(f"{topics.prefix}{kind}-"), bundle, registry, tmp_path)
        own.send(own.topics.items, items(5), kind)
        own.drain()
        own.send(own.topics.events, rows, kind)
        trainer = own.drain()
        found[kind] = (state(trainer), trainer.totals)
        assert trainer.totals.messages == len(rows)
        assert (trainer.totals.events, trainer.totals.causes) == (6 * BATCH, {"late": 3})
    for kind in FORMATS:
        assert found[kind] == found["json"], kind


class _Killed(Exception):
    pass


@pytest.mark.parametrize("with_snapshot", [True, False])
def test_a_crash_in_a_batch_loses_and_doubles_nothing(site: Site, with_snapshot: bool) -> None:
    rows = events(5 * BATCH)
    site.send(site.topics.events, rows, "arrow")
    expected = state(site.drain())
    again = Site(site.log, Topics(site.topics.prefix + "again-"), site.bundle, site.registry, site.directory)
    again.snapshots = Snapshots(site.directory / "snapshots") if with_snapshot else None
    again.send(again.topics.events, rows, "arrow")
    visits = 0

    def fail(place: str) -> None:
        nonlocal visits
        visits += 1
        if visits in (1, 2, 5, 8):
            raise _Killed

    crashes = 0
    while True:
        try:
            trainer = again.drain(failpoint=fail)
            break
        except _Killed:
            crashes += 1
    assert crashes == 4
    assert state(trainer) == expected
    assert state(again.drain()) == expected


_CHILD = """
import os, sys
sys.path[:0] = {path!r}
from pathlib import Path
from models.bundle.bundle import load_bundle
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from streaming.trainer import Trainer, TrainerOptions
trainer = Trainer(
    LocalLog(Path({log!r})), load_bundle(Path({bundle!r})), topics=Topics(),
    options=TrainerOptions(batch=16, wait_s=0.2, most_bad=1.0),
    failpoint=lambda place: os.kill(os.getpid(), 9) if trainer.totals.batches == 2 else None,
)
while True:
    trainer.run_once()
"""


def test_a_kill_in_the_middle_of_a_batch_leaves_whole_batches(
    bundle: Bundle, registry: StubRegistry, tmp_path: Path
) -> None:
    states = []
    rows = events(5 * BATCH)
    for name in ("calm.db", "killed.db"):
        with contextlib.closing(LocalLog(tmp_path / name)) as log:
            site = Site(log, Topics(), bundle, registry, tmp_path)
            site.send("events", rows, "arrow")
            if name == "killed.db":
                code = _CHILD.format(path=sys.path, log=str(tmp_path / name), bundle=str(bundle.directory))
                done = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), timeout=300, check=False)
                assert done.returncode == -signal.SIGKILL
            trainer = site.drain()
            states.append(state(trainer))
            if name == "killed.db":
                # Two batches were committed before the kill.
                assert trainer.totals.events == 3 * BATCH
    assert states[0] == states[1]


def test_a_batch_counts_rows_and_larger_batches_come_alone(site: Site) -> None:
    rows = events(4 * BATCH)
    site.send(site.topics.events, rows[:BATCH], "json")
    site.send(site.topics.events, rows[BATCH:], "arrow", size=BATCH // 2)
    sizes = []
    site.drain(watch=lambda messages, outcome: sizes.append((len(messages), outcome.rows)))
    assert sum(count for _, count in sizes) == 4 * BATCH
    assert max(count for _, count in sizes) <= BATCH
    assert (2, BATCH) in sizes
    more = events(3 * BATCH, start=4 * BATCH)
    site.send(site.topics.events, more, "arrow", size=3 * BATCH)
    sizes.clear()
    site.drain(watch=lambda messages, outcome: sizes.append((len(messages), outcome.rows)))
    assert sizes == [(1, 3 * BATCH)]


# Dead letters.


@pytest.mark.parametrize("kind", ["avro", "protobuf"])
def test_an_unknown_schema_is_a_dead_letter_that_is_put_back_once(site: Site, kind: str) -> None:
    rows = events(3)
    site.send(site.topics.events, rows[:1], kind)
    hidden = site.registry.schemas.pop(1)
    site.send(site.topics.events, rows[1:], "json")
    trainer = site.drain()
    assert trainer.totals.causes == {"unknown-schema": 1}
    before = state(trainer)
    (letter,) = site.letters()
    assert "schema 1 is unknown to the registry" in letter.letter.reason
    # Now the registry knows the schema: a restart must not apply the message behind its letter's back.
    site.registry.schemas[1] = hidden
    assert state(site.drain()) == before
    assert put_back(site.log, site.topics, waiting(site.log, site.topics, "unknown-schema"), {}) == [letter.number]
    assert put_back(site.log, site.topics, {letter.number}, {}) == []
    trainer = site.drain()
    assert (trainer.totals.events, trainer.totals.bad) == (1, 0)
    after = state(trainer)
    assert state(site.drain()) == after
    assert site.drain().totals.messages == 0


def test_late_rows_of_a_batch_are_one_letter_and_the_others_count(site: Site) -> None:
    rows = events(6)
    old = datetime.now(UTC) - timedelta(hours=3)
    for place in (2, 4):
        rows[place]["time"] = old.isoformat()
    site.send(site.topics.events, rows, "arrow")
    trainer = site.drain()
    assert (trainer.totals.events, trainer.totals.causes, trainer.totals.messages) == (4, {"late": 2}, 6)
    (filed,) = site.letters()
    assert causes([filed]) == {"late": 1}
    assert filed.letter.reason.startswith("2 rows of a batch, such as row 3: the event is older")
    put_back(site.log, site.topics, {filed.number}, {})
    trainer = site.drain()
    # The letter holds the late rows alone.
    assert (trainer.totals.messages, trainer.totals.events, trainer.totals.bad) == (2, 2, 0)


def test_faulty_rows_of_items_are_letters_of_their_own(site: Site) -> None:
    rows = items(4)
    rows[1]["item_id"] = ""
    site.send(site.topics.items, rows, "arrow")
    trainer = site.drain()
    assert (trainer.totals.items, trainer.totals.causes) == (3, {"invalid": 1})
    (filed,) = site.letters()
    put_back(site.log, site.topics, set(), {filed.number: json.dumps(rows[1] | {"item_id": "fixed"}).encode()})
    assert site.drain().totals.items == 1


@pytest.mark.parametrize("kind", FORMATS)
def test_garbled_messages_are_accounted_for_and_the_good_ones_count(
    bundle: Bundle, registry: StubRegistry, tmp_path: Path, kind: str
) -> None:
    chance = random.Random(5)
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        site = Site(log, Topics(), bundle, registry, tmp_path)
        good = site.send("events", events(BATCH), kind, size=2)
        garbled = []
        for message in good * 8:
            data = bytearray(message)
            for _ in range(2):
                data[chance.randrange(5, len(data))] = chance.randrange(256)
            garbled.append(bytes(data[: chance.randrange(len(data))] if chance.random() < 0.3 else data))
        log.append("events", [(None, message) for message in garbled])
        trainer = site.drain()
        assert trainer.totals.events >= BATCH
        assert trainer.totals.bad >= len(read_dead_letters(log, site.topics)) > 0
        before = state(trainer)
        assert state(site.drain()) == before


# Schemas that change, and outages.


@pytest.mark.parametrize("kind", ["avro", "protobuf"])
def test_a_schema_without_a_declared_field_stops_by_name_and_can_be_refused(site: Site, kind: str) -> None:
    site.send(site.topics.events, events(4), kind)
    short = [{key: value for key, value in row.items() if key != "label"} for row in events(2, start=4)]
    site.send(site.topics.events, short, kind)
    site.send(site.topics.events, events(3, start=6), kind)
    with pytest.raises(StreamError, match=r"schema 2 has no field 'label', which \[events\]"):
        site.drain(options=replace(OPTIONS, batch=1))
    site.refused = [2]
    trainer = site.drain(options=replace(OPTIONS, batch=1))
    assert trainer.totals.causes == {"refused-schema": 2}
    before = state(trainer)
    site.refused = []
    assert state(site.drain()) == before


def test_an_added_field_goes_on(site: Site) -> None:
    site.send(site.topics.events, events(4), "avro")
    site.send(site.topics.events, [{"extra": 1, **row} for row in events(4, start=4)], "avro")
    trainer = site.drain()
    assert (trainer.totals.events, trainer.totals.bad, len(site.registry.schemas)) == (8, 0, 2)


def test_an_outage_of_the_registry_commits_nothing_and_ends(site: Site) -> None:
    site.send(site.topics.events, events(4), "avro")
    site.registry.broken = True
    with pytest.raises(RegistryError, match="answers 503"):
        site.drain()
    assert read_dead_letters(site.log, site.topics) == []
    site.registry.broken = False
    assert site.drain().totals.events == 4


def test_a_registry_that_lost_a_schema_is_named_at_the_start(site: Site) -> None:
    site.send(site.topics.events, events(4), "avro")
    site.drain()
    site.registry.schemas.clear()
    with pytest.raises(LogError, match=r"offset \d was applied before.*schema 1 is unknown.*give the registry"):
        site.drain()


# Forgetting.


@pytest.mark.parametrize("kind", FORMATS)
def test_a_rewrite_removes_a_user_from_every_format(
    bundle: Bundle, registry: StubRegistry, tmp_path: Path, kind: str
) -> None:
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        site = Site(log, Topics(), bundle, registry, tmp_path)
        site.snapshots = Snapshots(tmp_path / "snapshots")
        rows = events(12)
        for row in rows[::4]:
            row["user_id"] = "secret-user"
        rows[4]["time"] = (datetime.now(UTC) - timedelta(hours=2)).isoformat()
        site.send("events", rows, kind, size=6)
        with site.open() as trainer:
            while not trainer.drained():
                trainer.run_once()
            put_back(log, site.topics, waiting(log, site.topics, "late"), {})
            forget(log, site.topics, ["secret-user"], by="test")
            while not trainer.drained():
                trainer.run_once()
            trainer.write_snapshot()
        assert trainer.totals.events == 11
        newest = site.snapshots.newest(bundle)
        assert newest is not None
        done = rewrite(log, bundle, site.topics, newest, stored=newest.deltas, schemas=site.settings.schemas())
        assert done.counts["events"] >= 2
        assert done.counts["deadletters"] == 1
        decode = event_decoder(bundle.dataset.events, site.settings.schemas())
        users: list[str] = []
        for message in log.read("events", 0, 0, log.end_offsets("events")[0]):
            assert b"secret-user" not in message.value
            assert base64.b64encode(b"secret-user") not in message.value
            if message.value == BLANK or b"_forget" in message.value:
                continue
            found = decode.read(message.value)
            users += found.frame["user_id"].to_list() if isinstance(found, DecodedBatch) else [found.row[0]]
        assert users == [row["user_id"] for row in rows if row["user_id"] != "secret-user"]
        # The log is read from the snapshot on, and once more from the start by another bundle's trainer.
        assert site.drain().totals.messages == 0


def test_a_batch_as_large_as_a_message_may_be_is_applied(site: Site) -> None:
    rows = events(2_000)
    data = encode_batch(rows)
    site.log.append(site.topics.events, [(None, data)])
    assert site.drain().totals.events == 2_000
