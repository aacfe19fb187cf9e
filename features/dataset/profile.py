"""Profiles a dataset for `tessera check`, and refuses a dataset that cannot be trained on.

A dataset that passes can be trained on: its files are readable, its columns convert, its ids are unique, it has
positives and negatives, and no part of the split is empty. The readers refuse faulty values; this module refuses faults
of the whole.
"""

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from features.dataset.column import texts
from features.dataset.descriptor import Dataset, Items, Users
from features.dataset.files import SourceTable
from features.dataset.split import PARTS, assign_split
from features.dataset.tables import DatasetTables
from features.dataset.vectors.column import vector_counts
from features.errors import DatasetError
from features.value.known_ids import few_known


@dataclass(frozen=True)
class TableProfile:
    """Counts of one table: rows, nulls of the declared columns, distinct values of the categorical ones."""

    rows: int
    nulls: dict[str, int]
    cardinalities: dict[str, int]


@dataclass(frozen=True)
class TextProfile:
    """Lengths, in characters, of the text that the encoder reads for an item.

    Attributes:
        empty: Items without text.
        unusable: Items with text but without a word or character that the default encoder can use.
    """

    p50: int
    p90: int
    max: int
    empty: int
    unusable: int = 0


@dataclass(frozen=True)
class VectorProfile:
    """Vectors that the team brings.

    Attributes:
        space: Id of their space.
        dim: Width; 0 if no item has a vector.
        missing: Items without a vector.
    """

    space: str
    dim: int
    missing: int


@dataclass(frozen=True)
class ValueRange:
    """ISO-8601 times of the first and the last labelled event."""

    first: str
    last: str


@dataclass(frozen=True)
class Labels:
    """Events by label; `dropped` events match neither rule. Of several tasks, events by the judged task's label."""

    positives: int
    negatives: int
    dropped: int


@dataclass(frozen=True)
class Novelty:
    """Events of the test part whose user, or whose item, has no event in the training part.

    Attributes:
        events: Events of the test part with such a user or item.
        share: Share of `events` in the test part, 0 to 1.
        distinct: Distinct users or items of these events.
    """

    events: int
    share: float
    distinct: int


@dataclass(frozen=True)
class Profile:
    """Counts, ranges and warnings of a dataset.

    Attributes:
        name: Name of the dataset.
        tables: Items and users if declared, and events. The rows of events count the dropped ones too.
        users: Distinct users among the labelled events, None without a user column.
        items: distinct items among the labelled events, None without an item column.
        span: when the labelled events were, None without a clock.
        labels: how the events divide by label.
        text: None if items have no text.
        unknown_items: Labelled events whose item is not in the catalogue.
        unknown_users: Labelled events whose user is not in the users table.
        split: Labelled events per part.
        unseen_users: Test events by users unseen in training; None without a user column.
        unseen_items: Test events on items unseen in training; None without an item column.
        warnings: Sentences about data that can be used but are probably not meant.
        vectors: Vectors of the items by name.
    """

    name: str
    tables: dict[str, TableProfile]
    users: int | None
    items: int | None
    span: ValueRange | None
    labels: Labels
    text: TextProfile | None
    unknown_items: int
    unknown_users: int
    split: dict[str, int] = field(default_factory=dict)
    unseen_users: Novelty | None = None
    unseen_items: Novelty | None = None
    warnings: tuple[str, ...] = ()
    vectors: dict[str, VectorProfile] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns the profile as plain dicts, numbers and strings."""
        return asdict(self)


def profile(dataset: Dataset, read: DatasetTables | None = None) -> Profile:
    """Reads a whole dataset and returns its profile.

    Args:
        dataset: Dataset to profile.
        read: Its tables, of which those that were read already are not read again.

    Raises:
        DatasetError: The dataset cannot be used; names file, table, column, the row if known, and the remedy.
    """
    read = DatasetTables(dataset) if read is None else read
    tables: dict[str, TableProfile] = {}
    text = None
    vectors: dict[str, VectorProfile] = {}
    catalogue, items, users = read.raw_items, read.items, read.users
    if catalogue is not None and items is not None and dataset.items is not None:
        tables["items"] = _table_profile(items, dataset.items, catalogue)
        text = _text_profile(items["text"], str(catalogue.files[0])) if dataset.has_text else None
        counts = vector_counts(catalogue, dataset.items)
        vectors = {name: VectorProfile(dataset.items.spaces[name], *own) for name, own in counts.items()}
    if dataset.users is not None and users is not None:
        tables["users"] = _table_profile(users, dataset.users)
    raw = read.raw_events
    events, dropped = read.events
    features = [*dataset.events.row_categories, *dataset.events.row_numbers]
    tables["events"] = TableProfile(
        rows=raw.frame.height,
        nulls=_nulls(events.select(features)),
        cardinalities={name: _cardinality(events[name]) for name in dataset.events.row_categories},
    )
    positives = int(events["label"].sum())
    labels = Labels(positives, events.height - events["label"].null_count() - positives, dropped)
    refuse_one_sided(dataset, labels, str(raw.files[0]))
    parts = assign_split(events, dataset.split)
    return Profile(
        name=dataset.name,
        tables=tables,
        users=_distinct(events, "user_id"),
        items=_distinct(events, "item_id"),
        span=ValueRange(iso_time(events["time"].min()), iso_time(events["time"].max()))
        if dataset.events.time
        else None,
        labels=labels,
        text=text,
        unknown_items=_unknown(events, items, "item_id"),
        unknown_users=_unknown(events, users, "user_id"),
        split=_split_sizes(dataset, parts),
        unseen_users=_novelty(events, parts, "user_id"),
        unseen_items=_novelty(events, parts, "item_id"),
        warnings=(*few_known(events, items, "item"), *few_known(events, users, "user")),
        vectors=vectors,
    )


def render(profile: Profile, console: Console) -> None:
    """Prints a profile as a few compact tables."""
    console.print(_overview(profile))
    console.print()
    console.print(_events_grid(profile))
    features = _grid(f"{profile.name}: columns", "table", "column", ">distinct", ">null", ">null %")
    for table, found in profile.tables.items():
        for column in dict.fromkeys([*found.cardinalities, *found.nulls]):
            nulls = found.nulls.get(column, 0)
            distinct = f"{found.cardinalities[column]:,}" if column in found.cardinalities else ""
            share = f"{100 * nulls / found.rows:.1f}" if nulls else ""
            if nulls or distinct:
                features.add_row(table, column, distinct, f"{nulls:,}" if nulls else "", share)
    if features.row_count:
        console.print()
        console.print(features)
    for warning in profile.warnings:
        console.print()
        console.print(Text(f"warning: {warning}", "yellow"), soft_wrap=True)


def _overview(profile: Profile) -> Grid:
    grid = _grid(f"{profile.name}: tables", "table", ">rows", "")
    text = profile.text
    for name, found in profile.tables.items():
        note = ""
        if name == "items" and text:
            note = f"text p50 {text.p50:,}, p90 {text.p90:,}, max {text.max:,} characters; {text.empty:,} empty"
            note += f"; {text.unusable:,} without a usable word" if text.unusable else ""
        elif name == "events":
            counts = [(profile.users, "users"), (profile.items, "items")]
            notes = [f"{count:,} {what}" for count, what in counts if count is not None]
            notes += [f"{profile.span.first} to {profile.span.last}"] if profile.span else []
            note = ", ".join(notes)
        grid.add_row(name, f"{found.rows:,}", note)
        if name == "items":
            for own, vectors in profile.vectors.items():
                described = f"space {vectors.space}, {vectors.dim:,} wide, {vectors.missing:,} items without"
                grid.add_row(f"items, vectors {own}", f"{found.rows - vectors.missing:,}", described)
    return grid


def _events_grid(profile: Profile) -> Grid:
    labels = profile.labels
    total = labels.positives + labels.negatives
    grid = _grid(f"{profile.name}: labelled events", "", ">events", ">%")

    def add(name: str, count: int) -> None:
        grid.add_row(name, f"{count:,}", f"{100 * count / total:.1f}")

    add("positive", labels.positives)
    if labels.negatives:
        add("negative", labels.negatives)
    for part in PARTS:
        add(part, profile.split[part])
    for kind, unseen in (("user", profile.unseen_users), ("item", profile.unseen_items)):
        if unseen is not None:
            share = f"{100 * unseen.share:.1f} of test"
            grid.add_row(f"test, {kind} unseen in training", f"{unseen.events:,}", share)
    if profile.unknown_items:
        add("item not in the catalogue", profile.unknown_items)
    if profile.unknown_users:
        add("user not in the users table", profile.unknown_users)
    if labels.dropped:
        grid.add_row("dropped: neither label", f"{labels.dropped:,}", "")
    return grid


def _grid(title: str, *columns: str) -> Grid:
    """Returns an empty table; a column whose name starts with > is right-aligned."""
    grid = Grid(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        grid.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return grid


def _table_profile(frame: pl.DataFrame, source: Items | Users, raw: SourceTable | None = None) -> TableProfile:
    """Counts nulls: of features as used, of text and filterable columns before they are joined or passed on."""
    nulls = _nulls(frame.select([*source.categorical_features, *source.numeric_features]))
    if isinstance(source, Items) and raw is not None:
        kept = (*source.filterable, *source.attributes)
        nulls |= {name: raw.column(name).null_count() for name in kept if name not in nulls}
        nulls |= {name: texts(raw, name).null_count() for name in source.text if name not in nulls}
    cardinalities = {name: _cardinality(frame[name]) for name in source.categorical_features}
    return TableProfile(frame.height, nulls, cardinalities)


def _nulls(frame: pl.DataFrame) -> dict[str, int]:
    return {column.name: column.null_count() for column in frame}


def _cardinality(values: pl.Series) -> int:
    flat = values.explode() if isinstance(values.dtype, pl.List) else values
    return flat.drop_nulls().n_unique()


def _text_profile(text: pl.Series, file: str) -> TextProfile:
    from features.content.terms import without_tokens

    lengths = text.str.len_chars()
    unusable = without_tokens(text)
    if unusable.all():
        raise DatasetError(
            f"{file}: [items] text: the {len(text)} texts hold no usable word; name other columns as text, or none"
        )
    p50, p90 = (int(lengths.quantile(q, "nearest") or 0) for q in (0.5, 0.9))
    return TextProfile(
        p50, p90, int(str(lengths.max())), int((lengths == 0).sum()), int((unusable & (lengths > 0)).sum())
    )


def _distinct(events: pl.DataFrame, name: str) -> int | None:
    return events[name].n_unique() if name in events.columns else None


def _unknown(events: pl.DataFrame, known: pl.DataFrame | None, name: str) -> int:
    return 0 if known is None else events.join(known, on=name, how="anti").height


def iso_time(time_us: Any) -> str:
    """Returns microseconds since 1970 as an ISO-8601 text."""
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=time_us)).isoformat()


def refuse_one_sided(dataset: Dataset, labels: Labels, file: str) -> None:
    """Raises DatasetError if the events have no positive label, or no negative one where it is needed."""
    label = dataset.events.label
    where = f"{file}: [events] column '{label.column}'"
    if not labels.positives:
        rule = f"no row matches positive = '{label.positive}'" if label.positive else "no row holds 1"
        raise DatasetError(f"{where}: there are no positive labels, {rule}; fix the rule, or name another column")
    if not labels.negatives and not label.implicit:
        rule = (
            "every row matches positive" if label.negative is None else f"no row matches negative = '{label.negative}'"
        )
        rule = rule if label.positive else "no row holds 0"
        raise DatasetError(f"{where}: there are no negative labels, {rule}; fix the rule, or set implicit = true")


def _novelty(events: pl.DataFrame, parts: pl.Series, name: str) -> Novelty | None:
    if name not in events.columns:
        return None
    ids = events[name]
    test = ids.filter(parts == "test")
    unseen = test.filter(~test.is_in(ids.filter(parts == "train").unique().implode()))
    return Novelty(len(unseen), len(unseen) / len(test), unseen.n_unique())


def _split_sizes(dataset: Dataset, parts: pl.Series) -> dict[str, int]:
    sizes = {part: int((parts == part).sum()) for part in PARTS}
    for part, size in sizes.items():
        if size == 0:
            remedy = {
                "time": "too many events share one time, or there are too few; change the fractions, or use order",
                "leave-one-out": "no user has enough events; use random or order",
            }.get(dataset.split.by, "there are too few events; change the fractions")
            found = f"by = '{dataset.split.by}' leaves no event for {part}, of {len(parts)}"
            raise DatasetError(f"{dataset.source}: [split] {found}: {remedy}")
    return sizes
