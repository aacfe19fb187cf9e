"""Checks events and items sent over HTTP like any message, then appends them to the log.

All rows of a request are checked before the first row is appended. If any row is invalid, none is appended. If the log
fails during the append, it may have some of the rows. If the caller sends the rows again with an `_event_id` or a
`_version`, each row counts once.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from features.dataset.descriptor import Dataset
from features.errors import EventError
from features.message import Rows, event_rows, item_rows
from features.shown.message import Outcome, encode
from features.value.canonical import scalar
from features.wire.decoder import event_decoder, item_decoder
from models.bundle.bundle import Bundle
from serving.sink import Kind, Sink


class Intake:
    """Checker of rows of a bundle's dataset, which it appends to the log.

    Args:
        sink: Destination of checked rows.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def events(self, bundle: Bundle, rows: Sequence[Mapping[str, Any]]) -> int:
        """Appends events. The user's id chooses the partition.

        Args:
            bundle: Bundle whose dataset defines the events.
            rows: Events, by column.

        Returns:
            Number of appended events.

        Raises:
            EventError: A row is not an event of the dataset. Nothing was appended.
            LogError: The log does not answer.
        """
        events = bundle.dataset.events
        decode = event_decoder(events)
        messages = [_encoded(row, "events", number) for number, row in enumerate(rows)]
        decoded = [_decoded(decode, message, "events", number) for number, message in enumerate(messages)]
        _, bad = event_rows(Rows(decode.columns, [each.row for each in decoded]), events, version=bundle.canonical)
        _refuse(bad, "events")
        keys = [_key(row.get(events.user or events.item or "", "")) for row in rows]
        self._sink.append("events", list(zip(keys, messages, strict=True)))
        return len(messages)

    def outcomes(self, outcomes: Sequence[Outcome]) -> int:
        """Appends outcomes; see `events`. The impression's id chooses the partition."""
        self._sink.append("outcomes", [(outcome.impression.encode(), encode(outcome)) for outcome in outcomes])
        return len(outcomes)

    def forget(self, user: str, *, by: str) -> None:
        """Appends a request to forget a user.

        Args:
            user: Id of the user.
            by: Name of the key that asks.

        Raises:
            EventError: The id cannot be a user's.
            LogError: The log does not answer.
        """
        self._sink.forget(scalar(user) or "", by=by)

    def items(self, bundle: Bundle, types: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> int:
        """Appends items; see `events`. The item's id chooses the partition.

        Args:
            bundle: Bundle whose dataset defines the items.
            types: Types of the catalogue's columns.
            rows: Items, by column.
        """
        items = _items_of(bundle.dataset)
        decode = item_decoder(items)
        messages = [_encoded(row, "items", number) for number, row in enumerate(rows)]
        decoded = [_decoded(decode, message, "items", number) for number, message in enumerate(messages)]
        kept = [number for number, each in enumerate(decoded) if not each.deleted]
        chosen = Rows(decode.columns, [decoded[number].row for number in kept])
        _, bad = item_rows(chosen, items, types, version=bundle.canonical)
        _refuse({kept[number]: why for number, why in bad.items()}, "items")
        keys = [_key(row[items.id]) for row in rows]
        self._sink.append("items", list(zip(keys, messages, strict=True)))
        return len(messages)


def _items_of(dataset: Dataset) -> Any:
    if dataset.items is None:
        raise EventError(f"items: dataset {dataset.name!r} has no items")
    return dataset.items


def _key(value: Any) -> bytes:
    """Returns the canonical form of an id, so that every notation of the id has the same partition."""
    return (scalar(value) or "").encode()


def _encoded(row: Mapping[str, Any], kind: Kind, number: int) -> bytes:
    try:
        return msgspec.json.encode(row)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise EventError(f"{kind}.{number}: {error}") from error


def _decoded(decode: Any, message: bytes, kind: Kind, number: int) -> Any:
    try:
        return decode(message)
    except EventError as error:
        raise EventError(f"{kind}.{number}: {error}") from error


def _refuse(bad: Mapping[int, str], kind: Kind) -> None:
    if bad:
        number = min(bad)
        raise EventError(f"{kind}.{number}: {bad[number]}")
