"""Ranking and retrieval. A ranking of many candidates takes one read of rows and one pass through the network.

A `RankService` is bound to one bundle. Rows, histories and items are read under the bundle's id, and the answer names
the bundle.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features import tracing as trace
from features.aggregate.aggregator import Reading, readings
from features.errors import EventError, StoreError
from features.shown.policy import Policy
from features.value.filter import Filter
from models.bundle import record
from models.bundle.bundle import Bundle
from models.bundle.corrector import NewCandidates, corrector_of, labelled_of
from models.bundle.embedding import EmbeddingClient, csv_sources
from models.bundle.request_aggregates import AsOf
from models.bundle.request_features import SentValues, request_events, sent_candidates, sent_values
from models.bundle.scorer import Lookups, Scorer
from serving.policy.arrange import Arrangement
from serving.policy.policies import Policies, log_odds
from serving.ranking.aggregates import Asked, RequestAggregates
from serving.ranking.answer import ItemView, RankingAnswer, RetrievalAnswer
from serving.ranking.histories import Histories, UserRecords
from serving.ranking.inputs import RankingInputs
from serving.ranking.item_retrieval import ItemRetrieval
from serving.ranking.live_catalogue import LiveCatalogue
from serving.ranking.rows import RowReader, StoreRows
from serving.retrieval.meaning import NOTHING, Meant, PolicyRequest
from serving.retrieval.rows import RowKind
from serving.store.fill import require_loaded
from serving.store.protocol import OnlineStore
from streaming.log.protocol import lesser

MAX_CANDIDATES, MAX_EXPLAINED = 2_000, 100
# Shortest time that a bundle which another server released stays in the store while this server answers from it.
_LEASE_S = 60.0


class _Gathered(NamedTuple):
    """Ids and numbers (n,) of the candidates, the aggregates that they read, and records of the user and of these.

    `ranks` holds the rank of each candidate in the list of each source that found it, by source; empty if the request
    gave the candidates.
    """

    names: list[str]
    items: NDArray[np.int64]
    asked: Asked
    stored: UserRecords
    ranks: Sequence[Mapping[str, int]] = ()


class _User(NamedTuple):
    """Stored record of a user, numbers (V,) of the visited items, and True if bundle or stream know the user."""

    visits: record.HistoryRecord | None
    history: NDArray[np.int64]
    known: bool


class _Scored(NamedTuple):
    """Scores (n,) of the candidates, what they follow from, and the order (m,) of the answer."""

    lookups: Lookups
    vectors: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    scores: NDArray[np.float32]
    new: NewCandidates | None
    order: NDArray[np.int64]
    arrangement: Arrangement | None


class RankService:
    """Ranking and retrieval of one bundle.

    Attributes:
        bundle: The bundle.
        rows: Source of the rows.
        embeddings: Embeddings of feature values.

    Args:
        bundle: The bundle.
        store: Store that has the bundle.
        rows: Source of the rows. Default: the store.
        deltas: Name of the deltas' topic, whose position in the store the answers name. None: the position is empty.
        index: Format of the rows of the search indexes.

    Raises:
        StoreError: The store does not answer, or does not have the bundle.
    """

    def __init__(
        self,
        bundle: Bundle,
        store: OnlineStore,
        rows: RowReader | None = None,
        *,
        deltas: str | None = None,
        index: RowKind = "float32",
    ) -> None:
        require_loaded(store, bundle)
        self._storage = store.table(bundle.id).storage
        self.bundle = bundle
        self._store = store
        self.rows = rows or StoreRows(store, bundle.id)
        self._schema = bundle.schema
        self._histories = Histories(bundle, store, outlasts=self.rows.outlasts_store)
        self._live = LiveCatalogue(bundle, store, self._histories, self.rows, deltas=deltas, index=index)
        self._catalogue = self._live.catalogue
        self._policies = Policies(bundle, self._catalogue, self._live.attributes, self._live.codes)
        self._retrieval = ItemRetrieval(bundle, self._live, self._histories, self._policies)
        self._scorer = Scorer(
            self._schema, bundle.network(), self._catalogue, bundle.dataset.events.varying, bundle.formula
        )
        self._corrector = corrector_of(bundle, self._catalogue)
        self._aggregates = RequestAggregates(self._schema.aggregates, self._scorer, self.rows)
        self.embeddings = EmbeddingClient(
            self._schema,
            self._catalogue.admission,
            self.rows.read_rows,
            version=bundle.canonical,
            of_csv=csv_sources(bundle.dataset),
        )
        # One refresh runs at a time.
        self._refreshing = threading.Lock()
        self._renew_at = 0.0
        self.refresh()

    @property
    def ranks_items(self) -> bool:
        """True if the bundle has items. A bundle that was trained on events alone has none."""
        return self.items > 0

    @property
    def has_clock(self) -> bool:
        """True if the events have times, False if they have positions or nothing."""
        return self.bundle.dataset.events.time is not None

    @property
    def items(self) -> int:
        """Number of items that can be ranked."""
        return self._live.size

    @property
    def unreadable(self) -> set[str]:
        """Ids of the items whose record cannot be applied."""
        return self._live.unreadable

    @property
    def index_bytes(self) -> dict[str, int]:
        """Bytes of each search index in memory, by the name of the view, the aspect, the channel or the source."""
        return self._live.index_bytes

    @property
    def item_types(self) -> dict[str, pl.DataType]:
        """Types of the item columns that item messages may set, by column."""
        return self._catalogue.item_types

    def check_ready(self) -> None:
        """Checks that requests can be answered.

        Raises:
            StoreError: The store does not answer, or does not have the bundle.
        """
        require_loaded(self._store, self.bundle)

    def refresh(self) -> int:
        """Applies the stream's changes of items and admissions since the last call. Returns the number of items.

        Raises:
            StoreError: The store does not answer, or no longer has the bundle.
        """
        with self._refreshing:
            self._require_loaded()
            return self._live.refresh()

    def _require_loaded(self) -> None:
        """Checks that the store has the bundle, and extends its time if another server has released it."""
        try:
            require_loaded(self._store, self.bundle)
        except StoreError:
            self._histories.emptied = True
            raise
        self._histories.emptied = False
        if time.monotonic() >= self._renew_at:
            self._store.renew(self.bundle.id, least_s=_LEASE_S)
            self._renew_at = time.monotonic() + _LEASE_S / 6

    def rank(
        self,
        user: str,
        candidates: Sequence[str | Mapping[str, Any]] | None,
        k: int,
        context: Mapping[str, Any] | None = None,
        *,
        wanted: Filter | None = None,
        explain: bool = False,
        at: int | None = None,
        meant: Meant = NOTHING,
    ) -> RankingAnswer:
        """Ranks candidates for a user.

        Args:
            user: Id of the user.
            candidates: Item ids, or mappings with `item_id` and the candidate's fields; repeats are ignored. None:
                retrieval chooses the candidates, which have defaults.
            k: Largest number of items to return.
            context: Values of the events' own columns, by column. Absent columns have their default, or are null.
            wanted: Condition that retrieved candidates must meet.
            explain: True returns reasons for the returned items.
            at: Time as of which aggregates are answered, microseconds since 1970. Default: right after the newest event
                of the stream. Expressions over the events' clock read this time, by default the present time.
            meant: Sources of retrieved candidates, concepts that retrieval avoids, those that no retrieved candidate
                may carry, and the policy that arranges the answer. Without a policy the items are ordered by their
                scores.

        Raises:
            StoreError: The bundle has no items, or the store does not answer.
            EventError: The bundle has no such policy, `context`, a candidate or `wanted` names an unknown column, or a
                value has a wrong type.
        """
        if not self.ranks_items:
            raise StoreError(f"bundle {self.bundle.id} was trained on events without items, so it ranks no items")
        if at is not None and not self.has_clock:
            raise EventError(f"at: the dataset {self.bundle.dataset.name} has no clock; leave at out")
        rules = self._policies.find(meant.policy.name) if meant.policy is not None else None
        now_us = time.time_ns() // 1_000 if at is None else at
        ids, sent = sent_candidates(self.bundle, context or {}, candidates or ())
        # Read before all other reads, so that these hold all deltas before the position.
        mirror = self.rows.mirrored(away=False)
        position = self._live.position if mirror is None else lesser(self._live.position, mirror.position)
        if candidates is not None:
            gathered = self._given(user, ids, rules)
        else:
            gathered = self._retrieved(user, k, wanted, meant, rules, now_us)
            sent = sent_values(self.bundle, context or {}, {}, len(gathered.items))
        columns, as_of = self._aggregates.answer(gathered.asked, gathered.stored, at)
        known, found = self._looked_up(user, gathered, sent, columns, now_us, retrieved=candidates is None)
        names = gathered.names
        answer = RankingAnswer(
            bundle=self.bundle.id,
            items=[],
            known_user=known.known,
            unknown_items=[names[number] for number in np.flatnonzero(gathered.items == self._live.default_item)],
            retrieved=candidates is None,
            stale=gathered.stored.stale,
            as_of=as_of,
            sent=sent.of(self.bundle.dataset.events, []),
            policy=meant.policy.name if meant.policy is not None else "",
            judge=self.bundle.dataset.events.judge or "",
        )
        if found is None:
            return answer
        scored = self._scored(gathered, *found, k, meant.policy, rules)
        order = scored.order
        inputs = RankingInputs(
            user=user,
            names=names,
            sent=sent,
            at=at,
            now_us=now_us,
            history=known.history,
            item_ids=self._catalogue.item_ids,
            lookups=scored.lookups,
            vectors=scored.vectors,
            scores=scored.scores,
            position=position,
            source="store" if mirror is None else "mirror",
            storage=self._storage,
            ranks=gathered.ranks,
            labelled=labelled_of(known.visits) if self._corrector is not None else ((), b""),
        )
        answer = replace(
            answer,
            items=[(names[index], float(scored.scores[index])) for index in order],
            inputs=inputs,
            sent=sent.of(self.bundle.dataset.events, order.tolist()),
            arrangement=scored.arrangement,
            left_out=_left_out(scored.arrangement, names),
            tasks=self._tasks(scored, names),
            found={names[at]: gathered.ranks[at] for at in order.tolist()} if candidates is None else {},
        )
        return self._explained(answer, gathered, known, scored) if explain else answer

    def _looked_up(
        self,
        user: str,
        gathered: _Gathered,
        sent: SentValues,
        aggregates: NDArray[np.float32] | None,
        now_us: int,
        *,
        retrieved: bool,
    ) -> tuple[_User, tuple[Lookups, NewCandidates | None] | None]:
        """Returns the user, and the candidates' lookups with what corrects new ones; None without a candidate."""
        items, stored, live = gathered.items, gathered.stored, self._live
        with live.lock.reading():
            trace.note(candidates=len(items), retrieved=retrieved)
            visits = record.decode_history(stored.history) if stored.history else None
            known = stored.history is not None or user in self._catalogue.user_numbers
            found = _User(visits, live.visited(visits), known)
            if not len(items):
                return found, None
            events = request_events(self.bundle, self._catalogue, sent, user, items, at_us=now_us)
            lookups = self._scorer.lookups(user, items, found.history, events, aggregates)
            new = None
            if self._corrector is not None:
                new = self._corrector.gather(items, lookups, *labelled_of(visits))
            return found, (lookups, new)

    def _scored(
        self,
        gathered: _Gathered,
        lookups: Lookups,
        new: NewCandidates | None,
        k: int,
        policy: PolicyRequest | None,
        rules: Policy | None,
    ) -> _Scored:
        """Scores the candidates and orders the best k: by score, or as the policy arranges them."""
        vectors = self.rows.read_rows(lookups.rows)
        probabilities = self._scorer.probabilities(lookups, vectors)
        scores = self._scorer.combined(probabilities)
        scores = scores if new is None else new.apply(scores)
        if policy is None or rules is None:
            order = np.argsort(-scores, kind="stable")[:k]
            return _Scored(lookups, vectors, probabilities, scores, new, order, None)
        logits = log_odds(self._scorer.shares(scores))
        names, items, consumed = gathered.names, gathered.items, gathered.stored.consumed
        with trace.span("policy"), self._live.lock.reading():
            arranged = self._policies.arrange(rules, names, items, logits, consumed, k, draw=policy.draw)
        return _Scored(lookups, vectors, probabilities, scores, new, arranged.order, arranged)

    def _tasks(self, scored: _Scored, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Returns the probabilities of the tasks of each answered item; empty for one label."""
        if self._scorer.formula is None:
            return {}
        return {names[at]: self._scorer.by_task(scored.probabilities[at]) for at in scored.order}

    def _explained(self, answer: RankingAnswer, gathered: _Gathered, known: _User, scored: _Scored) -> RankingAnswer:
        """Adds the reasons for the answered items."""
        order = scored.order
        return replace(
            answer,
            corrections=[None] * len(order) if scored.new is None else scored.new.explain(order),
            reasons=self._scorer.explain(scored.lookups, scored.vectors, order),
            shared=self._retrieval.shared_with(known.history, gathered.items[order]),
        )

    def _given(self, user: str, candidates: Sequence[str], rules: Policy | None) -> _Gathered:
        """Returns the distinct candidates of a request, with what the store has of user and candidates."""
        live = self._live
        live.learn(candidates)
        names = list(candidates)
        with live.lock.reading():
            items = live.numbers(names)
            asked = self._aggregates.of(user, items)
        with trace.span("history"):
            stored = self._histories.read(user, asked.ids, consumed=_leaves_out(rules))
        return _Gathered(names, items, asked, stored)

    def _retrieved(
        self, user: str, k: int, wanted: Filter | None, meant: Meant, rules: Policy | None, now_us: int
    ) -> _Gathered:
        """Returns the candidates that retrieval finds, with what the store has of user and candidates."""
        live = self._live
        with trace.span("history"):
            stored = self._histories.read(user, (), consumed=_leaves_out(rules))
        with live.lock.reading():
            hits = self._retrieval.candidates(
                user, stored.history, k, wanted, meant, now_us=now_us, rules=rules, consumed=stored.consumed
            )
            items, names = hits.numbers, live.names(hits.numbers)
            asked = self._aggregates.of(user, items)
        if asked.ids:
            stored = replace(self._histories.read(user, asked.ids), consumed=stored.consumed)
        return _Gathered(names, items, asked, stored, hits.ranks)

    def retrieve(
        self,
        *,
        item: str | None = None,
        user: str | None = None,
        text: str | None = None,
        k: int,
        wanted: Filter | None = None,
        view: str | None = None,
        meant: Meant = NOTHING,
    ) -> RetrievalAnswer:
        """Finds the items nearest to an item or a text, or the candidates for a user.

        Args:
            item, user, text: Exactly one of the three.
            k: Largest number of items to return.
            wanted: Condition that the items must meet.
            view: One of `views`. Default: for an item `similar`, if the bundle has that view, otherwise `base`.
            meant: Aspect in which items are near, concepts to avoid or to exclude, channels of a text, sources for a
                user, the wish for an explanation, and the policy that arranges the answer.

        Raises:
            EventError: The policy, the item, the view, the aspect, a channel, a source or a concept is unknown, the
                bundle has no encoder for the text, or the filter does not fit.
            StoreError: The store does not answer.
        """
        return self._retrieval.retrieve(item=item, user=user, text=text, k=k, wanted=wanted, view=view, meant=meant)

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the views of the items' vectors, `base` first."""
        return self._live.retriever.views

    def item(self, name: str) -> ItemView | None:
        """Returns an item as the store or the bundle has it, the store first. None if it is unknown or deleted."""
        return self._live.view(name)

    def aggregates(self, user: str, item: str, *, at: int | None = None) -> tuple[list[Reading], AsOf | None]:
        """Returns the aggregates that a ranking of one item for one user reads, and the time as of which they are.

        Args:
            user: Id of the user. An unknown user has no event.
            item: Id of the item. An unknown item has no event.
            at: As in `rank`.

        Raises:
            StoreError: The store does not answer.
        """
        self._live.learn([item])
        with self._live.lock.reading():
            asked = self._aggregates.of(user, self._live.numbers([item]))
        columns, as_of = self._aggregates.answer(asked, self._histories.read(user, asked.ids), at)
        return ([] if columns is None else readings(self._schema.aggregates, columns[0])), as_of

    def similar(self, item: str, count: int) -> list[tuple[str, float]]:
        """Returns the items whose content is nearest to an item's content, with their cosine similarity.

        The vectors are of the view `similar`, if the bundle has that view, otherwise of `base`.

        Args:
            item: Id of a known item.
            count: Largest number of items to return.
        """
        return self._retrieval.similar(item, count)


def _leaves_out(rules: Policy | None) -> bool:
    return rules is not None and rules.leave_out_consumed


def _left_out(arrangement: Arrangement | None, names: Sequence[str]) -> dict[str, list[str]]:
    """Returns the ids of the candidates that a policy left out, by the rule."""
    if arrangement is None:
        return {}
    numbers = {"consumed": arrangement.consumed, "cap": arrangement.capped}
    return {rule: [names[number] for number in own.tolist()] for rule, own in numbers.items()}
