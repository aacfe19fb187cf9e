"""Lists the places that still hold ids of forgotten users: topics, snapshots, bundles, backfills and ledgers.

A file that cannot be read is listed too, since nobody knows what it holds.
"""

import contextlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import polars as pl

from features.errors import DatasetError
from features.value.forgotten import ForgottenUsers, read_forgotten
from features.wire.schemas import Schemas
from models.bundle.bundle import Bundle
from models.bundle.contents import FORGOTTEN
from serving.rollout.ledger_users import named_users
from serving.skew.record import answered
from streaming.forget.remaining import Remaining, remaining_messages
from streaming.forget.rewrite import Owner
from streaming.log.protocol import EventLog
from streaming.log.topics import Topics
from streaming.snapshot import Snapshots

USERS, HISTORY, LABELLED, CONSUMED = "users", "history", "labelled", "consumed"
_RUN: Final = "a run without the users, then delete the bundle"
_UNKNOWN: Final = "unknown, since the files cannot be read"
_BACKFILL: Final = "delete the directory when the backfill is done"


def owners(topics: Topics) -> Mapping[str, Owner]:
    """Returns the reader of the user of a message, of each topic that only serving reads."""
    return {topics.skew: answered}


def leftovers(
    log: EventLog,
    bundle: Bundle,
    topics: Topics,
    home: Path,
    snapshots: Snapshots,
    *,
    schemas: Schemas | None = None,
) -> list[Remaining]:
    """Returns the places that hold ids of forgotten users. The store is no such place after the stream's next batch.

    Args:
        log: Log of the topics.
        bundle: Bundle that streams.
        topics: Names of the topics.
        home: Directory of bundles, backfills and ledgers of this machine. Bundles elsewhere are not read.
        snapshots: Snapshots of this machine.
        schemas: Schemas of messages in Avro and Protobuf.

    Raises:
        LogError: The log does not answer.
    """
    users, found = remaining_messages(log, bundle, topics, owners=owners(topics), schemas=schemas)
    if len(users):
        found += [*_snapshots(snapshots, users), *_bundles(home, users), *_backfills(home, users)]
        found += _ledgers(home / "judge", users)
    return found


def _snapshots(snapshots: Snapshots, users: ForgottenUsers) -> Iterator[Remaining]:
    for directory, memory in snapshots.memories():
        if memory is None:
            yield Remaining("snapshot", str(directory), 0, f"{_UNKNOWN}; delete the directory")
            continue
        applied = {(one.request.user, one.request.salt): one.request.at_us for one in memory.forgotten}
        open_requests = ForgottenUsers(
            request for request in users if applied.get((request.user, request.salt), -1) < request.at_us
        )
        if count := len(open_requests.named(memory.users)):
            yield Remaining("snapshot", str(directory), count, "tessera stream --once, then tessera topics rewrite")


def _bundles(home: Path, users: ForgottenUsers) -> Iterator[Remaining]:
    """Yields the bundles that name users whom their training did not leave out. Damaged bundles are read too."""
    for users_path in sorted(home.rglob(f"{USERS}.parquet")):
        directory = users_path.parent
        files = [directory / f"{name}.parquet" for name in (USERS, HISTORY, LABELLED, CONSUMED)]
        yield from _named("bundle", directory, files, "user_id", _not_left_out(directory / FORGOTTEN, users), _RUN)


def _not_left_out(path: Path, users: ForgottenUsers) -> ForgottenUsers:
    """Returns the requests that a bundle's list lacks. A bundle of an earlier release has no list."""
    try:
        listed = {(one.user, one.salt): one.at_us for one in read_forgotten(path)} if path.exists() else {}
    except DatasetError:
        listed = {}
    # The ids of the others in the bundle are of new lives.
    return ForgottenUsers(one for one in users if listed.get((one.user, one.salt), one.at_us - 1) < one.at_us)


def _backfills(home: Path, users: ForgottenUsers) -> Iterator[Remaining]:
    for directory in sorted(path for path in (home / "backfill").glob("*") if path.is_dir()):
        rows, shards = (sorted((directory / part).glob("*.parquet")) for part in ("rows", "messages"))
        yield from _named("backfill", directory, shards, "key", users, _BACKFILL)
        if len(shards) < len(rows):
            yield Remaining("backfill", str(directory / "rows"), 0, f"{_UNKNOWN}; {_BACKFILL}")


def _named(
    kind: str, place: Path, files: Sequence[Path], column: str, users: ForgottenUsers, until: str
) -> Iterator[Remaining]:
    """Yields a place whose files name users in a column, and each file that cannot be read."""
    names: set[str] = set()
    for path in files if len(users) else ():
        try:
            if path.exists() and column in pl.read_parquet_schema(path):
                held = pl.scan_parquet(path).select(pl.col(column).cast(pl.String).unique()).collect()
                names.update(users.named(held[column].drop_nulls()))
        except (OSError, pl.exceptions.PolarsError):
            yield Remaining(kind, str(path), 0, f"{_UNKNOWN}; {until}")
    if names:
        yield Remaining(kind, str(place), len(names), until)


def _ledgers(directory: Path, users: ForgottenUsers) -> Iterator[Remaining]:
    for path in sorted(directory.glob("*.sqlite")):
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as file:
            try:
                if count := len(named_users(file, users)):
                    yield Remaining("ledger", str(path), count, "the judge's next look, or tessera topics rewrite")
            except sqlite3.DatabaseError:
                yield Remaining("ledger", str(path), 0, f"{_UNKNOWN}; delete it, and the judge makes it again")
