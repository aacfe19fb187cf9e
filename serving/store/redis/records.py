"""Records of the online store on Redis: a hash for each kind, and a stream of the last writes of kinds with followers.

The keys are listed in `serving.store.redis.store`. A kind has a hash and a stream in each share.
"""

import itertools
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from models.bundle import record
from serving.store.check import check_followed, check_name, encode_ids, newest_records
from serving.store.page import SEQ_BYTES
from serving.store.protocol import FOLLOWED, Changes
from serving.store.redis.commands import RedisCommands
from serving.store.redis.layouts import Layouts
from serving.store.redis.scripts import Call, Script
from serving.store.redis.spread import STATED, Spread

_RECORDS = 500
_TRIP_RECORDS = 8_000  # about, of one round trip that writes
_READ_RECORDS = 1_000
_SCANNED = 100  # of a share, if there are many
_ENTRIES = 100  # most writes, of at most 500 records each, that a follower reads of a share in one call
_WRITE, _CHANGES, _FORGET = Script("write_records"), Script("changes"), Script("forget_records")
_SALT_BYTES = 16
_BETWEEN = ","  # the cursors of shares


class RedisRecords:
    """Records of all bundles on the servers of one address.

    Args:
        commands: Client of the servers.
        layouts: Shares of the bundles.
    """

    def __init__(self, commands: RedisCommands, layouts: Layouts) -> None:
        self._redis = commands
        self._layouts = layouts

    def write(
        self, bundle: str, kind: str, ids: Sequence[str], seqs: Sequence[int], payloads: Sequence[bytes], again: bool
    ) -> int:
        """See `OnlineStore.write_records`."""
        _check(bundle, kind)
        values = [
            (name, (seq + 1).to_bytes(SEQ_BYTES, "big") + payload)
            for name, seq, payload in newest_records(ids, seqs, payloads)
        ]
        if not values:
            return 0
        followed = ["changes"] if kind in FOLLOWED else []
        return self._changed(self._layouts.state(bundle), kind, _WRITE, values, followed, [int(again), _new_mark])

    def forget(self, bundle: str, kind: str, ids: Sequence[str], seqs: Sequence[int]) -> int:
        """See `OnlineStore.forget_records`."""
        _check(bundle, kind)
        values = [
            (name, (seq + 1).to_bytes(SEQ_BYTES, "big")) for name, seq, _ in newest_records(ids, seqs, [b""] * len(ids))
        ]
        if not values:
            return 0
        return self._changed(self._layouts.state(bundle), kind, _FORGET, values, [], [_new_salt])

    def _changed(
        self,
        spread: Spread,
        kind: str,
        script: Script,
        values: Sequence[tuple[bytes, bytes]],
        more: Sequence[str],
        arguments: Sequence[Any],
    ) -> int:
        """Returns the number of records that a script has changed.

        Args:
            spread: Shares of the bundle.
            kind: Kind of the records.
            script: The script.
            values: Id and value of each record.
            more: Names of more keys of a kind that the script gets.
            arguments: Arguments between the kind and the values. A function is called for each call of the script.
        """
        stated = kind in STATED
        size = max(1, _TRIP_RECORDS // spread.shares) if stated else _TRIP_RECORDS
        changed = 0
        for part in _chunks(values, size):
            calls: list[Call] = []
            for share, own in _by_share(spread, kind, part):
                names = (f"record:{kind}", "kinds", "table", f"removed:{kind}", *(f"{name}:{kind}" for name in more))
                keys = [spread.key(share, name) for name in names]
                for few in _chunks(own, _RECORDS):
                    given = [argument() if callable(argument) else argument for argument in arguments]
                    calls.append((keys, [kind.encode(), *given, *itertools.chain(*few)]))
            counts = self._redis.run(script, calls)
            changed += max(counts) if stated else sum(counts)
        return changed

    def read(self, bundle: str, kind: str, ids: Sequence[str]) -> list[bytes | None]:
        """See `OnlineStore.read_records`."""
        return self.read_kinds(bundle, {kind: ids})[kind]

    def read_kinds(self, bundle: str, wanted: Mapping[str, Sequence[str]]) -> dict[str, list[bytes | None]]:
        """See `OnlineStore.read_kinds`. A command reads 1,000 records, since Redis runs nothing else meanwhile."""
        names = {kind: encode_ids(ids) for kind, ids in wanted.items()}
        for kind in wanted:
            _check(bundle, kind)
        found: dict[str, list[bytes | None]] = {kind: [None] * len(ids) for kind, ids in names.items()}
        if not any(names.values()) or (spread := self._layouts.find(bundle)) is None:
            return found
        places: list[tuple[str, list[int]]] = []
        commands = []
        for kind, ids in names.items():
            for share, own in _by_share(spread, kind, list(enumerate(ids)), at=1):
                key = spread.key(share, f"record:{kind}")
                for few in _chunks(own, _READ_RECORDS):
                    places.append((kind, [position for position, _ in few]))
                    commands.append((key, ("HMGET", key, *(name for _, name in few))))
        copies: dict[tuple[str, int], list[bytes | None]] = {}
        for (kind, positions), values in zip(places, self._redis.all(commands), strict=True):
            for position, value in zip(positions, values, strict=True):
                if kind in STATED:
                    copies.setdefault((kind, position), []).append(value)
                elif value is not None:
                    found[kind][position] = value[SEQ_BYTES:]
        for (kind, position), values in copies.items():
            found[kind][position] = _oldest(values)
        return found

    def scan(self, bundle: str, kind: str) -> Iterator[list[tuple[str, bytes]]]:
        """See `OnlineStore.scan_records`. A command reads about 500 records of the only share, or 100 of each share."""
        _check(bundle, kind)
        if (spread := self._layouts.find(bundle)) is None:
            return
        cursors = {spread.key(share, f"record:{kind}"): 0 for share in spread.shares_with(kind)}
        count = _RECORDS if len(cursors) == 1 else _SCANNED
        while cursors:
            commands = [(key, ("HSCAN", key, cursor, "COUNT", count)) for key, cursor in cursors.items()]
            replies = dict(zip(cursors, self._redis.all(commands), strict=True))
            for _, values in replies.values():
                parts = iter(values)
                yield [(name.decode(), value[SEQ_BYTES:]) for name, value in zip(parts, parts, strict=True)]
            cursors = {key: int(cursor) for key, (cursor, _) in replies.items() if int(cursor)}

    def changes(self, bundle: str, kind: str, cursor: str) -> Changes:
        """See `OnlineStore.changes`."""
        check_followed(kind)
        check_name("bundle", bundle)
        if (spread := self._layouts.find(bundle)) is None:
            return Changes([], "", True)
        shares = spread.shares_with(kind)
        known = cursor.split(_BETWEEN)
        calls: list[Call] = []
        for share, one in zip(shares, known if len(known) == len(shares) else [""] * len(shares), strict=True):
            entry, _, mark = one.partition(" ")
            names = (f"changes:{kind}", "table", f"order:{kind}", f"order:{record.CHANGED}")
            arguments: list[bytes | int] = [entry.encode(), mark.encode(), _new_mark(), _ENTRIES]
            calls.append(([spread.key(share, name) for name in names], arguments))
        replies = self._redis.run(_CHANGES, calls)
        cursors = [f"{last.decode()} {mark.decode()}".strip() for _, last, mark, *_ in replies]
        lost = any(lost for lost, *_ in replies)
        ids = [] if lost else [name.decode() for _, _, _, *names in replies for name in names]
        return Changes(ids, _BETWEEN.join(cursors), lost)

    def remove(self, bundle: str, kind: str, ids: Sequence[str]) -> None:
        """See `OnlineStore.remove_records`."""
        _check(bundle, kind)
        names = encode_ids(ids)
        if not names or (spread := self._layouts.find(bundle)) is None:
            return
        commands = []
        for share, own in _by_share(spread, kind, [(name,) for name in names]):
            key = spread.key(share, f"record:{kind}")
            commands += [(key, ("HDEL", key, *itertools.chain(*few))) for few in _chunks(own, _RECORDS)]
        self._redis.all(commands)


def _by_share(spread: Spread, kind: str, values: Sequence[Any], at: int = 0) -> list[tuple[int, Sequence[Any]]]:
    """Returns the shares that have or get records, and the values of each.

    Args:
        spread: Shares of the bundle.
        kind: Kind of the records.
        values: Tuples, one for each record.
        at: Index of the record's id in a tuple.
    """
    if kind in STATED or spread.shares == 1:
        return [(share, values) for share in range(spread.shares)]
    parts: dict[int, list[Any]] = {}
    for share, value in zip(spread.shares_of(kind, [value[at] for value in values]), values, strict=True):
        parts.setdefault(share, []).append(value)
    return list(parts.items())


def _oldest(copies: Sequence[bytes | None]) -> bytes | None:
    """Returns the payload of the copy with the lowest number, None if a share has no copy."""
    present = [copy for copy in copies if copy is not None]
    return min(present)[SEQ_BYTES:] if len(present) == len(copies) else None


def _chunks(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (values[start : start + size] for start in range(0, len(values), size))


def _check(bundle: str, kind: str) -> None:
    check_name("bundle", bundle)
    check_name("kind", kind)


def _new_mark() -> bytes:
    """Returns bytes that no other write has, since a lost and recreated stream may repeat the number of an entry."""
    return secrets.token_hex(8).encode()


def _new_salt() -> bytes:
    return secrets.token_hex(_SALT_BYTES).encode()
