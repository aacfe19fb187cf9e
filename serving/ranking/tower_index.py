"""Searches items by a bundle's two towers: item vectors in an index, and a vector of the user for each request.

Item vectors are computed in batches when the server opens the bundle, and again when the stream adds or changes an
item. A user's vector is computed for each request from the history in the store. Both read rows of the table that
belong to the towers alone. The stream never trains these rows, so the server reads them once and holds them, and a
request needs no further round trip. Shape letters: N items, m rows, V visits, D dimension of a row, W width of vectors.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from features import tracing as trace
from models.bundle.bundle import Bundle
from models.bundle.catalogue import Catalogue
from models.bundle.record import HistoryRecord, ItemRecord, entity_frame
from models.towers.one_user import OneUser
from models.towers.towers import Towers
from serving.ranking.rows import RowReader
from serving.retrieval.filter import Attributes
from serving.retrieval.retriever import Searcher
from serving.retrieval.rows import Floats, Ints, RowKind

TOWERS = "towers"
"""Name of the source, and of its index."""
_CONTENT = "content_vector"
# Rows that one call reads, and items whose vectors are computed together.
_ROWS_AT_ONCE, _ITEMS_AT_ONCE = 65_536, 8_192


class TowerIndex:
    """Items and users of a bundle as its towers see them.

    Args:
        bundle: Bundle with the towers.
        towers: The towers.
        catalogue: Users and items of the bundle, with the item without values as the last one.
        attributes: Attributes that filters evaluate.
        rows: Source of the table's rows.
        kind: Format of the index's rows.

    Raises:
        StoreError: The rows cannot be read.
    """

    def __init__(
        self,
        bundle: Bundle,
        towers: Towers,
        catalogue: Catalogue,
        attributes: Attributes,
        rows: RowReader,
        *,
        kind: RowKind = "float32",
    ) -> None:
        self._bundle, self._towers, self._catalogue = bundle, towers, catalogue
        self._held = _HeldRange(rows, bundle.schema.rows - bundle.schema.reserved, bundle.schema.rows)
        own = [name for name in towers.item_columns if name in bundle.items.columns and name != _CONTENT]
        self._items_like = bundle.items.select(list(dict.fromkeys(("item_id", *own)))).clear()
        columns = [name for name in towers.user_columns if name in bundle.users.columns]
        self._user = OneUser(towers, bundle.users.select(columns), self._held.vectors)
        self._has_clock = bundle.dataset.events.time is not None
        published = bundle.items.select(self._items_like.columns)
        vectors = self._computed(published, catalogue.vectors[: published.height])
        # The item without values is never found.
        self.searcher = Searcher(np.pad(vectors, ((0, 1), (0, 0))), attributes, kind=kind)

    @property
    def id(self) -> str:
        """Id of the towers, which names the space of their vectors."""
        return self._towers.id

    @property
    def content_weight(self) -> float:
        """Weight of content's list beside the list of the towers."""
        return self._towers.content_weight

    @property
    def size_bytes(self) -> int:
        """Bytes of the index, of the rows that the towers read, and of the users' inputs."""
        return self.searcher.index.size_bytes + self._held.vectors.nbytes + self._user.nbytes

    def vectors_of(self, names: Sequence[str], records: Mapping[str, ItemRecord]) -> Floats:
        """Computes the vectors (N, W) of changed items. An item without a record is deleted and has a zero row.

        Args:
            names: N ids.
            records: Records by id.
        """
        found = np.zeros((len(names), self._towers.width), dtype=np.float32)
        kept = [place for place, name in enumerate(names) if name in records]
        if kept:
            chosen = [(name, records[name]) for name in (names[place] for place in kept)]
            rows = [self._catalogue.features_of(record) | {"item_id": name} for name, record in chosen]
            content = np.array([record.content() for _, record in chosen], dtype=np.float32)
            found[kept] = self._computed(entity_frame(rows, self._items_like), content.reshape(len(kept), -1))
        return found

    def put(self, numbers: Ints, vectors: Floats) -> None:
        """Adds or changes items (N,) with their vectors (N, W). The attributes must hold them already."""
        self.searcher.put(numbers, vectors)

    def user_vector(self, user: str, visits: HistoryRecord | None, now_us: int) -> Floats | None:
        """Computes the vector (W,) of a user; None without a visit to a known item. The caller holds the lock.

        Args:
            user: Id of the user.
            visits: History of the user; None if there is none.
            now_us: Time of the request, microseconds since 1970. Without a clock the time of the newest visit counts.
        """
        with trace.span("user tower"):
            numbers, times = self._visits(visits)
            if not len(numbers):
                return None
            now = now_us if self._has_clock else int(times[-1])
            known = self._catalogue.user_numbers.get(user, user)
            return self._user.vector(known, self.searcher.index.vectors(numbers), times, now)

    def _visits(self, visits: HistoryRecord | None) -> tuple[Ints, Ints]:
        """Returns numbers and times (V,) of the newest visits to items that are in the catalogue, oldest first."""
        if visits is None:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        known = self._catalogue.item_numbers
        found = [(known[name], time) for name, time in zip(visits.items, visits.times, strict=True) if name in known]
        numbers, times = np.array(found[-self._towers.length :], dtype=np.int64).reshape(-1, 2).T
        return numbers, times

    def _computed(self, items: pl.DataFrame, content: Floats) -> Floats:
        """Computes the vectors (N, W) of items with content vectors (N, E), some at a time."""
        found = np.zeros((items.height, self._towers.width), dtype=np.float32)
        for start in range(0, items.height, _ITEMS_AT_ONCE):
            part = slice(start, start + _ITEMS_AT_ONCE)
            frame = items[part]
            if content.shape[1]:
                frame = frame.with_columns(pl.Series(_CONTENT, self._bundle.for_ranker(content[part])))
            found[part] = self._towers.item_vectors(self._held.take, frame)
        return found


class _HeldRange:
    """Rows from `low` up to and without `high`, in memory."""

    def __init__(self, rows: RowReader, low: int, high: int) -> None:
        self._low = low
        starts = range(low, high, _ROWS_AT_ONCE)
        parts = [rows.read_rows(np.arange(start, min(start + _ROWS_AT_ONCE, high))) for start in starts]
        self.vectors: Floats = np.concatenate(parts) if parts else np.zeros((0, 0), dtype=np.float32)

    def take(self, numbers: Ints) -> Floats:
        """Returns the rows (m, D) of numbers (m,)."""
        return self.vectors.take(numbers - self._low, axis=0)
