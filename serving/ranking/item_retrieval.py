"""Retrieval of items nearest to an item, to a user's liked items, or to a text."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from features import tracing as trace
from features.content.chain import BASE, SIMILAR
from features.content.given.encoder import given_in
from features.errors import EventError
from models.bundle.bundle import Bundle
from serving.ranking.answer import RetrievalAnswer
from serving.ranking.histories import Histories
from serving.ranking.live_catalogue import LiveCatalogue
from serving.retrieval.filter import Filter
from serving.retrieval.meaning import Meant, SharedConcept
from serving.retrieval.text_search import CONTENT, LEXICAL, Hits

_RETRIEVED = 200


class ItemRetrieval:
    """Answers retrievals of one bundle.

    Args:
        bundle: The bundle.
        live: Items and indexes.
        histories: Histories of the users.
    """

    def __init__(self, bundle: Bundle, live: LiveCatalogue, histories: Histories) -> None:
        self._bundle, self._live, self._histories = bundle, live, histories

    def retrieve(
        self,
        *,
        item: str | None,
        user: str | None,
        text: str | None,
        k: int,
        wanted: Filter | None,
        view: str | None,
        meant: Meant,
    ) -> RetrievalAnswer:
        """Answers `RankService.retrieve`."""
        live = self._live
        chosen, channels = self._checked_view(view, meant.aspect, item), self._checked_channels(meant, text)
        if wanted is not None:
            wanted.check_size()
        allowed = live.meaning.excluding(meant.without, wanted)
        stored = None
        if user is not None:
            with trace.span("history"):
                stored = self._histories.read(user).history
        needs_vector = CONTENT in channels or meant.explain
        vector = self._encoded(text) if text is not None and needs_vector else None
        if item is not None:
            live.learn([item])
        with live.lock.reading():
            without = live.visited(stored)
            if item is not None:
                if live.number(item) == live.default_item:
                    raise EventError(f"item: {item!r} is unknown, or was deleted")
                without = np.array([live.number(item)], dtype=np.int64)
            query = vector if text is not None else live.retriever.taste(without)
            steered = live.meaning.steered(query, meant.avoid)
            if meant.aspect is not None:
                asked = without if steered is None or text is None else steered
                hits = Hits(*live.retriever.search_aspect(meant.aspect, asked, k, allowed, without=without))
            elif text is not None:
                hits = live.texts.search(text, steered, k, allowed, channels=channels, view=chosen)
            else:
                hits = Hits(*live.retriever.search(steered, k, allowed, without=without, view=chosen))
            names = live.names(hits.numbers)
            vectors = live.catalogue.vectors[hits.numbers] if meant.explain else None
        shared = [] if vectors is None or query is None else self._shared(query, vectors, names, item)
        ranked = list(zip(names, hits.scores.tolist(), strict=True))
        return RetrievalAnswer(
            self._bundle.id,
            ranked,
            hits.plan,
            chosen,
            meant.aspect,
            shared,
            channels if text is not None else (),
            hits.ranks,
            self._space(chosen, meant.aspect) if hits.plan.method not in ("popular", "words") else "",
        )

    def candidates(self, stored: bytes | None, k: int, wanted: Filter | None, meant: Meant) -> NDArray[np.int64]:
        """Returns the numbers of the items nearest to what the user liked. The caller holds the lock.

        Args:
            stored: Record of the user's history.
            k: Items of the answer; at least 200 candidates are found for it.
            wanted: Condition that the items must meet.
            meant: Concepts to avoid and to exclude.
        """
        live = self._live
        history = live.visited(stored)
        taste = live.meaning.steered(live.retriever.taste(history), meant.avoid)
        allowed = live.meaning.excluding(meant.without, wanted)
        return live.retriever.search(taste, max(_RETRIEVED, k), allowed, without=history)[0]

    def shared_with(self, liked: NDArray[np.int64], items: NDArray[np.int64]) -> list[list[SharedConcept]]:
        """Returns the concepts that each item (N,) shares most with liked items; none without concepts or likes."""
        live = self._live
        with live.lock.reading():
            taste = live.retriever.taste(liked)
            vectors = live.catalogue.vectors[items]
        if taste is None or not live.meaning.names:
            return []
        return [live.meaning.shared(taste, vector, []) for vector in vectors]

    def similar(self, item: str, count: int) -> list[tuple[str, float]]:
        """Answers `RankService.similar`."""
        live = self._live
        with live.lock.reading():
            nearest = live.retriever.similar(live.catalogue.item_numbers[item], count, self._similar_view)
            return [(live.catalogue.item_ids[number], score) for number, score in nearest]

    @property
    def _similar_view(self) -> str:
        return SIMILAR if SIMILAR in self._live.retriever.views else BASE

    def _space(self, view: str, aspect: str | None) -> str:
        """Returns the id of the space of an aspect, or else of a view."""
        manifest = self._bundle.manifest
        if aspect is not None:
            return manifest.aspects[aspect]
        return (manifest.encoder or "") if view == BASE else manifest.views[view]

    def _checked_view(self, view: str | None, aspect: str | None, item: str | None) -> str:
        """Returns the view to search in. Raises EventError for an unknown view or aspect."""
        views, aspects = self._live.retriever.views, self._live.retriever.aspects
        chosen = view or (self._similar_view if item is not None else BASE)
        if chosen not in views:
            raise EventError(f"view: bundle {self._bundle.id} has no view {view!r}; choose of {', '.join(views)}")
        if aspect is not None and aspect not in aspects:
            known = ", ".join(aspects) or "none; declare [items.aspects] and run again"
            raise EventError(f"aspect: bundle {self._bundle.id} has no aspect {aspect!r}; choose of {known}")
        return chosen

    def _checked_channels(self, meant: Meant, text: str | None) -> tuple[str, ...]:
        """Returns the channels to search. Raises EventError for a channel that the bundle lacks."""
        has = self._live.texts.channels
        if missing := [name for name in meant.channels if name not in has]:
            why = "its items have no text" if missing[0] == LEXICAL else "its items' vectors have no text encoder"
            raise EventError(
                f"channels: bundle {self._bundle.id} has no channel {missing[0]!r}, since {why}; ask by item or user"
            )
        if text is None or meant.aspect is not None:
            return (CONTENT,)
        # Words cannot be steered, so a query that avoids concepts asks the vectors alone.
        return meant.channels or tuple(name for name in has if name != LEXICAL or not meant.avoid) or (CONTENT,)

    def _shared(
        self, query: NDArray[np.float32], vectors: NDArray[np.float32], names: Sequence[str], item: str | None
    ) -> list[list[SharedConcept]]:
        """Returns the concepts that each answer shares most with the query."""
        live = self._live
        asking = live.declared([item]) if item is not None else []
        return [
            live.meaning.shared(query, vector, [declared, *asking])
            for declared, vector in zip(live.declared(names), vectors, strict=True)
        ]

    def _encoded(self, text: str) -> NDArray[np.float32]:
        encoder = self._bundle.encoder
        if encoder is None:
            raise EventError(f"text: bundle {self._bundle.id} has no encoder; ask by item or user")
        if given := given_in(encoder):
            raise EventError(
                f"text: bundle {self._bundle.id} reads vectors.{given[0].name} of space {given[0].space!r}, which has "
                "no text encoder; ask by item or user, or leave out explain, aspect and avoid"
            )
        with trace.span("encode"):
            vector: NDArray[np.float32] = encoder.encode([text])[0]
        return vector
