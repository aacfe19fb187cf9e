"""Candidates for a user from two sources: the towers, which behaviour has taught, and the content of liked items.

Each source is a list with scores of its own space. Two lists are fused by their ranks, see `serving.retrieval.fusion`.
Shape letters: D width of content vectors, W width of the towers' vectors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from features.content.chain import BASE
from features.errors import EventError
from features.value.filter import Filter
from models.bundle.record import HistoryRecord
from serving.ranking.live_catalogue import LiveCatalogue
from serving.ranking.tower_index import TOWERS
from serving.retrieval.fusion import DEPTH, Hits, RankedList, fuse_lists
from serving.retrieval.rows import Floats, Ints
from serving.retrieval.text_search import CONTENT

SOURCES = (TOWERS, CONTENT)
"""Names of the sources."""


@dataclass(frozen=True)
class UserQuery:
    """Vectors by which items are searched for a user.

    Attributes:
        sources: Sources to search, one at least.
        towers: Vector (W,) of the user's tower; None if the towers are not asked, or know nothing of the user.
        taste: Content vector (D,); None if content is not asked, or the user liked no item with content.
        visited: Numbers of the user's last visited items, oldest first, which are left out.
        view: View in which content is compared.
    """

    sources: Sequence[str]
    towers: Floats | None
    taste: Floats | None
    visited: Ints
    view: str = BASE


class UserSearch:
    """Searches items for a user.

    Args:
        bundle: Id of the bundle.
        live: Items and indexes.
    """

    def __init__(self, bundle: str, live: LiveCatalogue) -> None:
        self._bundle, self._live = bundle, live

    def sources(self, asked: Sequence[str], *, content_alone: bool) -> tuple[str, ...]:
        """Returns the sources that a request searches: those that it names, or by default all of the bundle that weigh.

        Args:
            asked: Names of sources; empty for the default.
            content_alone: True if the request steers or views content vectors, which the towers cannot do.

        Raises:
            EventError: The bundle has no towers, but the request names them.
        """
        if TOWERS in asked and self._live.towers is None:
            raise EventError(
                f"sources: bundle {self._bundle} has no towers; name content alone, leave sources out, or set "
                'retrieval = "towers" in [run] and run again'
            )
        if asked:
            return tuple(name for name in SOURCES if name in asked)
        if content_alone or self._live.towers is None:
            return (CONTENT,)
        return SOURCES if self._live.towers.content_weight else (TOWERS,)

    def query(
        self,
        user: str,
        visits: HistoryRecord | None,
        sources: Sequence[str],
        taste: Floats | None,
        visited: Ints,
        *,
        now_us: int,
        view: str = BASE,
    ) -> UserQuery:
        """Returns the query of a user. The caller holds the lock.

        Args:
            user: Id of the user.
            visits: History of the user; None if there is none.
            sources: Sources to search.
            taste: Content vector (D,) of what the user liked; None if there is none.
            visited: Numbers of the user's last visited items, oldest first.
            now_us: Time of the request, microseconds since 1970.
            view: View in which content is compared.
        """
        towers = self._live.towers if TOWERS in sources else None
        vector = None if towers is None else towers.user_vector(user, visits, now_us)
        return UserQuery(sources, vector, taste if CONTENT in sources else None, visited, view)

    def search(self, query: UserQuery, k: int, wanted: Filter | None) -> Hits:
        """Returns the k best items for a user, most popular ones if nothing is known of the user. See `query`.

        Args:
            query: Vectors of the user.
            k: Number of items.
            wanted: Condition that the items must meet.
        """
        live, lists = self._live, []
        depth = max(k, DEPTH) if len(query.sources) > 1 else k
        if query.towers is not None and live.towers is not None:
            found = live.retriever.search_in(live.towers.searcher, query.towers, depth, wanted, query.visited)
            lists.append(RankedList(TOWERS, *found))
        if CONTENT in query.sources or not lists:
            found = live.retriever.search(query.taste, depth, wanted, without=query.visited, view=query.view)
            weight = 1.0 if live.towers is None else live.towers.content_weight
            lists.append(RankedList(CONTENT, *found, weight=weight))
        return fuse_lists(lists, k)
