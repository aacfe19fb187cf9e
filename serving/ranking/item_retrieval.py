"""Retrieval of items nearest to an item, to a user's liked items, or to a text."""

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from features import tracing as trace
from features.content.chain import BASE, SIMILAR
from features.content.given.encoder import given_in
from features.errors import EventError
from features.shown.policy import Policy
from features.value.filter import Filter
from models.bundle import record
from models.bundle.bundle import Bundle
from serving.policy.arrange import Arrangement
from serving.policy.policies import (
    CANDIDATES,
    NO_KEYS,
    Keys,
    Policies,
    by_rank,
    candidates_for,
    taken,
)
from serving.ranking.answer import RetrievalAnswer
from serving.ranking.histories import Histories
from serving.ranking.live_catalogue import LiveCatalogue
from serving.ranking.tower_index import TOWERS
from serving.ranking.user_search import UserQuery, UserSearch
from serving.retrieval.fusion import Hits, RankedList
from serving.retrieval.meaning import Meant, PolicyRequest, SharedConcept
from serving.retrieval.search_plan import POPULAR
from serving.retrieval.text_search import CONTENT, LEXICAL


class ItemRetrieval:
    """Answers retrievals of one bundle.

    Args:
        bundle: The bundle.
        live: Items and indexes.
        histories: Histories of the users.
        policies: Policies of the bundle.
    """

    def __init__(self, bundle: Bundle, live: LiveCatalogue, histories: Histories, policies: Policies) -> None:
        self._bundle, self._live, self._histories, self._policies = bundle, live, histories, policies
        self._users = UserSearch(bundle.id, live)

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
        policy = meant.policy
        rules, viewer = self._rules(policy, user)
        chosen, channels = self._checked_view(view, meant.aspect, item), self._checked_channels(meant, text)
        if wanted is not None:
            wanted.check_size()
        allowed = live.meaning.excluding(meant.without, wanted)
        stored, consumed = None, NO_KEYS
        sources: tuple[str, ...] = ()
        if user is not None:
            alone = view is not None or meant.aspect is not None or bool(meant.avoid)
            sources = self._users.sources(meant.sources, content_alone=alone)
            with trace.span("history"):
                stored = self._histories.read(user).history
        if viewer is not None:
            consumed = self._histories.consumed(viewer)
        needs_vector = CONTENT in channels or meant.explain
        vector = self._encoded(text) if text is not None and needs_vector else None
        if item is not None:
            live.learn([item])
        with live.lock.reading():
            visits = record.decode_history(stored) if stored else None
            without = live.visited(visits)
            if item is not None:
                if live.number(item) == live.default_item:
                    raise EventError(f"item: {item!r} is unknown, or was deleted")
                without = np.array([live.number(item)], dtype=np.int64)
            query = vector if text is not None else live.retriever.taste(without)
            steered = live.meaning.steered(query, meant.avoid)
            by_user: UserQuery | None = None
            if user is not None and meant.aspect is None:
                now_us = time.time_ns() // 1_000
                by_user = self._users.query(user, visits, sources, steered, without, now_us=now_us, view=chosen)

            def search(count: int, wanted: Filter | None) -> Hits:
                if by_user is not None:
                    return self._users.search(by_user, count, wanted)
                if meant.aspect is not None:
                    asked = without if steered is None or text is None else steered
                    found = live.retriever.search_aspect(meant.aspect, asked, count, wanted, without=without)
                    return RankedList(CONTENT, *found).alone(count)
                if text is not None:
                    return live.texts.search(text, steered, count, wanted, channels=channels, view=chosen)
                found = live.retriever.search(steered, count, wanted, without=without, view=chosen)
                return RankedList(CONTENT, *found).alone(count)

            arrangement = None
            if rules is None or policy is None:
                hits = search(k, allowed)
            else:
                least = CANDIDATES if rules.chooses else k
                hits = candidates_for(search, k, allowed, rules, consumed, live.names, least=least)
                hits, arrangement = self._arranged(hits, rules, k, policy.draw)
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
            self._space(chosen, meant.aspect, hits) if hits.plan.method not in (POPULAR, "words") else "",
            policy.name if policy is not None else "",
            arrangement,
            hits.lists if user is not None else None,
        )

    def _rules(self, policy: PolicyRequest | None, user: str | None) -> tuple[Policy | None, str | None]:
        """Returns the policy of a request, and the user whose consumed items it leaves out, if there is one."""
        if policy is None:
            return None, None
        rules = self._policies.find(policy.name)
        if user is not None and policy.shown_to not in (None, user):
            raise EventError(f"shown_to: {policy.shown_to!r} is another user than {user!r}; leave shown_to out")
        viewer = user or policy.shown_to
        if rules.leave_out_consumed and viewer is None:
            raise EventError(
                f"shown_to: the policy {policy.name!r} leaves out what a user has consumed; name the user to whom the "
                "items are shown"
            )
        return rules, viewer if rules.leave_out_consumed else None

    def _arranged(self, hits: Hits, rules: Policy, k: int, draw: str) -> tuple[Hits, Arrangement]:
        """Returns the items of an answer in the order of a policy. The caller holds the lock."""
        numbers = hits.numbers.astype(np.int64)
        # The candidates hold no consumed item.
        arrangement = self._policies.arrange(
            rules, self._live.names(numbers), numbers, by_rank(len(numbers)), NO_KEYS, k, draw=draw
        )
        return taken(hits, arrangement.order), arrangement

    def candidates(
        self,
        user: str,
        stored: bytes | None,
        k: int,
        wanted: Filter | None,
        meant: Meant,
        *,
        now_us: int,
        rules: Policy | None = None,
        consumed: Keys = NO_KEYS,
    ) -> Hits:
        """Returns the candidates of a ranking for a user, from the sources. The caller holds the lock.

        Args:
            user: Id of the user.
            stored: Record of the user's history.
            k: Items of the answer; at least 200 candidates are found for it.
            wanted: Condition that the items must meet.
            meant: Sources, and concepts to avoid and to exclude.
            now_us: Time of the request, microseconds since 1970.
            rules: Policy that chooses among the candidates.
            consumed: Keys of the items that the policy leaves out.
        """
        live = self._live
        sources = self._users.sources(meant.sources, content_alone=bool(meant.avoid))
        visits = record.decode_history(stored) if stored else None
        visited = live.visited(visits)
        taste = live.meaning.steered(live.retriever.taste(visited), meant.avoid)
        query = self._users.query(user, visits, sources, taste, visited, now_us=now_us)
        allowed = live.meaning.excluding(meant.without, wanted)

        def search(count: int, wanted: Filter | None) -> Hits:
            return self._users.search(query, count, wanted)

        if rules is None:
            return search(max(CANDIDATES, k), allowed)
        return candidates_for(search, k, allowed, rules, consumed, live.names)

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

    def _space(self, view: str, aspect: str | None, hits: Hits) -> str:
        """Returns the id of the space of the towers if they alone ranked, of an aspect, or else of a view."""
        manifest = self._bundle.manifest
        if tuple(hits.lists) == (TOWERS,) and self._live.towers is not None:
            return self._live.towers.id
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
