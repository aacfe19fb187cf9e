"""The Python client of a Tessera server, sync and async, typed. It needs httpx and msgspec alone.

    with Client("http://127.0.0.1:8000", key="tsr_…") as tessera:
        for ranked in tessera.rank("42", k=5).items:
            print(ranked.item, ranked.score)

A read is tried again after 429 or 503, or if no server answers, after the time that the server asks for. A write is
tried again only after 429, when the server has not processed it. After other failures it may have been appended. A
refusal by the server is an `ApiError`, and a server that does not answer is a `ConnectionError`.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx

from serving.client_call import (
    BACKOFF_S,
    VERSION_CALL,
    ApiError,
    Call,
    Embeddings,
    Item,
    Ranking,
    Retrieval,
    ShownBy,
    Version,
    embeddings_call,
    item_call,
    rank_call,
    request_headers,
    retrieve_call,
    send_call,
    trace_headers,
)

__all__ = ["ApiError", "AsyncClient", "Client"]

T = TypeVar("T")


class Client:
    """Client of a server. Threads may share a client.

    Args:
        url: Address of the server.
        key: API key.
        timeout_s: Longest time of a try, seconds.
        retries: Largest number of repetitions of a request.

    Example:
        >>> with Client(url) as client:
        ...     items = [ranked.item for ranked in client.rank("r00001", k=3).items]
        >>> len(items)
        3
    """

    def __init__(self, url: str, *, key: str | None = None, timeout_s: float = 10.0, retries: int = 3) -> None:
        self._http = httpx.Client(base_url=url, headers=request_headers(key), timeout=timeout_s)
        self._retries = retries

    def rank(
        self,
        user: str,
        candidates: Sequence[str | Mapping[str, Any]] | None = None,
        *,
        k: int = 10,
        context: Mapping[str, Any] | None = None,
        filter: Mapping[str, Any] | None = None,
        explain: bool = False,
        at: datetime | None = None,
        meaning: Mapping[str, Any] | None = None,
        **shown: Unpack[ShownBy],
    ) -> Ranking:
        """Ranks the candidates for a user, or the items that retrieval finds.

        Args:
            user: Id of the user. An unknown user has no history.
            candidates: Item ids, or mappings with `item_id` and the candidate's fields, at most 2,000. None: retrieval
                chooses the candidates.
            k: Largest number of items to return.
            context: Values of the events' own columns and of the request's fields, by name. Absent columns have their
                default, or are null.
            filter: Condition on the items' filterable columns that retrieved candidates must meet.
            explain: True returns the contribution of each feature to an item's log-odds.
            at: Time as of which aggregates are answered, UTC if without an offset. None: right after the newest event
                of the stream.
            meaning: Fields about the retrieval of candidates: `sources`, a list of `towers` and `content`; `avoid` and
                `without`, lists of names of concepts.
            shown: `policy`, the policy of the dataset that arranges the items. By default their scores do.

        Returns:
            Items with their probabilities, best first, and the bundle that ranked them.

        Raises:
            ApiError: The server refused the request; `field` names the field at fault.
            ConnectionError: The server does not answer.
            ValueError: A value is no finite number.

        Example:
            >>> client.rank("r00001", ["a00001", "a00002"], k=1).known_user
            True
        """
        return self._do(rank_call(user, candidates, k, context, filter, explain, at, {**(meaning or {}), **shown}))

    def retrieve(
        self,
        *,
        item: str | None = None,
        user: str | None = None,
        text: str | None = None,
        k: int = 10,
        filter: Mapping[str, Any] | None = None,
        view: str | None = None,
        meaning: Mapping[str, Any] | None = None,
        **shown: Unpack[ShownBy],
    ) -> Retrieval:
        """Finds the items nearest to an item or a text, or the candidates for a user.

        Args:
            item, user, text: Exactly one of the three.
            k: Largest number of items to return.
            filter: Condition on the items' filterable columns.
            view: View of the vectors, such as `base`. Default: for an item `similar`, if the bundle has that view,
                otherwise `base`.
            meaning: Fields of the request about aspects, concepts, channels and sources: `aspect`, a name; `avoid` and
                `without`, lists of names; `explain`, True for the concepts that an item shares with the query;
                `channels` of a text, a list of `content` and `lexical`; `sources` for a user, a list of `towers` and
                `content`.
            shown: `policy`, the policy of the dataset that arranges the items; `shown_to`, the id of the user whose
                consumed items the policy leaves out, by default `user`.

        Returns:
            Items with their cosine similarity or the sum of reciprocal ranks, best first.

        Raises:
            ApiError: The server refused the request.
            ConnectionError: The server does not answer.

        Example:
            >>> len(client.retrieve(item="a00001", k=4).items)
            4
        """
        return self._do(retrieve_call(item, user, text, k, filter, view, {**(meaning or {}), **shown}))

    def embeddings(self, feature: str, values: Sequence[Any]) -> Embeddings:
        """Returns the embeddings of a feature's values.

        Args:
            feature: Name of a feature of the bundle.
            values: Values or lists of values. Lists are pooled.

        Returns:
            A vector for each value. The vector is zero if a value was seen too rarely, or is unknown to an exact
            feature.

        Raises:
            ApiError: The server refused the request.
            ConnectionError: The server does not answer.

        Example:
            >>> len(client.embeddings("item_id", ["a00001"]).vectors[0])
            16
        """
        return self._do(embeddings_call(feature, values))

    def send_events(self, events: Sequence[Mapping[str, Any]]) -> int:
        """Appends events to the log. If any event is invalid, none is appended.

        Args:
            events: Rows of the events' table, by column.

        Returns:
            Number of appended events.

        Raises:
            ApiError: The server refused the request.
            ConnectionError: The server does not answer. The events may have been appended.
        """
        return self._do(send_call("events", events)).accepted

    def send_items(self, items: Sequence[Mapping[str, Any]]) -> int:
        """Appends items to the log; see `send_events`.

        Args:
            items: Rows of the items' table, by column.
        """
        return self._do(send_call("items", items)).accepted

    def send_outcomes(self, outcomes: Sequence[Mapping[str, Any]]) -> int:
        """Appends outcomes of shown items to the log; see `send_events`.

        Args:
            outcomes: Outcomes with the fields `impression`, `item` and `what`.
        """
        return self._do(send_call("outcomes", outcomes)).accepted

    def item(self, item: str) -> Item:
        """Returns an item as the bundle and the stream know it.

        Raises:
            ApiError: The server refused the request. The status is 404 for an unknown item.
        """
        return self._do(item_call(item))

    def version(self) -> Version:
        """Returns the bundle that answers."""
        return self._do(VERSION_CALL)

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _do(self, call: Call[T]) -> T:
        for attempt in range(self._retries + 1):
            try:
                response = self._http.request(call.method, call.path, content=call.content, headers=trace_headers())
            except httpx.TransportError as error:
                if call.writes or attempt == self._retries:
                    raise ConnectionError(f"no answer from {self._http.base_url}: {error}") from error
                time.sleep(BACKOFF_S * 2**attempt)
                continue
            wait_s = call.retry_after_s(response)
            if wait_s is None or attempt == self._retries:
                break
            time.sleep(wait_s)
        return call.answer(response)


class AsyncClient:
    """Client for asyncio. The arguments and methods are those of `Client`."""

    def __init__(self, url: str, *, key: str | None = None, timeout_s: float = 10.0, retries: int = 3) -> None:
        self._http = httpx.AsyncClient(base_url=url, headers=request_headers(key), timeout=timeout_s)
        self._retries = retries

    async def rank(
        self,
        user: str,
        candidates: Sequence[str | Mapping[str, Any]] | None = None,
        *,
        k: int = 10,
        context: Mapping[str, Any] | None = None,
        filter: Mapping[str, Any] | None = None,
        explain: bool = False,
        at: datetime | None = None,
        meaning: Mapping[str, Any] | None = None,
        **shown: Unpack[ShownBy],
    ) -> Ranking:
        """See `Client.rank`."""
        return await self._do(
            rank_call(user, candidates, k, context, filter, explain, at, {**(meaning or {}), **shown})
        )

    async def retrieve(
        self,
        *,
        item: str | None = None,
        user: str | None = None,
        text: str | None = None,
        k: int = 10,
        filter: Mapping[str, Any] | None = None,
        view: str | None = None,
        meaning: Mapping[str, Any] | None = None,
        **shown: Unpack[ShownBy],
    ) -> Retrieval:
        """See `Client.retrieve`."""
        return await self._do(retrieve_call(item, user, text, k, filter, view, {**(meaning or {}), **shown}))

    async def embeddings(self, feature: str, values: Sequence[Any]) -> Embeddings:
        """See `Client.embeddings`."""
        return await self._do(embeddings_call(feature, values))

    async def send_events(self, events: Sequence[Mapping[str, Any]]) -> int:
        """See `Client.send_events`."""
        return (await self._do(send_call("events", events))).accepted

    async def send_items(self, items: Sequence[Mapping[str, Any]]) -> int:
        """See `Client.send_items`."""
        return (await self._do(send_call("items", items))).accepted

    async def send_outcomes(self, outcomes: Sequence[Mapping[str, Any]]) -> int:
        """See `Client.send_outcomes`."""
        return (await self._do(send_call("outcomes", outcomes))).accepted

    async def item(self, item: str) -> Item:
        """See `Client.item`."""
        return await self._do(item_call(item))

    async def version(self) -> Version:
        """See `Client.version`."""
        return await self._do(VERSION_CALL)

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _do(self, call: Call[T]) -> T:
        for attempt in range(self._retries + 1):
            try:
                response = await self._http.request(
                    call.method, call.path, content=call.content, headers=trace_headers()
                )
            except httpx.TransportError as error:
                if call.writes or attempt == self._retries:
                    raise ConnectionError(f"no answer from {self._http.base_url}: {error}") from error
                await asyncio.sleep(BACKOFF_S * 2**attempt)
                continue
            wait_s = call.retry_after_s(response)
            if wait_s is None or attempt == self._retries:
                break
            await asyncio.sleep(wait_s)
        return call.answer(response)
