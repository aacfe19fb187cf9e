"""What a ranker reads: its features, how many lookups each gets, and the shape of the one table they share.

A schema is part of the bundle; with the hash contract it decides, alone, which rows a value reads.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import msgspec

from features.error import BundleError
from features.hashing import HashSpec

Source = Literal["user", "item", "event", "history"]
SEMANTIC_ID = "semantic_id"


@dataclass(frozen=True)
class Feature:
    """A categorical feature.

    Attributes:
        name: unique in a schema.
        of: whose column it is; `history` reads the column of the items in the user's history.
        column: name of the column that holds its values.
        salt: of the hash contract; features with equal salts share rows.
        chunks: salted lookups, concatenated: a wider feature has more chunks.
        pooling: of several values of one example.
    """

    name: str
    of: Source
    column: str
    salt: str
    chunks: int = 1
    pooling: Literal["sum", "mean"] = "mean"


@dataclass(frozen=True)
class Numeric:
    """A numeric feature: `(sign(x) * log1p(|x|) - mean) / std` within ±10; a missing value becomes 0, the mean."""

    name: str
    of: Source
    column: str
    mean: float = 0.0
    std: float = 1.0


@dataclass(frozen=True)
class Schema:
    """The ranker's input. K lookups in all, R rows, D dim, L history length."""

    features: tuple[Feature, ...]
    numeric: tuple[Numeric, ...]
    rows: int
    dim: int
    history_length: int

    def __post_init__(self) -> None:
        names = [feature.name for feature in self.features] + [numeric.name for numeric in self.numeric]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise BundleError(f"features: the names {twice} stand twice; rename a column")
        salts: dict[tuple[str, str], str] = {}
        for feature in self.features:
            of = ("item" if feature.of == "history" else feature.of, feature.column)
            if salts.setdefault(of, feature.salt) != feature.salt:
                raise BundleError(
                    f"features: {feature.name} reads {of[0]} column {of[1]!r} under salt {feature.salt!r}, "
                    f"another feature under {salts[of]!r}; give them one salt, since a column is looked up once"
                )
        if self.dim % 4 or self.dim < 4:
            raise BundleError(f"dim: expected a multiple of 4 (fbgemm's tables), got {self.dim}")

    @property
    def hash_spec(self) -> HashSpec:
        return HashSpec(rows=self.rows)

    @property
    def keys(self) -> tuple[str, ...]:
        """The K lookups in order: `name#chunk`."""
        return tuple(f"{feature.name}#{chunk}" for feature in self.features for chunk in range(feature.chunks))

    @property
    def width(self) -> int:
        """Width of the network's input: K · D and one for each numeric feature."""
        return len(self.keys) * self.dim + len(self.numeric)

    def of(self, source: Source) -> list[Feature]:
        """The features read from one source, in schema order."""
        return [feature for feature in self.features if feature.of == source]

    def columns(self, source: Literal["user", "item", "event"]) -> dict[str, Feature]:
        """By column, the feature with the most chunks that reads it: what must be looked up once per value."""
        read = self.of(source) + (self.of("history") if source == "item" else [])
        widest: dict[str, Feature] = {}
        for feature in read:
            if feature.column not in widest or feature.chunks > widest[feature.column].chunks:
                widest[feature.column] = feature
        return widest

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Schema":
        """Reads what `to_json` wrote; raises BundleError on anything else."""
        try:
            return msgspec.convert(data, Schema)
        except msgspec.ValidationError as error:
            raise BundleError(f"schema: {error}") from error
