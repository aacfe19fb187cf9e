"""A table of the descriptor: its files, their format, and the columns that are features."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast, get_args

from pydantic import Field, PrivateAttr, field_validator, model_validator

from features.config import Config, refuse_repeats
from features.value.expression import Expression, Input

Format = Literal["parquet", "csv", "jsonl"]
"""Formats of files."""
TableFormat = Literal["delta", "iceberg", "sql"]
"""Tables that are no files; a snapshot of a table is copied as a parquet file before it is read."""
TABLES: tuple[str, ...] = get_args(TableFormat)


class Categorical(Config):
    """Options of a categorical column.

    Attributes:
        split: Separator between values; it makes the column multi-valued.
    """

    split: str | None = Field(None, min_length=1)


@dataclass(frozen=True)
class TableCopy:
    """Copy of a table.

    Attributes:
        file: Parquet file, which is removed when the process that made it ends.
        name: The table's path and snapshot, such as `lake/events@12`, for the lineage.
    """

    file: Path
    name: str


class TableSource(Config):
    """Location and format of a table's files, and the columns that are features.

    Attributes:
        path: Files, relative to the descriptor or as an address such as `s3://bucket/events/*.parquet`; globs are
            allowed. Of a table: the directory of a Delta table, the metadata file of an Iceberg table or its name in
            `catalog`, or a database.
        format: `parquet`, `csv` or `jsonl`; by default the ending of the path says it. csv and jsonl may be gzipped.
            `delta`, `iceberg` and `sql` are tables, which need the extra `lake`.
        as_of: Snapshot of a Delta or Iceberg table: its version or id, or the time at which it was the newest. By
            default the newest when the descriptor is read.
        query: SQL whose rows are the table.
        catalog: Name of the catalog of an Iceberg table, which pyiceberg's configuration describes.
        separator: Separator of a csv. A separator of more than one character switches quoting off.
        quote: Character that encloses fields of a csv; "" for none. By default `"` encloses a field only if another
            `"` ends it.
        escape: Character of a csv that makes the next character literal; "" for none. By default a
            backslash escapes if all rows fit then.
        header: True if the first row of a csv names its fields.
        encoding: Encoding of a csv.
        columns: Names of a csv's fields, in the file's order; they replace the names of a header row.
        categorical: Columns that are categorical features: a list of names, or a table of names with their options.
        numeric: Columns that are numeric features.
        read: Columns that only expressions of `[features]` read, each with its type: `text`, `number` or `time`.
    """

    reserved: ClassVar[tuple[str, ...]] = ()
    entity: ClassVar[str] = ""

    path: str = Field(min_length=1)
    format: Format | TableFormat | None = None
    as_of: int | datetime | None = None
    query: str | None = Field(None, min_length=1)
    catalog: str | None = Field(None, min_length=1)
    separator: str = Field(",", min_length=1)
    quote: str | None = Field(None, max_length=1)
    escape: str | None = Field(None, max_length=1)
    header: bool = True
    encoding: Literal["utf-8", "latin-1"] = "utf-8"
    columns: tuple[str, ...] | None = None
    categorical: dict[str, Categorical] = Field(default_factory=dict)
    numeric: tuple[str, ...] = ()
    read: dict[str, Input] = Field(default_factory=dict)
    _derived: tuple[Expression, ...] = PrivateAttr(())
    _crossed: tuple[Expression, ...] = PrivateAttr(())
    _crossing: tuple[str, ...] = PrivateAttr(())
    _copy: TableCopy | None = PrivateAttr(None)

    @field_validator("categorical", mode="before")
    @classmethod
    def _names_or_table(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            refuse_repeats("categorical", value)
            return {name: {} for name in value}
        return value

    @field_validator("quote", "escape")
    @classmethod
    def _one_byte(cls, value: str | None) -> str | None:
        if value and (not value.isascii() or not value.isprintable()):
            raise ValueError(f"must be a printable ASCII character or empty, got {value!r}")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "csv" and self.quote and self.quote in (self.separator, self.escape):
            raise ValueError(f"quote = {self.quote!r} is separator or escape too; choose another character")
        if self.kind == "csv" and not self.header and self.columns is None:
            raise ValueError("header = false needs columns = [...], the fields' names in the file's order")
        if self.kind != "csv" and self.columns is not None:
            raise ValueError(f"columns names the fields of a csv, but the format is {self.kind}; remove columns")
        self._check_table()
        refuse_repeats("columns", self.columns or ())
        refuse_repeats("categorical, numeric and read", [*self.categorical, *self.numeric, *self.read])
        for name in [*self.categorical, *self.numeric]:
            if name in self.reserved:
                raise ValueError(
                    f"column '{name}' cannot be a feature: the name is taken by a column every dataset has "
                    f"({', '.join(self.reserved)}); remove it, or rename it in the files"
                )
        return self

    def _check_table(self) -> None:
        keys = {"as_of": ("delta", "iceberg"), "query": ("sql",), "catalog": ("iceberg",)}
        for key, formats in keys.items():
            if getattr(self, key) is not None and self.format not in formats:
                raise ValueError(f"{key} belongs to a table of format {' or '.join(formats)}; remove it, or set format")
        if self.format == "sql" and self.query is None:
            raise ValueError('format = "sql" needs query = "SELECT …", whose rows are the table')

    @property
    def is_table(self) -> bool:
        """True if the source is a table whose snapshot is copied before it is read."""
        return self.format in TABLES

    @property
    def copy_of_table(self) -> TableCopy | None:
        """The copy of a table, once there is one."""
        return self._copy

    def pin(self, copy: TableCopy) -> None:
        """Sets the copy that all readers of this table share; the first of them calls this."""
        self._copy = copy

    @property
    def derived(self) -> tuple[Expression, ...]:
        """Features of this table that expressions make; the descriptor declares them in `[features]`."""
        return self._derived

    @property
    def crossed(self) -> tuple[Expression, ...]:
        """Features of this table together with others; only the events have them."""
        return self._crossed

    @property
    def crossing(self) -> tuple[str, ...]:
        """Columns of this table that features of several tables read."""
        return self._crossing

    @property
    def categorical_features(self) -> tuple[str, ...]:
        """Names of the categorical features: the declared columns, then those that expressions make."""
        return self._features("categorical", self.categorical, crossed=True)

    @property
    def numeric_features(self) -> tuple[str, ...]:
        """Names of the numeric features: the declared columns, then those that expressions make."""
        return self._features("numeric", self.numeric, crossed=True)

    @property
    def row_categories(self) -> tuple[str, ...]:
        """Names of the categorical features that a row has by itself, without those of several tables."""
        return self._features("categorical", self.categorical, crossed=False)

    @property
    def row_numbers(self) -> tuple[str, ...]:
        """Names of the numeric features that a row has by itself, without those of several tables."""
        return self._features("numeric", self.numeric, crossed=False)

    def _features(self, kind: str, declared: Iterable[str], *, crossed: bool) -> tuple[str, ...]:
        made = (*self._derived, *(self._crossed if crossed else ()))
        return (*declared, *(one.name for one in made if one.kind == kind))

    def readable(self) -> dict[str, Input]:
        """Returns the type of each column that an expression may read, by name."""
        found: dict[str, Input] = dict.fromkeys(self.categorical, "text")
        return found | dict.fromkeys(self.numeric, "number") | self.read

    def derive(self, expressions: Iterable[Expression], crossing: Iterable[str]) -> None:
        """Sets the features that expressions make; the descriptor calls this once, when it is read.

        Args:
            expressions: Features of this table.
            crossing: Columns of this table that features of several tables read.

        Raises:
            ValueError: A feature has the name of another column.
        """
        own = tuple(expressions)
        for one in own:
            if one.name in (*self.categorical, *self.numeric, *self.read, *self.reserved):
                raise ValueError(f"{one.name}: the name is taken by a column of its table; rename the feature")
        self._derived = tuple(one for one in own if not one.crosses)
        self._crossed = tuple(one for one in own if one.crosses)
        self._crossing = tuple(dict.fromkeys(crossing))

    @property
    def kind(self) -> Format:
        """Format of the files: as declared, or from the ending of their name. The copy of a table is parquet."""
        if self.is_table:
            return "parquet"
        if self.format is not None:
            return cast(Format, self.format)
        name = self.path.lower()
        if name.endswith(".parquet"):
            return "parquet"
        if name.endswith((".csv", ".csv.gz")):
            return "csv"
        if name.endswith((".jsonl", ".jsonl.gz")):
            return "jsonl"
        raise ValueError(
            f'the ending of path \'{self.path}\' does not say its format; add format = "csv", "jsonl" or "parquet"'
        )
