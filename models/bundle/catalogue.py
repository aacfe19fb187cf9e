"""Users and items of a bundle in memory, by id. The catalogue grows as the stream adds users and items.

The stream and the server apply the same records to equal catalogues, so the same ids read the same rows in both.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.errors import BundleError
from features.value.crossed import crossed_features, crossing_columns
from models.bundle.contents import RANKER_VECTOR, BundleContents
from models.bundle.inputs import CrossingInputs
from models.bundle.record import ItemRecord, entity_frame
from models.ranker.loading import content_vectors
from models.table.batch import Entities
from models.table.column_rows import Growable
from models.table.schema import SEMANTIC_ID

_NOBODY = "\0forgotten "
_NOT_FEATURES = ("content_vector", RANKER_VECTOR, "semantic_codes", "train_positives", "listed")


class Catalogue:
    """Users and items of one bundle by number, with the values that the ranker and retrieval read.

    Attributes:
        admission: Admission of values. Shared with `users` and `items`.
        users, items: Values and rows of the entities, by number.
        user_ids, item_ids: Ids by number.
        user_numbers, item_numbers: Numbers by id.
        popularity: (N,) int64 positive events in training, of the published items.
        deleted: Ids of deleted items.

    Args:
        bundle: Bundle with the published entities.
    """

    def __init__(self, bundle: BundleContents) -> None:
        self._models = {"encoder": bundle.manifest.encoder or "", "codebook": bundle.manifest.codebook or ""}
        self._tokenizer = bundle.tokenizer
        users, items = bundle.users, bundle.items
        self._user_columns = users.drop("listed").clear()
        self._item_columns = items.drop(name for name in _NOT_FEATURES if name in items.columns).clear()
        read = {"item_id", *bundle.schema.columns("item")}
        read |= {numeric.column for numeric in bundle.schema.numeric if numeric.of == "item"}
        self._crossed, self._canonical = bundle.dataset.events.crossed, bundle.canonical
        kept = {entity: crossing_columns(self._crossed, entity) for entity in ("user", "item")}
        self._inputs = {"user": CrossingInputs(users, kept["user"]), "item": CrossingInputs(items, kept["item"])}
        read |= set(kept["item"])
        self._read_columns = self._item_columns.select(name for name in self._item_columns.columns if name in read)
        self.admission = bundle.admission()
        self.users = Entities(bundle.schema, "user", users, self.admission)
        self.items = Entities(bundle.schema, "item", items, self.admission)
        self.user_numbers = {name: number for number, name in enumerate(users["user_id"].to_list())}
        self.user_ids: list[str] = users["user_id"].to_list()
        self.item_ids: list[str] = items["item_id"].to_list()
        self.item_numbers = {name: number for number, name in enumerate(self.item_ids)}
        self.popularity = items["train_positives"].to_numpy().astype(np.int64)
        self._vectors = Growable(content_vectors(items))
        # Without a map the ranker and the correction read the vectors themselves.
        mapped = bundle.map is not None and (bundle.schema.content > 0 or bundle.correction is not None)
        self._mapped = Growable(content_vectors(items, RANKER_VECTOR)) if mapped else None
        self._for_ranker = bundle.for_ranker
        self.deleted: set[str] = set()

    @property
    def item_types(self) -> dict[str, pl.DataType]:
        """Types of the item columns that item messages may set, by column."""
        return dict(self._item_columns.schema)

    @property
    def vectors(self) -> NDArray[np.float32]:
        """Content vectors by item number, (N, D) float32, zero for items without content. D is 0 without an encoder."""
        return self._vectors.array

    @property
    def ranker_vectors(self) -> NDArray[np.float32]:
        """Content vectors by item number as the ranker reads them, (N, E) float32: `vectors`, or those behind a map."""
        return self._vectors.array if self._mapped is None else self._mapped.array

    def crossed(self, events: pl.DataFrame, users: NDArray[np.int64], items: NDArray[np.int64]) -> pl.DataFrame:
        """Returns events with their features of several tables, in place of the columns that only these read.

        Args:
            events: (E, …) features of events, with the kept columns of `features.value.crossed`.
            users, items: (E,) numbers of each event's user and item. A negative user is unknown.
        """
        if not self._crossed:
            return events
        own = crossing_columns(self._crossed, "event")
        unknown = bool(len(users)) and users[0] < 0
        of_user = self._inputs["user"].nothing(len(users)) if unknown else self._inputs["user"].take(users)
        inputs = [*events.select(own), *of_user, *self._inputs["item"].take(items)]
        made = crossed_features(self._crossed, inputs, version=self._canonical)
        return events.drop(own).with_columns(made)

    def user_frame(self, ids: Sequence[str]) -> pl.DataFrame:
        """Returns a frame of users for whom only the id is known."""
        return entity_frame([{"user_id": name} for name in ids], self._user_columns)

    def number_users(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Returns the numbers (N,) of users. Adds new users with their id alone."""
        with suppress(KeyError):
            return _numbers(self.user_numbers, ids)
        new = [name for name in dict.fromkeys(ids) if name not in self.user_numbers]
        if new:
            self._append("user", self.user_frame(new))
            self.user_ids.extend(new)
            self.user_numbers.update({name: len(self.user_numbers) + index for index, name in enumerate(new)})
        return _numbers(self.user_numbers, ids)

    def forget_users(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Removes users with all their values. Returns their numbers (N,), which no user has from now on.

        A user with one of these ids is a new user from now on. Unknown ids are ignored.
        """
        known = [name for name in dict.fromkeys(ids) if name in self.user_numbers]
        numbers = np.array([self.user_numbers.pop(name) for name in known], dtype=np.int64)
        for number in numbers.tolist():
            # A placeholder keeps the numbers of all other users. No message can name it.
            self.user_ids[number] = placeholder = f"{_NOBODY}{number}"
            self.user_numbers[placeholder] = number
        if known:
            self._replace("user", numbers, entity_frame([{} for _ in known], self._user_columns))
        return numbers

    def number_items(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Returns the numbers (N,) of items. Adds new items with their id alone."""
        with suppress(KeyError):
            return _numbers(self.item_numbers, ids)
        new = [name for name in dict.fromkeys(ids) if name not in self.item_numbers]
        if new:
            self._add_items(new, [{} for _ in new], np.zeros((len(new), self.vectors.shape[1]), dtype=np.float32))
        return _numbers(self.item_numbers, ids)

    def add_default_item(self) -> int:
        """Adds an item without an id and without values, which reads no row. Returns its number."""
        number = len(self.item_ids)
        self._append("item", entity_frame([{}], self._read_columns))
        self._extend(np.zeros((1, self.vectors.shape[1]), dtype=np.float32))
        self.item_ids.append("")
        return number

    def put_items(self, records: Mapping[str, ItemRecord]) -> None:
        """Adds new items, and replaces the features and vectors of known items.

        Args:
            records: Records by item id.

        Raises:
            BundleError: A vector or a Semantic ID is of another encoder or codebook than the bundle's.
        """
        self.check_models(records)
        known = [name for name in records if name in self.item_numbers]
        new = [name for name in records if name not in self.item_numbers]
        self.deleted.difference_update(known)
        if known:
            chosen = [records[name] for name in known]
            self._replace_items(known, [self.features_of(record) for record in chosen], self._content(chosen))
        if new:
            chosen = [records[name] for name in new]
            self._add_items(new, [self.features_of(record) for record in chosen], self._content(chosen))

    def check_models(self, records: Mapping[str, ItemRecord]) -> None:
        """Checks that items were encoded by the bundle's encoder and codebook.

        Raises:
            BundleError: A vector or a Semantic ID is of another encoder or codebook than the bundle's.
        """
        for name, record in records.items():
            # An item that occurs only in events has no Semantic ID.
            models = {"encoder": record.encoder} | ({"codebook": record.codebook} if record.codes else {})
            for kind, actual in models.items():
                expected = self._models[kind]
                if actual != expected:
                    raise BundleError(
                        f"item {name!r} was encoded by {kind} {actual or 'none'}, the bundle's items by "
                        f"{expected or 'none'}; the two must not be mixed: replay the store for this bundle"
                    )

    def features_of(self, record: ItemRecord) -> dict[str, Any]:
        """Returns the values of an item's columns, with the tokens of its Semantic ID."""
        if not record.codes or self._tokenizer is None:
            return record.features
        return record.features | {SEMANTIC_ID: self._tokenizer.tokens(np.array([record.codes], dtype=np.uint16))[0]}

    def remove_items(self, ids: Sequence[str]) -> None:
        """Removes all values of items except their ids, which histories still name.

        The items are no longer candidates. An unknown id is added as a deleted item.
        """
        self.number_items(ids)
        self.deleted.update(ids)
        distinct = list(dict.fromkeys(ids))
        if distinct:
            zero = np.zeros((len(distinct), self.vectors.shape[1]), dtype=np.float32)
            self._replace_items(distinct, [{} for _ in distinct], zero)

    def _replace_items(self, ids: Sequence[str], features: list[dict[str, Any]], vectors: NDArray[np.float32]) -> None:
        index = np.array([self.item_numbers[name] for name in ids], dtype=np.int64)
        self._replace("item", index, self._frame(ids, features))
        self.vectors[index] = vectors
        if self._mapped is not None:
            self._mapped.array[index] = self._for_ranker(vectors)

    def _add_items(self, ids: Sequence[str], features: list[dict[str, Any]], vectors: NDArray[np.float32]) -> None:
        self._append("item", self._frame(ids, features))
        self._extend(vectors)
        self.item_numbers.update({name: len(self.item_ids) + index for index, name in enumerate(ids)})
        self.item_ids.extend(ids)

    def _append(self, entity: Literal["user", "item"], frame: pl.DataFrame) -> None:
        (self.users if entity == "user" else self.items).append(frame)
        self._inputs[entity].append(frame)

    def _replace(self, entity: Literal["user", "item"], index: NDArray[np.int64], frame: pl.DataFrame) -> None:
        (self.users if entity == "user" else self.items).replace(index, frame)
        self._inputs[entity].replace(index, frame)

    def _extend(self, vectors: NDArray[np.float32]) -> None:
        self._vectors.extend(vectors)
        if self._mapped is not None:
            self._mapped.extend(self._for_ranker(vectors))

    def _frame(self, ids: Sequence[str], features: list[dict[str, Any]]) -> pl.DataFrame:
        rows = [row | {"item_id": name} for name, row in zip(ids, features, strict=True)]
        return entity_frame(rows, self._read_columns)

    def _content(self, records: Sequence[ItemRecord]) -> NDArray[np.float32]:
        width = self.vectors.shape[1]
        return np.array([record.content() for record in records], dtype=np.float32).reshape(len(records), width)


def _numbers(known: Mapping[str, int], ids: Sequence[str]) -> NDArray[np.int64]:
    """Returns the numbers (N,) of ids. Raises KeyError at an unknown id."""
    return np.fromiter(map(known.__getitem__, ids), dtype=np.int64, count=len(ids))
