"""All items that each user has consumed: the state of a stream, and the records that a store keeps.

A history holds the newest visits alone. Here each user has a list of keys, the hashes of item ids, in the order of
arrival. The list is cut into pages. A full page never changes, and the rest, the head, is written again with each new
item. So an event costs one short record, however much its user has consumed, and a server reads each page once.

The newest `PAGES` full pages and the head are kept, which are 16,384 items. An item that is already in the head is not
added. An item that comes again later takes a second place.

Shape letters: E events, U users, P full pages, C keys of a page.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.errors import EventError

HEAD: Final = "consumed"
"""Kind of the record of a user's head: the number of full pages, then keys. The id is the user's id."""
FULL: Final = "consumed-page"
"""Kind of the record of a full page, its keys. The id is `page_id`."""
PAGE, PAGES = 32, 512
"""Keys of a page, and full pages that are kept of a user."""
SCHEMA: Final = {"user_id": pl.String, "key": pl.UInt64}
"""Columns of a bundle's file of consumed items, of each user in the order of consumption."""

Keys = NDArray[np.uint64]
Ints = NDArray[np.int64]
Row = tuple[str, str, bytes]
"""Kind, id and payload of a record."""
_NUMBERS: Final = np.arange(PAGE)


def page_id(user: str, number: int) -> str:
    """Returns the id of a full page's record. A page replaces the one that is `PAGES` older."""
    return f"{number % PAGES}.{user}"


def page_user(name: str) -> str:
    """Returns the user of a full page's record, by the record's id."""
    return name.partition(".")[2]


def page_ids(user: str, full: int) -> list[str]:
    """Returns the ids of the kept pages of a user with a number of full pages, oldest first."""
    return [page_id(user, number) for number in range(max(0, full - PAGES), full)]


def decode_head(payload: bytes) -> tuple[int, Keys]:
    """Returns the number of full pages, and the keys of the head, of a record of the kind `HEAD`.

    Raises:
        EventError: The bytes are no such record.
    """
    if len(payload) < 8 or len(payload) % 8:
        raise EventError(f"record of consumed items: expected 8 bytes a key after 8 bytes, got {len(payload)} bytes")
    return int.from_bytes(payload[:8], "little"), decode_page(payload[8:])


def decode_page(payload: bytes) -> Keys:
    """Returns the keys of a record of the kind `FULL`."""
    return np.frombuffer(payload, dtype="<u8").astype(np.uint64)


class ConsumedItems:
    """Keys of the consumed items of users by number, changed in place."""

    def __init__(self) -> None:
        self._counts: Ints = np.zeros(0, dtype=np.int64)
        self._heads: Keys = np.zeros((0, PAGE), dtype=np.uint64)
        # Full pages in the order in which they were filled.
        self._page_users: list[Ints] = []
        self._page_numbers: list[Ints] = []
        self._pages: list[Keys] = []

    def advance(self, users: Ints, keys: Keys) -> tuple[Ints, tuple[Ints, Ints, Keys]]:
        """Adds the items (E,) of events in their order.

        Returns:
            The users of the events, and the pages that became full: users (P,), numbers (P,) and keys (P, C).
        """
        changed = np.unique(users)
        self._grow(int(changed.max(initial=-1)) + 1)
        held = self._counts[changed] % PAGE
        owners = np.concatenate([np.repeat(changed, held), users])
        every = np.concatenate([self._heads[changed][held[:, None] > _NUMBERS], keys])
        kept = _first(owners, every)
        kept = kept[np.argsort(owners[kept], kind="stable")]
        every, lengths = every[kept], np.unique(owners[kept], return_counts=True)[1]
        starts, full = np.cumsum(lengths) - lengths, lengths // PAGE
        # Pages that become full.
        owner = np.repeat(np.arange(len(changed)), full)
        nth = np.arange(len(owner)) - (np.cumsum(full) - full)[owner]
        pages = every[(starts[owner] + nth * PAGE)[:, None] + _NUMBERS]
        before = self._counts[changed] // PAGE
        filled = changed[owner], before[owner] + nth, pages
        self._append(*filled)
        # The rest is the new head.
        rest = lengths - full * PAGE
        places = np.minimum((starts + full * PAGE)[:, None] + _NUMBERS, max(len(every) - 1, 0))
        self._heads[changed] = np.where(rest[:, None] > _NUMBERS, every[places], 0) if len(every) else 0
        self._counts[changed] = (before + full) * PAGE + rest
        return changed, filled

    def records(self, users: Ints, filled: tuple[Ints, Ints, Keys], ids: Sequence[str]) -> Iterator[Row]:
        """Yields the records of full pages, then of the heads of users (U,).

        Args:
            users: Users.
            filled: Full pages, as `advance` returns them.
            ids: Ids of the users by number.
        """
        for user, number, page in zip(filled[0].tolist(), filled[1].tolist(), filled[2], strict=True):
            yield FULL, page_id(ids[user], number), page.astype("<u8").tobytes()
        for user, count, head in zip(users.tolist(), self._counts[users].tolist(), self._heads[users], strict=True):
            full, held = divmod(count, PAGE)
            yield HEAD, ids[user], full.to_bytes(8, "little") + head[:held].astype("<u8").tobytes()

    def all_records(self, ids: Sequence[str], users: Ints | None = None) -> Iterator[Row]:
        """Yields the records of all users with an item, or of some users (U,); see `records`."""
        chosen = np.flatnonzero(self._counts) if users is None else users[users < len(self._counts)]
        chosen = chosen[self._counts[chosen] > 0]
        page_users, numbers, pages = self._kept()
        index = np.isin(page_users, chosen)
        yield from self.records(chosen, (page_users[index], numbers[index], pages[index]), ids)

    def full_pages(self, user: int) -> int | None:
        """Returns the number of a user's full pages so far, None if the user has consumed nothing."""
        count = int(self._counts[user]) if user < len(self._counts) else 0
        return count // PAGE if count else None

    def forget(self, users: Ints) -> int:
        """Removes all items of users (U,). Returns the number of removed items."""
        known = users[users < len(self._counts)]
        count = int(self._counts[known].sum())
        self._counts[known], self._heads[known] = 0, 0
        page_users, numbers, pages = self._kept()
        left = ~np.isin(page_users, known)
        self._page_users, self._page_numbers, self._pages = [page_users[left]], [numbers[left]], [pages[left]]
        return count

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Returns the state as arrays, for a snapshot."""
        users = np.flatnonzero(self._counts)
        page_users, numbers, pages = self._kept()
        return {
            "consumed_users": users,
            "consumed_counts": self._counts[users],
            "consumed_heads": self._heads[users],
            "consumed_page_users": page_users,
            "consumed_page_numbers": numbers,
            "consumed_pages": pages,
        }

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]]) -> "ConsumedItems":
        """Returns the state of a snapshot's arrays."""
        found = cls()
        users = arrays["consumed_users"]
        found._grow(int(users.max(initial=-1)) + 1)
        found._counts[users], found._heads[users] = arrays["consumed_counts"], arrays["consumed_heads"]
        found._append(*(arrays[f"consumed_{name}"] for name in ("page_users", "page_numbers", "pages")))
        return found

    def _grow(self, size: int) -> None:
        more = size - len(self._counts)
        if more > 0:
            more = max(more, len(self._counts))
            self._counts = np.concatenate([self._counts, np.zeros(more, dtype=np.int64)])
            self._heads = np.concatenate([self._heads, np.zeros((more, PAGE), dtype=np.uint64)])

    def _append(self, users: Ints, numbers: Ints, pages: Keys) -> None:
        if len(users):
            self._page_users.append(users)
            self._page_numbers.append(numbers)
            self._pages.append(pages)

    def _kept(self) -> tuple[Ints, Ints, Keys]:
        """Returns users, numbers and keys of the pages that are kept."""
        none = np.zeros(0, dtype=np.int64)
        users, numbers = np.concatenate([none, *self._page_users]), np.concatenate([none, *self._page_numbers])
        pages = np.concatenate([np.zeros((0, PAGE), dtype=np.uint64), *self._pages])
        kept = numbers >= self._counts[users] // PAGE - PAGES
        return users[kept], numbers[kept], pages[kept]


def _first(users: Ints, keys: Keys) -> Ints:
    """Returns the events (N,) with a key that their user has not had before, in their order."""
    order = np.lexsort((keys, users))
    first = np.ones(len(order), dtype=np.bool_)
    first[1:] = (np.diff(users[order]) != 0) | (keys[order][1:] != keys[order][:-1])
    return np.sort(order[first])
