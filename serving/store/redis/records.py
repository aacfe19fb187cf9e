"""Records of the online store on Redis: a hash for each kind, and a stream of the last writes of kinds with followers.

The keys are listed in `serving.store.redis.store`.
"""

import itertools
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from models.bundle import record
from serving.store.check import check_followed, check_name, encode_ids, newest_records
from serving.store.page import SEQ_BYTES, Call, key_of
from serving.store.protocol import FOLLOWED, Changes
from serving.store.redis.commands import RedisCommands
from serving.store.redis.scripts import Script

_RECORDS = 500
_READ_RECORDS = 1_000
_ENTRIES = 100  # most writes, of at most 500 records each, that a follower reads in one call
_WRITE, _CHANGES, _FORGET = Script("write_records"), Script("changes"), Script("forget_records")
_SALT_BYTES = 16


class RedisRecords:
    """Records of all bundles on the servers of one address.

    Args:
        commands: Client of the servers.
    """

    def __init__(self, commands: RedisCommands) -> None:
        self._redis = commands

    def write(
        self, bundle: str, kind: str, ids: Sequence[str], seqs: Sequence[int], payloads: Sequence[bytes], again: bool
    ) -> int:
        """See `OnlineStore.write_records`."""
        keys = [_record_key(bundle, kind), key_of(bundle, "kinds"), key_of(bundle, "table")]
        keys.append(key_of(bundle, f"removed:{kind}"))
        if kind in FOLLOWED:
            keys.append(_changes_key(bundle, kind))
        values = [
            (name, (seq + 1).to_bytes(SEQ_BYTES, "big") + payload)
            for name, seq, payload in newest_records(ids, seqs, payloads)
        ]
        chunks = (values[start : start + _RECORDS] for start in range(0, len(values), _RECORDS))
        calls: Iterator[Call] = (
            (keys, [kind.encode(), int(again), _new_mark(), *itertools.chain(*chunk)]) for chunk in chunks
        )
        return sum(self._redis.run(bundle, _WRITE, calls))

    def forget(self, bundle: str, kind: str, ids: Sequence[str], seqs: Sequence[int]) -> int:
        """See `OnlineStore.forget_records`."""
        keys = [_record_key(bundle, kind), key_of(bundle, "kinds"), key_of(bundle, "table")]
        keys.append(key_of(bundle, f"removed:{kind}"))
        values = [
            (name, (seq + 1).to_bytes(SEQ_BYTES, "big")) for name, seq, _ in newest_records(ids, seqs, [b""] * len(ids))
        ]
        chunks = (values[start : start + _RECORDS] for start in range(0, len(values), _RECORDS))
        salt = secrets.token_hex(_SALT_BYTES).encode()
        calls: Iterator[Call] = ((keys, [kind.encode(), salt, *itertools.chain(*chunk)]) for chunk in chunks)
        return sum(self._redis.run(bundle, _FORGET, calls))

    def read(self, bundle: str, kind: str, ids: Sequence[str]) -> list[bytes | None]:
        """See `OnlineStore.read_records`."""
        return self.read_kinds(bundle, {kind: ids})[kind]

    def read_kinds(self, bundle: str, wanted: Mapping[str, Sequence[str]]) -> dict[str, list[bytes | None]]:
        """See `OnlineStore.read_kinds`. A command reads 1,000 records, since Redis runs nothing else meanwhile."""
        commands: list[tuple[Any, ...]] = []
        for kind, ids in wanted.items():
            names, key = encode_ids(ids), _record_key(bundle, kind)
            starts = range(0, len(names), _READ_RECORDS)
            commands += [("HMGET", key, *names[start : start + _READ_RECORDS]) for start in starts]
        values = itertools.chain(*self._redis.each(bundle, commands))
        payloads = (None if value is None else value[SEQ_BYTES:] for value in values)
        return {kind: list(itertools.islice(payloads, len(ids))) for kind, ids in wanted.items()}

    def scan(self, bundle: str, kind: str) -> Iterator[list[tuple[str, bytes]]]:
        """See `OnlineStore.scan_records`. A command reads about 500 records."""
        key, cursor = _record_key(bundle, kind), 0
        while True:
            cursor, values = self._redis.command(bundle, "HSCAN", key, cursor, "COUNT", _RECORDS)
            yield [(name.decode(), value[SEQ_BYTES:]) for name, value in values.items()]
            if not int(cursor):
                return

    def changes(self, bundle: str, kind: str, cursor: str) -> Changes:
        """See `OnlineStore.changes`."""
        check_followed(kind)
        entry, _, mark = cursor.partition(" ")
        keys = [_changes_key(bundle, kind), key_of(bundle, "table")]
        keys += [key_of(bundle, f"order:{kind}"), key_of(bundle, f"order:{record.CHANGED}")]
        ((lost, last, known, *ids),) = self._redis.run(
            bundle, _CHANGES, [(keys, [entry.encode(), mark.encode(), _new_mark(), _ENTRIES])]
        )
        return Changes([name.decode() for name in ids], f"{last.decode()} {known.decode()}".strip(), bool(lost))

    def remove(self, bundle: str, kind: str, ids: Sequence[str]) -> None:
        """See `OnlineStore.remove_records`."""
        key, names = _record_key(bundle, kind), encode_ids(ids)
        starts = range(0, len(names), _RECORDS)
        self._redis.each(bundle, [("HDEL", key, *names[start : start + _RECORDS]) for start in starts])

    def keys(self, bundle: str) -> list[bytes]:
        """Returns the keys of all kinds. A kind with followers has keys before its first record."""
        kinds = {kind.decode() for kind in self._redis.command(bundle, "SMEMBERS", key_of(bundle, "kinds"))}
        return [key for kind in sorted(kinds | FOLLOWED) for key in _keys_of_kind(bundle, kind)]


def _record_key(bundle: str, kind: str) -> bytes:
    check_name("bundle", bundle)
    check_name("kind", kind)
    return key_of(bundle, f"record:{kind}")


def _changes_key(bundle: str, kind: str) -> bytes:
    check_name("bundle", bundle)
    return key_of(bundle, f"changes:{kind}")


def _keys_of_kind(bundle: str, kind: str) -> list[bytes]:
    """Returns all keys that a kind may have, with the key of the list of releases before 0.2."""
    others = [key_of(bundle, f"{name}:{kind}") for name in ("order", "removed")]
    return [_record_key(bundle, kind), _changes_key(bundle, kind), *others]


def _new_mark() -> bytes:
    """Returns bytes that no other write has, since a lost and recreated stream may repeat the number of an entry."""
    return secrets.token_hex(8).encode()
