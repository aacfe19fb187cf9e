"""Replaces the ids of forgotten users in a ledger by salted hashes.

A user is only a name of a row of sums, so no figure of an experiment changes.
"""

import contextlib
import sqlite3
from pathlib import Path

from features.errors import TesseraError
from features.lock import locked
from features.value.forgotten import Forgotten, ForgottenUsers
from serving.rollout.tally import COLUMNS

_SCHEMA = "CREATE TABLE IF NOT EXISTS forgotten(user TEXT, salt TEXT, at_us INTEGER, PRIMARY KEY(user, salt))"


def hide_users(file: sqlite3.Connection, users: ForgottenUsers) -> int:
    """Replaces the ids of forgotten users in an open ledger. Returns the number of replaced ids.

    Each request is applied once, since a later row of an id is of a new life.

    Args:
        file: The ledger. The caller commits.
        users: All forgotten users.
    """
    file.execute(_SCHEMA)
    named = named_users(file, users)
    file.executemany(
        "INSERT OR REPLACE INTO forgotten VALUES (?, ?, ?)",
        [(request.user, request.salt, request.at_us) for request in _new(file, users)],
    )
    if named:
        file.execute("PRAGMA secure_delete = ON")
        file.execute("CREATE TEMP TABLE renamed(user TEXT PRIMARY KEY, name TEXT, until_ms INTEGER)")
        file.executemany("INSERT INTO renamed VALUES (?, ?, ?)", named)
        file.execute(
            "UPDATE shown SET user = (SELECT name FROM renamed WHERE renamed.user = shown.user) WHERE EXISTS "
            "(SELECT 1 FROM renamed WHERE renamed.user = shown.user AND shown.time_ms <= renamed.until_ms)"
        )
        numbers = ", ".join(COLUMNS)
        _merge(
            file, "sums", f"arm, {{user}}, {numbers}, slow_ms", ", ".join(f"{c} = {c} + excluded.{c}" for c in COLUMNS)
        )
        _merge(file, "slice", "arm, minute, {user}, ms", "ms = MAX(ms, excluded.ms)")
        file.execute("DROP TABLE renamed")
    return len(named)


def named_users(file: sqlite3.Connection, users: ForgottenUsers) -> list[tuple[str, str, int]]:
    """Returns id, salted hash and time, milliseconds since 1970, of the users that a ledger still names by id."""
    new = ForgottenUsers(_new(file, users))
    if not len(new):
        return []
    held = file.execute("SELECT user FROM sums UNION SELECT user FROM slice UNION SELECT user FROM shown")
    found = []
    for (user,) in held.fetchall():
        until = new.until(user)
        if until is not None:
            found.append((user, new.alias(user, until), until // 1_000))
    return found


def hide_in_ledgers(directory: Path, users: ForgottenUsers) -> tuple[int, list[Path]]:
    """Replaces the ids of forgotten users in the ledgers of a directory.

    Returns:
        Number of replaced ids, and the ledgers that a running judge holds. The judge replaces the ids at its next look.
    """
    count, busy = 0, []
    for path in sorted(directory.glob("*.sqlite")):
        try:
            with locked(path, wait_s=0), contextlib.closing(sqlite3.connect(path)) as file:
                count += hide_users(file, users)
                file.commit()
                file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except TesseraError:
            busy.append(path)
    return count, busy


def _new(file: sqlite3.Connection, users: ForgottenUsers) -> list[Forgotten]:
    """Returns the requests that a ledger has not applied."""
    done: dict[tuple[str, str], int] = {}
    with contextlib.suppress(sqlite3.OperationalError):
        done = {(user, salt): at_us for user, salt, at_us in file.execute("SELECT user, salt, at_us FROM forgotten")}
    return [request for request in users if request.at_us > done.get((request.user, request.salt), request.at_us - 1)]


def _merge(file: sqlite3.Connection, table: str, columns: str, added: str) -> None:
    """Moves the rows of renamed users to their new names, and adds rows of one name."""
    names, moved = columns.format(user="user"), columns.format(user="renamed.name")
    file.execute(
        f"INSERT INTO {table}({names}) SELECT {moved} FROM {table} JOIN renamed USING (user) WHERE true "
        f"ON CONFLICT DO UPDATE SET {added}"
    )
    file.execute(f"DELETE FROM {table} WHERE user IN (SELECT user FROM renamed)")
