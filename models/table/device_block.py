"""Examples of a block on a device: batches are gathered there, in shapes that do not change from batch to batch.

`Assembler.batch` gathers lists of rows in numpy, and on a GPU the copy of each batch would be the limit. Here every
source (user, item, event) is one matrix of table rows that lies on the device, with as many columns as its longest
lists need. A batch is one gather for each matrix. A place without a value reads row 0 with weight 0, so it changes
nothing. The assembler is the readable twin: both give the table the same bags.

Shape letters: B batch, N entities, M places of a source, K lookups, L history length, F features, E examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.device import Device
from models.table.batch import Assembler, Batch, Entities, Examples
from models.table.schema import Feature

# Most padded places for each value that there is: past it, one long list would cost all examples memory.
MOST_PADDING = 8.0
_SOURCES = ("user", "item", "event")


@dataclass(frozen=True)
class _Places:
    """Places of one feature in the matrix of its source.

    Attributes:
        feature: Number of the feature in the schema.
        start: First place.
        values: m, the most values of an entity.
        chunks: c. The places are c runs of m.
    """

    feature: int
    start: int
    values: int
    chunks: int


class _Source:
    """Table rows of all entities of one source.

    Attributes:
        rows: (N, M) int64 on the device, 0 where there is no value.
        counts: (N, features of the source) int64, the values of each feature; None if every feature has exactly one.
        places: Places of each feature.
    """

    def __init__(self, entities: Entities, features: Sequence[tuple[int, Feature]], device: Device) -> None:
        index = np.arange(entities.size, dtype=np.int64)
        matrices: list[NDArray[np.int64]] = []
        counts: list[NDArray[np.int64]] = []
        self.places: list[_Places] = []
        start, self.held, self.room = 0, 0, 0
        for number, feature in features:
            rows, lengths = entities.rows(feature.column, index)
            most = max(int(lengths.max(initial=0)), 1)
            matrix = np.zeros((entities.size, feature.chunks, most), dtype=np.int64)
            place = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            matrix[np.repeat(index, lengths), :, place] = rows[:, : feature.chunks]
            matrices.append(matrix.reshape(entities.size, -1))
            counts.append(lengths)
            self.places.append(_Places(number, start, most, feature.chunks))
            start += most * feature.chunks
            self.held, self.room = self.held + len(rows), self.room + entities.size * most
        stacked = np.concatenate(matrices, axis=1) if matrices else np.zeros((entities.size, 0), dtype=np.int64)
        self.rows = device.put(stacked)
        whole = all((length == 1).all() for length in counts)
        self.counts = None if whole or not counts else device.put(np.stack(counts, axis=1))

    def __len__(self) -> int:
        return int(self.rows.shape[1])


class DeviceBlock:
    """Examples and what they read, on a device.

    Args:
        source: Assembler of the examples' entities.
        examples: E examples.
        device: Device of the tensors.

    Attributes:
        size: E.
        features: F, the features of the schema.
        padding: Padded places for each value that there is.
    """

    def __init__(self, source: Assembler, examples: Examples, device: Device) -> None:
        schema = source.schema
        self.size = len(examples)
        self.features = len(schema.features)
        self._schema = schema
        self._device = device
        numbered = list(enumerate(schema.features))
        entities = {"user": source.users, "item": source.items, "event": source.events}
        self._sources = {
            name: _Source(entities[name], [one for one in numbered if one[1].of == name], device) for name in _SOURCES
        }
        past = [(number, feature) for number, feature in numbered if feature.of == "history"]
        self._past = _Source(source.items, past, device) if past else None
        held = [one for one in (*self._sources.values(), self._past) if one is not None]
        self.padding = sum(one.room for one in held) / max(sum(one.held for one in held), 1)
        self._index = {
            name: device.put(column.astype(np.int64))
            for name, column in (("user", examples.user), ("item", examples.item), ("event", examples.context))
        }
        self._visits: Tensor | None = None
        self._history: Tensor | None = None
        if self._past is not None:
            self._visits, self._history = self._histories(examples)
        self._numeric = device.put(source.numeric(examples))
        self._labels = device.put(examples.labels)
        self._content = device.put(source.vectors) if schema.content and source.vectors is not None else None
        placement = source.events.placement
        self._placement = None if placement is None else device.put(placement[examples.context])
        self._layout()

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """Numeric features (E, n) float32 and labels (E,) float32 of all examples, on the device."""
        return self._numeric, self._labels

    def batch(self, index: Tensor, limits: Tensor | None = None) -> Batch:
        """Returns the batch of examples `index`, (B,) int64 on the device.

        Args:
            index: Numbers of the examples.
            limits: (B, F) uint8 on the device, see `Assembler.batch`.
        """
        size = len(index)
        values, counts = self._gathered(index)
        weights = self._weights(values, counts, index, limits)
        return Batch(
            values=values.reshape(-1),
            lengths=self._lengths.repeat(size),
            scale=self._ones.expand(size, -1),
            numeric=self._numeric[index],
            labels=self._labels[index],
            visits=self._visits[index] if self._schema.attends and self._visits is not None else None,
            content=self._content[self._index["item"][index]] if self._content is not None else None,
            offsets=self.offsets(size),
            weights=None if weights is None else weights.reshape(-1),
            placement=None if self._placement is None else self._placement[index],
        )

    def offsets(self, size: int) -> Tensor:
        """Returns the first place of each bag of B = `size` examples, and the end: (B · K + 1,) int64."""
        width = self._width
        starts = torch.arange(size, device=self._starts.device).unsqueeze(1) * width + self._starts[:-1]
        return torch.cat([starts.reshape(-1), self._starts.new_full((1,), size * width)])

    def _histories(self, examples: Examples) -> tuple[Tensor, Tensor]:
        """Returns the visits of each example, (E,) int64, and their items (E, L) int64, 0 after the last."""
        offsets = examples.history.offsets
        visits = np.diff(offsets)
        items = np.zeros((len(examples), max(self._schema.history_length, 1)), dtype=np.int64)
        place = np.arange(offsets[-1] - offsets[0]) - np.repeat(offsets[:-1] - offsets[0], visits)
        items[np.repeat(np.arange(len(examples)), visits), place] = examples.history.values[offsets[0] : offsets[-1]]
        return self._device.put(visits.astype(np.int64)), self._device.put(items)

    def _layout(self) -> None:
        """Orders the places of all sources as the lookups of the schema, each lookup's places side by side."""
        schema, length = self._schema, max(self._schema.history_length, 1)
        widths = [len(one) for one in self._sources.values()]
        begins = {name: sum(widths[:place]) for place, name in enumerate(_SOURCES)}
        past_begin = sum(len(one) for one in self._sources.values())
        spots: dict[int, list[list[int]]] = {}
        for name, one in self._sources.items():
            for own in one.places:
                first = begins[name] + own.start
                spots[own.feature] = [
                    list(range(first + chunk * own.values, first + (chunk + 1) * own.values))
                    for chunk in range(own.chunks)
                ]
        if self._past is not None:
            width = len(self._past)
            for own in self._past.places:
                runs = [
                    [
                        past_begin + slot * width + own.start + chunk * own.values + value
                        for slot in range(length)
                        for value in range(own.values)
                    ]
                    for chunk in range(own.chunks)
                ]
                if schema.features[own.feature].pooling == "attention":
                    each = own.values
                    runs = [run[slot * each : (slot + 1) * each] for slot in range(length) for run in runs]
                spots[own.feature] = runs
        bags = [bag for number in range(len(schema.features)) for bag in spots[number]]
        order = np.array([place for bag in bags for place in bag], dtype=np.int64)
        lengths = np.array([len(bag) for bag in bags], dtype=np.int64)
        self._order = None if np.array_equal(order, np.arange(len(order))) else self._device.put(order)
        self._lengths = self._device.put(lengths)
        self._width = int(lengths.sum())
        self._starts = self._device.put(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        self._ones = self._device.put(np.ones((1, len(lengths)), dtype=np.float32))

    def _gathered(self, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns rows (B, places) in the order of the lookups, and the counts of the sources that have them."""
        found: list[Tensor] = []
        counts: dict[str, Tensor] = {}
        for name, one in self._sources.items():
            if len(one):
                at = self._index[name][index]
                found.append(one.rows[at])
                if one.counts is not None:
                    counts[name] = one.counts[at]
        if self._past is not None:
            assert self._history is not None
            items = self._history[index]
            found.append(self._past.rows[items].reshape(len(index), -1))
            if self._past.counts is not None:
                counts["history"] = self._past.counts[items]
        values = torch.cat(found, dim=1) if len(found) > 1 else found[0]
        return (values if self._order is None else values[:, self._order]), counts

    def _weights(
        self, values: Tensor, counts: dict[str, Tensor], index: Tensor, limits: Tensor | None
    ) -> Tensor | None:
        """Returns the weight of each place, (B, places) float32; None if each place counts once."""
        means = any(feature.pooling != "sum" for feature in self._schema.features)
        if not counts and limits is None and self._past is None and not (means and self._several):
            return None
        parts = [
            self._of_source(name, one, counts.get(name), limits, len(index))
            for name, one in self._sources.items()
            if len(one)
        ]
        if self._past is not None:
            parts.append(self._of_past(counts.get("history"), index))
        weights = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return weights if self._order is None else weights[:, self._order]

    @property
    def _several(self) -> bool:
        return any(own.values > 1 for one in self._sources.values() for own in one.places)

    def _of_source(self, name: str, one: _Source, counts: Tensor | None, limits: Tensor | None, size: int) -> Tensor:
        """Returns the weights of a source's places, (B, M)."""
        found: list[Tensor] = []
        for number, own in enumerate(one.places):
            count = counts[:, number] if counts is not None else self._lengths.new_full((size,), own.values)
            if limits is not None:
                count = torch.minimum(count, limits[:, own.feature].long())
            place = torch.arange(own.values, device=count.device)
            held = (place < count.unsqueeze(1)).float()
            if self._schema.features[own.feature].pooling != "sum":
                held = held / count.clamp(min=1).unsqueeze(1)
            found.append(held.repeat(1, own.chunks))
        return torch.cat(found, dim=1) if len(found) > 1 else found[0]

    def _of_past(self, counts: Tensor | None, index: Tensor) -> Tensor:
        """Returns the weights of the histories' places, (B, L · M): means over all values, or over those of a slot."""
        assert self._past is not None
        assert self._visits is not None
        length = max(self._schema.history_length, 1)
        visited = torch.arange(length, device=index.device) < self._visits[index].unsqueeze(1)
        found: list[Tensor] = []
        for number, own in enumerate(self._past.places):
            count = counts[:, :, number] if counts is not None else torch.ones_like(visited, dtype=torch.int64)
            count = count * visited
            held = (torch.arange(own.values, device=index.device) < count.unsqueeze(2)).float()
            pooling = self._schema.features[own.feature].pooling
            if pooling == "mean":
                held = held / count.sum(dim=1).clamp(min=1)[:, None, None]
            elif pooling == "attention":
                held = held / count.clamp(min=1).unsqueeze(2)
            found.append(held.repeat(1, 1, own.chunks))
        return torch.cat(found, dim=2).reshape(len(index), -1)
