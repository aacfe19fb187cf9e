"""A table of the descriptor: its files, their format, and the columns that are features."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from features.config import Config, refuse_repeats
from features.value.expression import Expression, Input

Format = Literal["parquet", "csv", "jsonl"]


class Categorical(Config):
    """Options of a categorical column.

    Attributes:
        split: Separator between values; it makes the column multi-valued.
    """

    split: str | None = Field(None, min_length=1)


class TableSource(Config):
    """Location and format of a table's files, and the columns that are features.

    Attributes:
        path: Files, relative to the descriptor or as an address such as `s3://bucket/events/*.parquet`; globs are
            allowed.
        format: `parquet`, `csv` or `jsonl`; by default the ending of the path says it. csv and jsonl may be gzipped.
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

    path: str = Field(min_length=1)
    format: Format | None = None
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
        refuse_repeats("columns", self.columns or ())
        refuse_repeats("categorical, numeric and read", [*self.categorical, *self.numeric, *self.read])
        for name in [*self.categorical, *self.numeric]:
            if name in self.reserved:
                raise ValueError(
                    f"column '{name}' cannot be a feature: the name is taken by a column every dataset has "
                    f"({', '.join(self.reserved)}); remove it, or rename it in the files"
                )
        return self

    @property
    def derived(self) -> tuple[Expression, ...]:
        """Features of this table that expressions make; the descriptor declares them in `[features]`."""
        return self._derived

    @property
    def categorical_features(self) -> tuple[str, ...]:
        """Names of the categorical features: the declared columns, then those that expressions make."""
        return (*self.categorical, *(one.name for one in self._derived if one.kind == "categorical"))

    @property
    def numeric_features(self) -> tuple[str, ...]:
        """Names of the numeric features: the declared columns, then those that expressions make."""
        return (*self.numeric, *(one.name for one in self._derived if one.kind == "numeric"))

    def readable(self) -> dict[str, Input]:
        """Returns the type of each column that an expression may read, by name."""
        found: dict[str, Input] = dict.fromkeys(self.categorical, "text")
        return found | dict.fromkeys(self.numeric, "number") | self.read

    def derive(self, expressions: tuple[Expression, ...]) -> None:
        """Sets the features that expressions make; the descriptor calls this once, when it is read.

        Raises:
            ValueError: A feature has the name of another column.
        """
        for one in expressions:
            if one.name in (*self.categorical, *self.numeric, *self.read, *self.reserved):
                raise ValueError(f"{one.name}: the name is taken by a column of its table; rename the feature")
        self._derived = expressions

    @property
    def kind(self) -> Format:
        """Format of the files: as declared, or from the ending of their name."""
        if self.format is not None:
            return self.format
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
