"""Examples of a block on a device: batches are gathered there, in shapes that do not change from batch to batch.

`Assembler.batch` gathers lists of rows in numpy, and on a GPU the copy of each batch would be the limit. Here every
source (user, item, event) is one matrix of table rows that lies on the device, with as many columns as its longest
lists need. A batch is one gather for each matrix. A place without a value reads row 0 with weight 0, so it changes
nothing. The assembler is the readable twin: both give the table the same bags.

Shape letters: B batch, N entities, M places of a source, K lookups, L history length, F features, E examples.
"""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.device import Device
from models.table.batch import Assembler, Batch, Examples
from models.table.device.columns import Dimensions, looked_up
from models.table.device.source import SourceRows

# Most padded places for each value that there is: past it, one long list would cost all examples memory.
MOST_PADDING = 8.0
_SOURCES = ("user", "item", "event")


@dataclass(frozen=True)
class OnDevice:
    """Columns of E examples on a device; `Examples` is their form on the host.

    Attributes:
        user, item: (E,) int64 numbers of the entities.
        visits: (E,) int64 items in each history; None if no feature reads histories.
        history: (E, L) int64 items, 0 after the last visit; None likewise.
        numeric: (E, n) float32 in the order of the schema.
        labels: (E,) float32, or (E, T) of several tasks, NaN where unknown.
        placement: (E, C) int64 cells of the position path, or None.
    """

    user: Tensor
    item: Tensor
    visits: Tensor | None
    history: Tensor | None
    numeric: Tensor
    labels: Tensor
    placement: Tensor | None


def of_examples(source: Assembler, examples: Examples, device: Device) -> "DeviceBlock":
    """Returns examples and what they read, which the host has looked up."""
    schema = source.schema
    dimensions = Dimensions(schema, source.users, source.items, source.vectors, device)
    own = [(number, one) for number, one in enumerate(schema.features) if one.of == "event"]
    events = SourceRows(
        source.events.size,
        [(number, one, looked_up(source.events, one.column, device)) for number, one in own],
        device.torch,
    )
    placement = source.events.placement
    order = examples.context
    visits, history = _histories(examples, schema.history_length) if dimensions.past else (None, None)
    columns = OnDevice(
        device.put(examples.user.astype(np.int64)),
        device.put(examples.item.astype(np.int64)),
        None if visits is None else device.put(visits),
        None if history is None else device.put(history),
        device.put(source.numeric(examples)),
        device.put(examples.targets),
        None if placement is None else device.put(placement[order]),
    )
    index = None if np.array_equal(order, np.arange(events.rows.shape[0])) else device.put(order.astype(np.int64))
    return DeviceBlock(dimensions, events if index is None else events.taken(index), columns, device)


def _histories(examples: Examples, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the visits of each example, (E,) int64, and their items (E, L) int64, 0 after the last."""
    offsets = examples.history.offsets
    visits = np.diff(offsets)
    items = np.zeros((len(examples), max(length, 1)), dtype=np.int64)
    place = np.arange(offsets[-1] - offsets[0]) - np.repeat(offsets[:-1] - offsets[0], visits)
    items[np.repeat(np.arange(len(examples)), visits), place] = examples.history.values[offsets[0] : offsets[-1]]
    return visits.astype(np.int64), items


class DeviceBlock:
    """Examples and what they read, on a device.

    Args:
        dimensions: Users and items.
        events: Rows of the examples' own columns, example by example.
        columns: Columns of the examples.
        device: Device of the tensors.

    Attributes:
        size: E.
        features: F, the features of the schema.
        padding: Padded places for each value that there is.
    """

    def __init__(self, dimensions: Dimensions, events: SourceRows, columns: OnDevice, device: Device) -> None:
        self._schema = dimensions.schema
        self._device = device
        self.size = len(columns.labels)
        self.features = len(self._schema.features)
        self._sources = {**dimensions.sources, "event": events}
        self._past = dimensions.past
        held = [one for one in (*self._sources.values(), self._past) if one is not None]
        self.padding = sum(one.room for one in held) / max(sum(one.held for one in held), 1)
        self._columns = columns
        self._content = dimensions.content
        self._layout()

    def roomy(self, size: int) -> "DeviceBlock":
        """Returns the block with memory for `size` examples at least, so that it can take over larger blocks."""
        more = max(size - self.size, 0)

        def grown(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else torch.cat([tensor, tensor.new_zeros((more, *tensor.shape[1:]))])

        found = copy(self)
        columns: dict[str, Any] = {one.name: grown(getattr(self._columns, one.name)) for one in fields(OnDevice)}
        found._columns = OnDevice(**columns)
        events = copy(self._sources["event"])
        events.rows, events.counts = (
            torch.cat([events.rows, events.rows.new_zeros((more, len(events)))]),
            grown(events.counts),
        )
        found._sources = {**self._sources, "event": events}
        return found

    def take_over(self, other: "DeviceBlock") -> bool:
        """Replaces the examples by those of another block, at the place of the old ones.

        A captured step keeps reading these places. The other block may be smaller, never larger: rows past its size
        hold old examples.

        Returns:
            False, and nothing is changed, if the other block is larger or of another shape.
        """
        pairs = list(zip(self._own(), other._own(), strict=True))
        fits = other.size <= len(self._columns.labels) and [one.places for one in self._sources.values()] == [
            one.places for one in other._sources.values()
        ]
        if not fits or any((mine is None) != (theirs is None) for mine, theirs in pairs):
            return False
        for mine, theirs in pairs:
            if mine is not None and theirs is not None:
                mine[: len(theirs)].copy_(theirs)
        self.size = other.size
        return True

    def _own(self) -> Iterator[Tensor | None]:
        """Yields the tensors with a row for each example."""
        yield from (getattr(self._columns, one.name) for one in fields(self._columns))
        events = self._sources["event"]
        yield from (events.rows, events.counts)

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """Numeric features (E, n) float32 and labels (E,) float32 of all examples, on the device."""
        return self._columns.numeric, self._columns.labels

    def batch(self, index: Tensor, limits: Tensor | None = None) -> Batch:
        """Returns the batch of examples `index`, (B,) int64 on the device.

        Args:
            index: Numbers of the examples.
            limits: (B, F) uint8 on the device, see `Assembler.batch`.
        """
        size, own = len(index), self._columns
        values, counts = self._gathered(index)
        weights = self._weights(values, counts, index, limits)
        return Batch(
            values=values.reshape(-1),
            lengths=self._lengths.repeat(size),
            scale=self._ones.expand(size, -1),
            numeric=own.numeric[index],
            labels=own.labels[index],
            visits=own.visits[index] if self._schema.attends and own.visits is not None else None,
            content=self._content[own.item[index]] if self._content is not None else None,
            offsets=self.offsets(size),
            weights=None if weights is None else weights.reshape(-1),
            placement=None if own.placement is None else own.placement[index],
        )

    def offsets(self, size: int) -> Tensor:
        """Returns the first place of each bag of B = `size` examples, and the end: (B · K + 1,) int64."""
        width = self._width
        starts = torch.arange(size, device=self._starts.device).unsqueeze(1) * width + self._starts[:-1]
        return torch.cat([starts.reshape(-1), self._starts.new_full((1,), size * width)])

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
                at = index if name == "event" else getattr(self._columns, name)[index]
                found.append(one.rows[at])
                if one.counts is not None:
                    counts[name] = one.counts[at]
        if self._past is not None:
            assert self._columns.history is not None
            items = self._columns.history[index]
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

    def _of_source(self, name: str, one: SourceRows, counts: Tensor | None, limits: Tensor | None, size: int) -> Tensor:
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
        assert self._columns.visits is not None
        length = max(self._schema.history_length, 1)
        visited = torch.arange(length, device=index.device) < self._columns.visits[index].unsqueeze(1)
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
