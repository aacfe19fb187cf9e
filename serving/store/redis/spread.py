"""Places the keys of a bundle in the hash slots of a cluster.

A bundle on one server has one share, and its keys carry the bundle's id as hash tag. A bundle on a cluster has `SHARES`
shares. Page p is in share p mod S, and a record is in the share of the CRC-32 of its id. Each share has a hash tag of
its own, and the slots of the tags divide the 16,384 slots evenly:

    tessera:{bundle}:NAME            the bundle's home: keys of a bundle of one share, mark and shares of any bundle
    tessera:bundle:{k.n}:NAME        keys of share k

The tags are the same for every bundle and never change, so a moved slot takes its pages along and no key is renamed.
"""

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from redis.crc import key_slot

from models.bundle import record
from serving.store.page import key_of
from serving.store.protocol import POSITION, Int64

SHARES = 64
"""Shares of a new bundle on a cluster."""

SLOTS = 16_384
"""Hash slots of every Redis Cluster."""

STATED = frozenset({record.LOADED, POSITION})
"""Kinds whose records make a statement about the whole bundle. Every share has a copy.

A node may lose its last writes. The copy of its shares is then older or missing, and a read returns the oldest copy.
"""

_TOGETHER = frozenset({record.ADMITTED, record.FORGOTTEN})  # few records, of which some replace others
_STRIDE = 39  # consecutive shares are in distant slots, so that a table of few pages is on all nodes


@dataclass(frozen=True)
class Spread:
    """Keys and slots of a bundle.

    Attributes:
        bundle: Id of the bundle.
        shares: Number of shares S, ≥ 1.
    """

    bundle: str
    shares: int = 1

    def key(self, share: int, name: str) -> bytes:
        """Returns the key of a part of a share."""
        if self.shares == 1:
            return key_of(self.bundle, name)
        return f"tessera:{self.bundle}:{{{share_tags(self.shares)[share]}}}:{name}".encode()

    def keys(self, name: str) -> list[bytes]:
        """Returns the keys of a part, one for each share."""
        return [self.key(share, name) for share in range(self.shares)]

    def page_keys(self, pages: Int64) -> list[bytes]:
        """Returns the keys of pages (N,) int64, in the order of the pages."""
        prefixes, shares = self._page_prefixes, self.shares
        return [b"%b%d" % (prefixes[page % shares], page) for page in pages.tolist()]

    def slot(self, share: int) -> int:
        """Returns the hash slot of a share."""
        return self._slots[share]

    def shares_of(self, kind: str, ids: Sequence[bytes]) -> list[int]:
        """Returns the share of each record. A kind in `STATED` is in every share, and this method is not for it."""
        if self.shares == 1:
            return [0] * len(ids)
        if kind in _TOGETHER:
            return [zlib.crc32(f"{self.bundle} {kind}".encode()) % self.shares] * len(ids)
        return [zlib.crc32(name) % self.shares for name in ids]

    def shares_with(self, kind: str) -> Sequence[int]:
        """Returns the shares that may have records of a kind."""
        return range(self.shares) if kind not in _TOGETHER else self.shares_of(kind, [b""])

    @functools.cached_property
    def table_keys(self) -> list[bytes]:
        """Keys of the table's mark, one for each share."""
        return self.keys("table")

    @functools.cached_property
    def _page_prefixes(self) -> list[bytes]:
        return self.keys("page:")

    @functools.cached_property
    def _slots(self) -> list[int]:
        return [key_slot(key) for key in self.keys("table")]


@functools.cache
def share_tags(shares: int) -> list[str]:
    """Returns the hash tags of S shares. The slot of tag k lies in a part of 1/S of all slots, one part a tag."""
    tags = []
    for share in range(shares):
        part = share * _STRIDE % shares
        low, high = SLOTS * part // shares, SLOTS * (part + 1) // shares
        names = (f"{share}.{number}" for number in count())
        tags.append(next(name for name in names if low <= key_slot(name.encode()) < high))
    return tags
