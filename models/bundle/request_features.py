"""Features of a request and its candidates: what the caller sends, and what it makes with user and items.

Server, bundle and the proof of what was served read them here. Shape letter: n, candidates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.config import nearest
from features.dataset.descriptor import Events
from features.errors import DatasetError, EventError
from features.message import context_rows
from features.value.field import distinct_candidates, served_columns, served_fields, split_candidates
from models.bundle.catalogue import Catalogue
from models.bundle.contents import BundleContents
from models.table.batch import Entities


@dataclass(frozen=True)
class SentValues:
    """Values that a ranking reads of its request: as sent, or defaults.

    Attributes:
        context: Values of the events' own columns, by name.
        fields: (n,) values of each field of the candidates, by name.
    """

    context: Mapping[str, Any]
    fields: Mapping[str, Sequence[Any]]

    def of(self, events: Events, chosen: Sequence[int]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
        """Returns the values of the declared fields: those of the request, and those of chosen candidates."""
        context = {name: self.context[name] for name in events.request if self.context.get(name) is not None}
        return context, {name: [values[place] for place in chosen] for name, values in self.fields.items()}


def sent_values(
    bundle: BundleContents, context: Mapping[str, Any], fields: Mapping[str, Sequence[Any]], count: int
) -> SentValues:
    """Checks the values of a request and fills in defaults.

    Args:
        bundle: Bundle whose dataset declares the columns.
        context: Values of the events' own columns, by name.
        fields: (n,) values of the candidates' fields, by name, None where one is absent.
        count: Number of candidates, n.

    Raises:
        EventError: A name is unknown, or a value is not of the declared type.
    """
    events = bundle.dataset.events
    # A request may name its surface, which goes into the impression. The scores do not depend on it.
    placed = events.placement.categorical if events.placement is not None else ()
    columns = (*events.categorical, *events.numeric, *events.read, *placed)
    known = [name for name in columns if name not in events.candidate]
    unknown = [name for name in context if name not in known]
    if unknown:
        valid = ", ".join(known) or "none"
        near = f"the nearest is {nearest(unknown[0], known)!r}; " if known else ""
        raise EventError(f"context: unknown column {unknown[0]!r}; {near}the dataset's event columns are: {valid}")
    try:
        own = served_fields(events.request, context, known=known)
        context = {name: value for name, value in context.items() if name not in placed}
        return SentValues({**context, **own}, served_columns(events.candidate, fields, count))
    except ValueError as error:
        raise EventError(str(error)) from error


def sent_candidates(
    bundle: BundleContents, context: Mapping[str, Any], candidates: Sequence[str | Mapping[str, Any]]
) -> tuple[list[str], SentValues]:
    """Returns the ids of the distinct candidates, and the values of a request; see `sent_values`.

    Args:
        bundle: Bundle whose dataset declares the columns.
        context: Values of the events' own columns, by name.
        candidates: Ids, or mappings with `item_id` and fields. The first place of a repeated candidate counts.

    Raises:
        EventError: A candidate has no id, a name is unknown, or a value is not of the declared type.
    """
    try:
        ids, fields = distinct_candidates(*split_candidates(candidates))
    except ValueError as error:
        raise EventError(str(error)) from error
    return ids, sent_values(bundle, context, fields, len(ids))


def request_events(
    bundle: BundleContents,
    catalogue: Catalogue,
    sent: SentValues,
    user: str,
    items: NDArray[np.int64],
    *,
    at_us: int | None = None,
) -> Entities:
    """Returns the lookups of the features of a request; see `request_frame`."""
    frame = request_frame(bundle, catalogue, sent, user, items, at_us=at_us)
    return Entities(bundle.schema, "event", frame, catalogue.admission)


def request_frame(
    bundle: BundleContents,
    catalogue: Catalogue,
    sent: SentValues,
    user: str,
    items: NDArray[np.int64],
    *,
    at_us: int | None = None,
) -> pl.DataFrame:
    """Returns the features of a request: one row, or a row for each candidate if a feature differs between them.

    The catalogue must not change during the call.

    Args:
        bundle: Bundle whose dataset declares the features.
        catalogue: Users and items.
        sent: Values of the request.
        user: Id of the user. An unknown user has no values.
        items: (n,) numbers of the candidates.
        at_us: Time that expressions over the events' clock read, microseconds since 1970. None: the time is null.

    Raises:
        EventError: A value does not fit its column.
    """
    events = bundle.dataset.events
    if not (events.categorical_features or events.numeric_features):
        return pl.DataFrame({"nothing": [0]})
    count = len(items) if events.varying else 1
    try:
        frame = context_rows(
            sent.context, events, version=bundle.canonical, at_us=at_us, candidates=sent.fields, count=count
        )
    except (DatasetError, pl.exceptions.PolarsError, TypeError, ValueError, OverflowError) as error:
        raise EventError(f"context: {error}") from error
    number = catalogue.user_numbers.get(user, -1)
    return catalogue.crossed(frame, np.full(count, number, dtype=np.int64), items) if events.crossed else frame
