"""The list of places that still hold ids of forgotten users: each place alone is found, and nothing else is named."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import polars as pl
import pytest

from features.value.forgotten import Forgotten, ForgottenUsers, hashed
from models.bundle.bundle import Bundle, write_bundle
from models.bundle.contents import FORGOTTEN
from serving.leftover import leftovers
from serving.rollout.experiment import CONTROL
from serving.rollout.ledger import Ledger
from streaming.dead_letter import encode_dead_letter
from streaming.forget.message import encode_line, encode_tombstone
from streaming.forget.remaining import Remaining
from streaming.log.protocol import Message
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from streaming.snapshot import ForgottenUser, Memory, Snapshots
from tests.build import coloured_parts
from tests.unit.serving.test_ledger import fold, shown

TOPICS, SALT, AT_US = Topics(), "ab" * 16, 2_000_000_000_000_000
GONE, STAYS = "secret-user", "staying-user"


def asked(user: str = GONE, at_us: int = AT_US) -> Forgotten:
    return Forgotten(hashed(user, SALT), SALT, at_us)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory = tmp_path_factory.mktemp("leftover")
    return write_bundle(coloured_parts(directory, events=200), directory / "bundle")


@dataclass
class Place:
    """A home with a log, a bundle without the user, and the request to forget the user."""

    home: Path
    log: LocalLog
    bundle: Bundle

    def left(self) -> list[tuple[str, str, int]]:
        """Kind, name below the home, and number of the places that are listed."""
        found = self.listed()
        assert all(one.until for one in found)
        return [(one.kind, one.name.removeprefix(f"{self.home}/"), one.count) for one in found]

    def listed(self) -> list[Remaining]:
        return leftovers(self.log, self.bundle, TOPICS, self.home, Snapshots(self.home / "snapshots"))

    def forget(self, request: Forgotten) -> None:
        self.log.append(TOPICS.events, [(None, encode_tombstone(request))])
        self.log.append(TOPICS.forgotten, [(None, encode_line("requested", request, by="test"))])

    def bundle_with(self, **frames: list[str]) -> Path:
        """Writes a copy of the bundle whose parquet files hold users."""
        copied = self.home / "mlflow" / "artifacts" / "bundle"
        shutil.copytree(self.bundle.directory, copied)
        for name, users in frames.items():
            pl.DataFrame({"user_id": users}).write_parquet(copied / f"{name}.parquet")
        return copied

    def snapshot_with(self, memory: Memory) -> Path:
        directory = self.home / "snapshots" / "b-1" / f"{7:015d}"
        directory.mkdir(parents=True)
        (directory / "memory.msgpack").write_bytes(msgspec.msgpack.encode(memory))
        return directory


@pytest.fixture
def place(tmp_path: Path, bundle: Bundle) -> Iterator[Place]:
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        log.create_topics(TOPICS.partitions())
        found = Place(tmp_path, log, bundle)
        shutil.copytree(bundle.directory, tmp_path / "bundles" / bundle.id)
        found.forget(asked())
        yield found


def event(user: str) -> bytes:
    return json.dumps({"user_id": user, "item_id": "i1", "label": 1, "time": "2020-01-01T00:00:00Z"}).encode()


def in_events(place: Place) -> None:
    place.log.append(TOPICS.events, [(None, event(GONE)), (None, event(STAYS))])


def in_letters(place: Place) -> None:
    letter = Message(TOPICS.events, 0, 9, GONE.encode(), event(GONE), 0)
    place.log.append(TOPICS.dead_letters, [(None, encode_dead_letter(letter, "late", "why"))])


def in_users(place: Place) -> None:
    place.bundle_with(users=[GONE, STAYS])


def in_history(place: Place) -> None:
    place.bundle_with(history=[GONE, GONE, STAYS])


def in_labelled(place: Place) -> None:
    place.bundle_with(labelled=[GONE])


def in_a_damaged_bundle(place: Place) -> None:
    (place.bundle_with(users=[GONE]) / "manifest.json").unlink()


def in_a_bundle_with_another_list(place: Place) -> None:
    lines = [asked("other"), asked(at_us=AT_US - 1)]
    (place.bundle_with(users=[GONE]) / FORGOTTEN).write_bytes(b"\n".join(map(msgspec.json.encode, lines)))


def in_a_snapshot(place: Place) -> None:
    place.snapshot_with(Memory([GONE, STAYS], [], {}, {}, 0, {}))


def in_a_snapshot_before_the_newest_request(place: Place) -> None:
    older = [ForgottenUser(asked(at_us=AT_US - 1), 3)]
    place.snapshot_with(Memory([GONE], [], {}, {}, 0, {}, forgotten=older))


def in_a_ledger(place: Place) -> None:
    (place.home / "judge").mkdir()
    with contextlib.closing(Ledger(place.home / "judge" / "a.sqlite")) as ledger:
        fold(ledger, [shown(1, GONE, CONTROL), shown(2, STAYS, CONTROL)]).keep({("impressions", 0): 2})


def in_a_backfill(place: Place) -> None:
    for part in ("rows", "messages"):
        (place.home / "backfill" / "shop-1" / part).mkdir(parents=True)
        shard = place.home / "backfill" / "shop-1" / part / "00000.parquet"
        pl.DataFrame({"event_id": ["a", "b"], "key": [GONE, STAYS], "value": ["", ""]}).write_parquet(shard)


SNAPSHOT = f"snapshots/b-1/{7:015d}"
PLACES: dict[str, tuple[Callable[[Place], None], tuple[str, str, int]]] = {
    "events": (in_events, ("topic", TOPICS.events, 1)),
    "dead letters": (in_letters, ("topic", TOPICS.dead_letters, 1)),
    "users of a bundle": (in_users, ("bundle", "mlflow/artifacts/bundle", 1)),
    "history of a bundle": (in_history, ("bundle", "mlflow/artifacts/bundle", 1)),
    "labelled items of a bundle": (in_labelled, ("bundle", "mlflow/artifacts/bundle", 1)),
    "damaged bundle": (in_a_damaged_bundle, ("bundle", "mlflow/artifacts/bundle", 1)),
    "bundle with another list": (in_a_bundle_with_another_list, ("bundle", "mlflow/artifacts/bundle", 1)),
    "snapshot": (in_a_snapshot, ("snapshot", SNAPSHOT, 1)),
    "snapshot before a request": (in_a_snapshot_before_the_newest_request, ("snapshot", SNAPSHOT, 1)),
    "ledger": (in_a_ledger, ("ledger", "judge/a.sqlite", 1)),
    "backfill": (in_a_backfill, ("backfill", "backfill/shop-1", 1)),
}


@pytest.mark.parametrize(("hold", "expected"), PLACES.values(), ids=PLACES)
def test_each_place_is_listed_alone(
    place: Place, hold: Callable[[Place], None], expected: tuple[str, str, int]
) -> None:
    assert place.left() == []
    hold(place)
    assert place.left() == [expected]


def test_nothing_is_listed_without_a_request(tmp_path: Path, bundle: Bundle) -> None:
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        log.create_topics(TOPICS.partitions())
        place = Place(tmp_path, log, bundle)
        for hold, _ in PLACES.values():
            with contextlib.suppress(FileExistsError):
                hold(place)
        assert place.left() == []


def test_new_lives_and_applied_requests_are_not_listed(place: Place) -> None:
    (place.bundle_with(users=[GONE]) / FORGOTTEN).write_bytes(msgspec.json.encode(asked()))
    place.snapshot_with(Memory([GONE], [], {}, {}, 0, {}, forgotten=[ForgottenUser(asked(), 3)]))
    in_a_ledger(place)
    with contextlib.closing(Ledger(place.home / "judge" / "a.sqlite")) as ledger:
        ledger.hide(ForgottenUsers([asked()]))
    assert place.left() == []


def test_places_that_cannot_be_read_are_listed(place: Place) -> None:
    copied = place.bundle_with()
    (copied / "history.parquet").write_bytes(b"PAR1 nothing")
    (place.snapshot_with(Memory([], [], {}, {}, 0, {})) / "memory.msgpack").write_bytes(b"\xc1")
    (place.home / "judge").mkdir()
    (place.home / "judge" / "a.sqlite").write_bytes(b"no ledger" * 1_000)
    rows = place.home / "backfill" / "shop-1" / "rows"
    rows.mkdir(parents=True)
    pl.DataFrame({"user": [GONE]}).write_parquet(rows / "00000.parquet")
    assert sorted(place.left()) == [
        ("backfill", "backfill/shop-1/rows", 0),
        ("bundle", "mlflow/artifacts/bundle/history.parquet", 0),
        ("ledger", "judge/a.sqlite", 0),
        ("snapshot", SNAPSHOT, 0),
    ]
    assert all(one.until.startswith("unknown, since the files cannot be read") for one in place.listed())


def test_a_bundle_keeps_the_requests_that_its_training_left_out(bundle: Bundle, tmp_path: Path) -> None:
    parts = coloured_parts(tmp_path, events=200)
    written = write_bundle(replace(parts, forgotten=[asked()]), tmp_path / "bundle")
    assert (written.directory / FORGOTTEN).read_bytes() == msgspec.json.encode(asked()) + b"\n"
    assert not (bundle.directory / FORGOTTEN).exists()
