"""Removes forgotten users from the state of a stream, and leaves their older events out.

A micro-batch applies its tombstones before its events. Events of the batch that lie before a tombstone in its partition
are older, whatever their time.

Removed are the user's number with all its values, history, labelled items, and keys of aggregates by user. These parts
are shared by users, so they keep what they learnt from the user: the rows of the table, aggregates without `user`, the
sightings and admissions of values, items that only events name, and the ids and times of recent events.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from features.history import History
from features.shown.consumed import ConsumedItems
from features.value.forgotten import Forgotten, ForgottenUsers, hashed
from models.bundle import record
from models.bundle.catalogue import Catalogue
from models.bundle.delta import Record
from streaming.log.protocol import Message

SHARED = ("table rows", "aggregates without user", "admitted values", "items named by events", "recent event ids")
"""Parts of the state that keep what they learnt from a forgotten user."""


@dataclass(frozen=True)
class Removed:
    """Removal of one user in one micro-batch.

    Attributes:
        request: The request.
        counts: Number of removed records of users, visits, and aggregates.
    """

    request: Forgotten
    counts: dict[str, int]


@dataclass
class Removals:
    """Forgotten users of a stream.

    Attributes:
        users: All forgotten users.
        seqs: Number of the micro-batch that removed each user, by hash and salt.
        aggregates: Number of the micro-batch that removed each record of aggregates, by id.
        dead: Numbers of removed users in the catalogue.
    """

    users: ForgottenUsers = field(default_factory=ForgottenUsers)
    seqs: dict[tuple[str, str], int] = field(default_factory=dict)
    aggregates: dict[str, int] = field(default_factory=dict)
    dead: set[int] = field(default_factory=set)
    _before: list[tuple[str, Forgotten, int, int]] = field(default_factory=list)

    def apply(
        self,
        tombstones: Sequence[tuple[Message, Forgotten]],
        seq: int,
        *,
        catalogue: Catalogue,
        histories: Sequence[History],
        forget_aggregates: Callable[[NDArray[np.int64]], list[list[str]]],
        consumed: ConsumedItems | None = None,
    ) -> tuple[list[Record], list[Removed]]:
        """Removes the users of a batch's tombstones.

        Args:
            tombstones: Messages with their requests.
            seq: Number of the micro-batch.
            catalogue: Catalogue of the stream.
            histories: Visits of the users, and if the bundle corrects new items their labelled items.
            forget_aggregates: Removes the aggregates of users by number, and returns the ids of each user's removed
                records. It is asked once, since a removal rebuilds maps that are as large as the state.
            consumed: Consumed items of the users, if the stream keeps them.

        Returns:
            A record of each user for the deltas, and the counts of removed parts.
        """
        self._before = []
        records, removed = [], []
        ids = named_users(tombstones, catalogue.user_numbers)
        known = [user for user in dict.fromkeys(ids.values()) if user in catalogue.user_numbers]
        numbers = np.array([catalogue.user_numbers[user] for user in known], dtype=np.int64)
        keys = dict(zip(known, forget_aggregates(numbers), strict=True))
        for message, request in tombstones:
            self.users.add(request)
            self.seqs[request.user, request.salt] = seq
            self._before.append((message.topic, request, message.partition, message.offset))
            user = ids.get((request.user, request.salt), "")
            # Two tombstones of a batch may name one user.
            names = [user] if user in catalogue.user_numbers else []
            index = np.array([catalogue.user_numbers[name] for name in names], dtype=np.int64)
            aggregates = keys.pop(user, [])
            full_pages = consumed.full_pages(int(index[0])) if consumed is not None and len(index) else None
            if consumed is not None:
                consumed.forget(index)
            visits, *_ = [history.forget(index) for history in histories]
            self.dead.update(catalogue.forget_users(names).tolist())
            self.aggregates.update(dict.fromkeys(aggregates, seq))
            payload = record.ForgottenRecord(request.salt, request.at_us, user, aggregates, full_pages)
            records.append(Record(record.FORGOTTEN, request.user, record.encode(payload)))
            counts = {"records": len(names), "visits": visits, "aggregates": len(aggregates)}
            removed.append(Removed(request, counts))
        return records, removed

    def left_out(
        self, users: Sequence[str], times: NDArray[np.int64], messages: Sequence[Message]
    ) -> NDArray[np.bool_]:
        """Marks the events (E,) of a batch that do not count.

        Args:
            users: Id of each event's user.
            times: (E,) time of each event, microseconds since 1970.
            messages: Message of each event.
        """
        found = self.users.left_out(users, times)
        for topic, request, partition, offset in self._before:
            earlier = np.array(
                [(m.topic, m.partition) == (topic, partition) and m.offset < offset for m in messages], dtype=np.bool_
            )
            alone = ForgottenUsers([request])
            found |= earlier & np.array([alone.until(user) is not None for user in users], dtype=np.bool_)
        return found


def named_users(tombstones: Sequence[tuple[Message, Forgotten]], known: Iterable[str]) -> dict[tuple[str, str], str]:
    """Returns the ids that tombstones mean, by hash and salt.

    The key of a tombstone is the id. The ids of a rewritten tombstone are found among the known ids, of which each is
    hashed.
    """
    found, wanted = {}, set()
    for message, request in tombstones:
        name = (message.key or b"").decode(errors="replace")
        if message.key is not None and hashed(name, request.salt) == request.user:
            found[request.user, request.salt] = name
        else:
            wanted.add((request.user, request.salt))
    for salt in {salt for _, salt in wanted}:
        for name in known:
            if (user := hashed(name, salt), salt) in wanted:
                found[user, salt] = name
    return found
