"""Applies item messages to the catalogue and returns the records that the store needs."""

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import polars as pl

from features.content.content import FIELDS, contents, fields_of, text_key
from features.content.lexical import pack_terms
from features.message import item_rows
from models.bundle import record
from models.bundle.bundle import Bundle
from models.bundle.catalogue import Catalogue
from models.bundle.delta import Record
from streaming.inbox import Inbox
from streaming.step_result import StepResult


class ItemUpdates:
    """Applies the items of each batch to a catalogue.

    Attributes:
        records: Record that the stream last wrote of each item, by item id. A deleted item has a tombstone.
        versions: Version of the last applied message about each item, by item id.
        texts: `text_key` of the text behind the item's record, by item id. Items without a message have none.

    Args:
        bundle: Bundle whose encoder and codebook encode the items' texts.
        catalogue: Catalogue of the step. Receives the new and the changed items.
        columns: Columns of a decoded item. None if the dataset has no items.
        before: Called with the ids of the items that a batch changes, before they change.
    """

    def __init__(
        self,
        bundle: Bundle,
        catalogue: Catalogue,
        columns: tuple[str, ...] | None,
        before: Callable[[Sequence[str]], None] = lambda ids: None,
    ) -> None:
        self._bundle = bundle
        self._catalogue = catalogue
        self._columns = columns
        self._before = before
        self.records: dict[str, bytes] = {}
        self.versions: dict[str, int] = {}
        self.texts: dict[str, bytes] = {}

    def apply(self, inbox: Inbox, outcome: StepResult) -> list[Record]:
        """Applies item messages and returns one record for each item that changed.

        If a batch names an item several times, the newest message counts.

        Args:
            inbox: Decoded rows of the items' topic, in order.
            outcome: Receives the rejected items and the counts of applied, deleted and stale items.
        """
        items = self._bundle.dataset.items
        if not inbox.messages or items is None or self._columns is None:
            return []
        frame, bad = item_rows(
            inbox.rows(self._columns),
            items,
            self._catalogue.item_types,
            version=self._bundle.canonical,
            fields=fields_of(self._bundle.encoder),
        )
        outcome.bad += inbox.rejected("invalid", bad)
        if not frame.height:
            return []
        newest = self._newest(frame, inbox, outcome)
        deleted = [item_id for item_id, row in newest.items() if row is None]
        kept = [row for row in newest.values() if row is not None]
        changed = self._changed(frame[kept]) if kept else {}
        self._before([*changed, *deleted])
        self._catalogue.put_items(changed)
        self._catalogue.remove_items(deleted)
        for item_id in deleted:
            self.texts.pop(item_id, None)
        payloads = {item_id: record.encode(item) for item_id, item in changed.items()}
        return self._written(payloads | dict.fromkeys(deleted, record.TOMBSTONE))

    def add_bare(self, ids: Sequence[str]) -> list[Record]:
        """Returns records of items that only events name, so that servers rank these items by their id alone."""
        if not ids:
            return []
        zero = np.zeros(self._catalogue.vectors.shape[1], dtype="<f4").tobytes()
        bare = record.ItemRecord(encoder=self._bundle.manifest.encoder or "", vector=zero, codes=[], features={})
        return self._written(dict.fromkeys(ids, record.encode(bare)))

    def _newest(self, frame: pl.DataFrame, inbox: Inbox, outcome: StepResult) -> dict[str, int | None]:
        """Maps each item id to the row of its newest message in the frame. A deleted item has None."""
        newest: dict[str, int | None] = {}
        for row, (number, item_id) in enumerate(zip(frame["message_row"], frame["item_id"], strict=True)):
            if not self._is_newest(item_id, inbox.versions[number], inbox.messages[number].timestamp_ms):
                outcome.stale += 1
            elif inbox.deleted[number]:
                outcome.deleted += 1
                newest[item_id] = None
            else:
                outcome.items += 1
                newest[item_id] = row
        return newest

    def _is_newest(self, item_id: str, version: int | None, timestamp_ms: int) -> bool:
        """Returns whether a message about an item counts. A message without a version always counts, in log order."""
        known = self.versions.get(item_id)
        if version is not None and known is not None and version <= known:
            return False
        self.versions[item_id] = version if version is not None else max(timestamp_ms, known or timestamp_ms)
        return True

    def _changed(self, frame: pl.DataFrame) -> dict[str, record.ItemRecord]:
        """Returns the records of items, by id. Encodes all new texts at once, and no text that its item had before.

        State alone decides which texts are encoded together. So a repeat after a restart gives the same bits, with an
        encoder whose last bits depend on the batch too.
        """
        texts, ids = contents(frame), frame["item_id"].to_list()
        keys = [text_key(text) for text in texts]
        new = [row for row, item_id in enumerate(ids) if self.texts.get(item_id) != keys[row]]
        found = dict(zip((ids[row] for row in new), self._encoded([texts[row] for row in new]), strict=True))
        self.texts |= zip(ids, keys, strict=True)
        features = frame.drop("message_row", "text", FIELDS, "item_id", strict=False).to_dicts()
        return {
            item_id: msgspec.structs.replace(
                found[item_id] if item_id in found else record.decode_item(self.records[item_id]), features=own
            )
            for item_id, own in zip(ids, features, strict=True)
        }

    def _encoded(self, texts: Sequence[str]) -> list[record.ItemRecord]:
        """Returns a record without features for each text."""
        if not texts:
            return []
        encoder, codebook = self._bundle.encoder, self._bundle.codebook
        vectors, codes, _ = self._bundle.encode_items(texts)
        return [
            record.ItemRecord(
                encoder=encoder.id if encoder else "",
                vector=vectors[row].astype("<f4").tobytes(),
                codes=codes[row].tolist(),
                features={},
                codebook=codebook.id if codebook else "",
                terms=pack_terms(text) if encoder else b"",
            )
            for row, text in enumerate(texts)
        ]

    def _written(self, payloads: dict[str, bytes]) -> list[Record]:
        self.records |= payloads
        return [Record(record.ITEM, item_id, payload) for item_id, payload in payloads.items()]
