"""Removes records of forgotten users from a store."""

from collections.abc import Mapping, Sequence

from features.shown.consumed import FULL, HEAD
from features.value.forgotten import hashed
from models.bundle import aggregate_record, record
from models.bundle.delta import Record
from serving.store.protocol import OnlineStore

Seqs = Mapping[tuple[str, str], int]
"""Sequence numbers of removals, by hash and salt of the user's id."""


def forget_users(store: OnlineStore, bundle: str, changes: Sequence[tuple[int, Record]]) -> None:
    """Applies records of forgotten users, each with its sequence number, and keeps them without ids.

    Args:
        store: Store of the records.
        bundle: Id of the bundle.
        changes: Sequence numbers and records of the kind `record.FORGOTTEN`.

    Raises:
        StoreError: The store does not answer. The same call again completes the removal.
    """
    if not changes:
        return
    named: dict[str, int] = {}
    consumed: dict[str, dict[str, int]] = {HEAD: {}, FULL: {}}
    aggregates: dict[str, int] = {}
    unnamed: dict[tuple[str, str], int] = {}
    anonymous = []
    for seq, changed in changes:
        forgotten = record.decode_forgotten_record(changed.payload)
        aggregates |= {name: max(seq, aggregates.get(name, seq)) for name in forgotten.aggregates}
        anonymous.append(forgotten.anonymous())
        if forgotten.user:
            named[forgotten.user] = max(seq, named.get(forgotten.user, seq))
            for kind, names in forgotten.consumed(forgotten.user).items():
                consumed[kind] |= {name: max(seq, consumed[kind].get(name, seq)) for name in names}
        else:
            unnamed[changed.id, forgotten.salt] = seq
    store.forget_records(bundle, record.HISTORY, list(named), list(named.values()))
    store.forget_records(bundle, aggregate_record.AGGREGATE, list(aggregates), list(aggregates.values()))
    for kind, own in consumed.items():
        store.forget_records(bundle, kind, list(own), list(own.values()))
    forget_histories(store, bundle, unnamed)
    ids, seqs = [changed.id for _, changed in changes], [seq for seq, _ in changes]
    store.write_records(bundle, record.FORGOTTEN, ids, seqs, anonymous)


def forget_histories(store: OnlineStore, bundle: str, seqs: Seqs) -> None:
    """Removes histories and consumed items of users that only a salted hash names. Every id in the store is hashed.

    Args:
        store: Store of the histories.
        bundle: Id of the bundle.
        seqs: Sequence numbers of the removals.
    """
    if not seqs:
        return
    salts = {salt for _, salt in seqs}
    for kind in (record.HISTORY, HEAD, FULL):
        for chunk in store.scan_records(bundle, kind):
            users = [(name, record.consumed_user(kind, name) or name) for name, _ in chunk]
            found = [
                (name, seqs[key])
                for name, user in users
                for salt in salts
                if (key := (hashed(user, salt), salt)) in seqs
            ]
            store.forget_records(bundle, kind, [name for name, _ in found], [seq for _, seq in found])
