"""Checks `[events] from = "impressions"`, and gives its columns their names."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from features.config import nearest

COLUMNS = ("user", "item", "time", "position", "surface", "impression")
"""Columns of a row, beside a column for each kind of outcome."""
READ_US = "_read_us"
"""Column of the time that expressions over the clock read when the server ranked, microseconds since 1970."""
SURFACE = "surface"
"""Column, and field of a request's context, that names the place where items were shown."""
_FEATURES = (SURFACE,)


class ShownEvents(Protocol):
    """Fields of the events that the checks read; see `features.dataset.descriptor.Events`."""

    @property
    def path(self) -> str: ...
    @property
    def outcomes_path(self) -> str | None: ...
    @property
    def outcomes(self) -> tuple[str, ...]: ...
    @property
    def kind(self) -> str: ...
    @property
    def label(self) -> Any: ...
    @property
    def label_columns(self) -> tuple[str, ...]: ...
    @property
    def user(self) -> str | None: ...
    @property
    def item(self) -> str | None: ...
    @property
    def time(self) -> Any: ...
    @property
    def categorical(self) -> Mapping[str, Any]: ...
    @property
    def numeric(self) -> Sequence[str]: ...
    @property
    def read(self) -> Mapping[str, Any]: ...
    @property
    def fields(self) -> Mapping[str, Any]: ...


def shown_defaults(data: Any) -> Any:
    """Returns the table with `from` under its own name, and with the columns that rows of impressions have."""
    if not isinstance(data, Mapping):
        return data
    found = {("origin" if key == "from" else key): value for key, value in data.items()}
    if found.get("origin") != "impressions":
        return found
    outcomes = found.get("outcomes") or ["click"]
    first = outcomes[0] if isinstance(outcomes, (list, tuple)) else "click"
    columns = {"user": "user", "item": "item", "time": {"column": "time", "unit": "ms"}}
    label = {} if found.get("labels") else {"label": {"column": first}}
    return columns | label | found


def check_shown(events: ShownEvents) -> None:
    """Checks the fields that only impressions have, and the columns that features name.

    Raises:
        ValueError: A field is missing or cannot be used; names it.
    """
    if events.outcomes_path is None:
        raise ValueError('from = "impressions" needs outcomes_path = "...", the files of the topic outcomes')
    if events.kind == "csv":
        raise ValueError('from = "impressions" reads jsonl or parquet; name such files')
    taken = [kind for kind in events.outcomes if kind in (*COLUMNS, READ_US, "_event_id")]
    if taken:
        raise ValueError(f"outcomes: {taken[0]!r} is the name of a column that each row has; rename the kind")
    if len(set(events.outcomes)) < len(events.outcomes):
        raise ValueError("outcomes names a kind more than once; keep one of them")
    if (events.user, events.item, events.time.column if events.time else None) != ("user", "item", "time"):
        raise ValueError('from = "impressions" has the columns user, item and time; remove these fields')
    if events.label.implicit:
        raise ValueError('from = "impressions" has shown negatives, so implicit = true does not apply; remove it')
    for column in events.label_columns:
        if column not in events.outcomes:
            raise ValueError(
                f"label.column: {column!r} is no kind of outcome; the nearest is "
                f"{nearest(column, events.outcomes)!r} (outcomes = {list(events.outcomes)})"
            )
    taken_names = {*COLUMNS, *events.outcomes, READ_US, "_event_id"} - {*_FEATURES}
    for name in (*events.categorical, *events.numeric, *events.read):
        if name not in _FEATURES and (name not in events.fields or name in taken_names):
            why = "an outcome is a label and no feature" if name in events.outcomes else "rows of impressions lack it"
            if name == "position":
                why = (
                    "a server has no position when it ranks, so the position of training would leak into the scores; "
                    'write it as position = "position" under [events.placement]'
                )
            raise ValueError(
                f"column {name!r} cannot be a feature: {why}; there are {', '.join(_FEATURES)} and the fields of "
                "[events.request] and [events.candidate]"
            )
