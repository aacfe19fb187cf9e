"""First jobs of a frame: read slices of the files as typed shards, and count what a profile needs.

Shape letter: R, the rows of a slice.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import polars as pl

from features.dataset.column import texts
from features.dataset.descriptor import Dataset, Items
from features.dataset.files import FileSlice, SourceTable, file_slices, source_files
from features.dataset.tables import (
    load_events,
    load_items,
    load_users,
    remembered_events,
    remembered_users,
    shape_events,
    shape_items,
    shape_users,
)
from features.dataset.vectors.column import vector_counts
from features.durable import write_file
from features.framing.numbers import scatter_ids
from features.jobs.shard import write_parquet
from features.jobs.shuffle import partition_of
from features.jobs.worklist import RowCounts

Counts = TypeVar("Counts", bound=msgspec.Struct)
SLICE_ROWS = 1 << 20
"""Rows of a parquet file that are read at once."""


class EventCounts(msgspec.Struct, frozen=True):
    """Counts of a slice of the events.

    Attributes:
        rows: Rows of the files.
        kept: Rows with a label.
        positives: Rows with label 1.
        labelled: Rows whose label is known; of several tasks, that of the judged task.
        times: Smallest and largest time of the kept rows; empty without rows.
        nulls: Missing values by declared feature.
        lists: Categorical columns that hold lists.
    """

    rows: int
    kept: int
    positives: int
    labelled: int
    times: tuple[int, ...]
    nulls: dict[str, int]
    lists: tuple[str, ...]


class TableCounts(msgspec.Struct, frozen=True):
    """Counts of a slice of items or users.

    Attributes:
        rows: Rows of the slice.
        nulls: Missing values by declared column.
        lengths: Texts by their length in characters.
        unusable: Texts without a usable word; the empty ones count too.
        vectors: Width of the vectors, 0 if there is none, and items without a vector, by name.
    """

    rows: int
    nulls: dict[str, int]
    lengths: dict[int, int]
    unusable: int = 0
    vectors: dict[str, tuple[int, int]] = {}


@dataclass(frozen=True)
class ParseEvents:
    """Task that reads a slice of the events as a shard of labelled events.

    The shard holds the fingerprint of each id. The ids themselves go to a scattered file, each once.

    Args:
        dataset: Descriptor of the events.
        slices: All slices; part k reads slice k.
        named: Kinds of ids that the events have.
        count: D, the partitions of ids.
        ids: Directory of the scattered ids, by kind.
    """

    dataset: Dataset
    slices: tuple[FileSlice, ...]
    named: tuple[str, ...]
    count: int
    ids: Path

    def __call__(self, path: Path) -> RowCounts:
        counted = _counts_path(path)
        if not path.exists():
            table = load_events(self.dataset, self.slices[partition_of(path)])
            frame, _ = remembered_events(*shape_events(table, self.dataset.events), self.dataset)
            features = [*self.dataset.events.row_categories, *self.dataset.events.row_numbers]
            counts = EventCounts(
                rows=table.frame.height,
                kept=frame.height,
                positives=int(frame["label"].sum()),
                labelled=frame.height - frame["label"].null_count(),
                times=(int(frame["time"].min()), int(frame["time"].max())) if frame.height else (),  # type: ignore[arg-type]
                nulls={name: frame[name].null_count() for name in features},
                lists=tuple(name for name in features if frame.schema[name] == pl.List),
            )
            for kind in self.named:
                frame = self._with_fingerprints(frame, kind, path)
            write_file(counted, msgspec.json.encode(counts))
            write_parquet(frame, path, brief=True)
        counts = read_counts(path, EventCounts)
        return RowCounts(counts.rows, counts.kept, counts.rows - counts.kept)

    def _with_fingerprints(self, frame: pl.DataFrame, kind: str, path: Path) -> pl.DataFrame:
        """Scatters the distinct ids of a kind, and replaces the column of ids by their fingerprints."""
        name = f"{kind}_id"
        ids = frame.select(pl.col(name).alias("id"), pl.col("event").alias("at"))
        ids = ids.unique("id", keep="first", maintain_order=True)
        scattered = scatter_ids(ids, self.count, self.ids / kind / "seen" / f"{path.stem}.arrow")
        keyed = frame.select(name).join(scattered, left_on=name, right_on="id", how="left", maintain_order="left")
        return frame.with_columns(keyed["fingerprint"].alias(name))


@dataclass(frozen=True)
class ParseTable:
    """Task that reads a slice of the items or users as a shard of their features.

    Args:
        dataset: Descriptor of the table.
        kind: `item` or `user`.
        slices: All slices; part k reads slice k.
    """

    dataset: Dataset
    kind: str
    slices: tuple[FileSlice | None, ...]

    def __call__(self, path: Path) -> RowCounts:
        if not path.exists():
            frame, table = self._read(self.slices[partition_of(path)])
            source = self.dataset.items if self.kind == "item" else self.dataset.users
            assert source is not None
            nulls = {
                name: frame[name].null_count() for name in (*source.categorical_features, *source.numeric_features)
            }
            lengths: dict[int, int] = {}
            unusable = 0
            vectors: dict[str, tuple[int, int]] = {}
            if isinstance(source, Items):
                kept = (*source.filterable, *source.attributes)
                nulls |= {name: table.column(name).null_count() for name in kept if name not in nulls}
                nulls |= {name: texts(table, name).null_count() for name in source.text if name not in nulls}
                vectors = vector_counts(table, source)
                if self.dataset.has_text:
                    from features.content.terms import without_tokens

                    lengths = dict(Counter(frame["text"].str.len_chars().to_list()))
                    unusable = int(without_tokens(frame["text"]).sum())
            counts = TableCounts(frame.height, nulls, lengths, unusable, vectors)
            write_file(_counts_path(path), msgspec.json.encode(counts))
            write_parquet(frame, path)
        rows = read_counts(path, TableCounts).rows
        return RowCounts(rows, rows, 0)

    def _read(self, only: FileSlice | None) -> tuple[pl.DataFrame, SourceTable]:
        if self.kind == "item":
            table = load_items(self.dataset, only)
            assert table is not None
            assert self.dataset.items is not None
            return shape_items(table, self.dataset.items, unique=False), table
        table = load_users(self.dataset, only)
        assert table is not None
        assert self.dataset.users is not None
        return remembered_users(shape_users(table, self.dataset.users, unique=False), self.dataset), table


def event_slices(dataset: Dataset, rows: int = SLICE_ROWS) -> tuple[FileSlice, ...]:
    """Returns the slices of the events' files. Impressions are joined with outcomes of all files, in one slice."""
    if dataset.events.origin == "impressions":
        return (FileSlice(source_files(dataset.events, dataset.directory, "events")[0]),)
    return tuple(file_slices(dataset.events, dataset.directory, table="events", rows=rows))


def table_slices(dataset: Dataset, kind: str, rows: int = SLICE_ROWS) -> tuple[FileSlice | None, ...]:
    """Returns the slices of a table's files; (None,) stands for all files at once.

    The type of a csv column follows from all its values, so such a table is read whole.
    """
    source = dataset.items if kind == "item" else dataset.users
    if source is None:
        return ()
    if source.kind != "parquet":
        return (None,)
    return tuple(file_slices(source, dataset.directory, table=f"{kind}s", rows=rows))


def read_counts(path: Path, of: type[Counts]) -> Counts:
    """Reads the counts beside a shard."""
    return msgspec.json.decode(_counts_path(path).read_bytes(), type=of)


def _counts_path(path: Path) -> Path:
    return path.with_suffix(".json")
