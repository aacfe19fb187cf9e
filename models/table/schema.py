"""The schema of a ranker's input: its features, the lookups of each, and the shape of the one table they share.

A schema is part of the bundle. Together with the hash contract it alone decides which rows a value reads.
"""

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

import msgspec

from features.aggregate.plan import NOTHING, AggregatePlan
from features.errors import BundleError
from features.hashing import HashSpec
from models.table.admission import MOST_SIGHTINGS
from models.table.placement import PlacementColumn

Source = Literal["user", "item", "event", "history", "aggregate"]
SEMANTIC_ID = "semantic_id"


@dataclass(frozen=True)
class Feature:
    """Categorical feature.

    Attributes:
        name: Name, unique in a schema.
        of: Source of the column; `history` reads the column of the items in the user's history.
        column: Name of the column that holds the feature's values.
        salt: Salt of the hash contract; features with equal salts share rows.
        chunks: Salted lookups, concatenated: a wider feature has more chunks.
        pooling: Pooling of several values of one example. `attention` is for the history: each of its L items is looked
            up alone, and the network weighs them by the candidate.
        vocabulary: If given, each of these values has rows of its own after the hashed ones, and any other value reads
            none.
    """

    name: str
    of: Source
    column: str
    salt: str
    chunks: int = 1
    pooling: Literal["sum", "mean", "attention"] = "mean"
    vocabulary: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """True if its values share no rows."""
        return bool(self.vocabulary)


@dataclass(frozen=True)
class Numeric:
    """Numeric feature: `(sign(x) * log1p(|x|) - mean) / std` within ±10; a missing value becomes 0, the mean.

    The columns of aggregates are logarithms already: x stands in place of `sign(x) * log1p(|x|)`.
    """

    name: str
    of: Source
    column: str
    mean: float = 0.0
    std: float = 1.0


@dataclass(frozen=True)
class Schema:
    """Input of the ranker. K lookups in all, R rows, D dim, L history length.

    Attributes:
        rows: R: the hashed rows, then those of the exact features.
        admission: Sightings after which a hashed value reads rows; 0 admits every value.
        content: Width of the item's content vector that the network reads beside the table; 0 for none.
        aggregates: Aggregates that the numeric features of `aggregate` read.
        placement: Columns of the position path. They are no features: the network does not read them.
        reserved: Last rows of the table, which no feature of this schema reads. The towers of retrieval have them.
    """

    features: tuple[Feature, ...]
    numeric: tuple[Numeric, ...]
    rows: int
    dim: int
    history_length: int
    admission: int = 0
    content: int = 0
    aggregates: AggregatePlan = NOTHING
    placement: tuple[PlacementColumn, ...] = ()
    reserved: int = 0

    def __post_init__(self) -> None:
        names = [feature.name for feature in self.features] + [numeric.name for numeric in self.numeric]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise BundleError(f"features: the names {twice} occur twice; rename a column")
        if self.dim % 4 or self.dim < 4:
            raise BundleError(f"dim: expected a multiple of 4 (fbgemm's tables), got {self.dim}")
        if not 0 <= self.admission <= MOST_SIGHTINGS:
            raise BundleError(f"admission: expected 0 to {MOST_SIGHTINGS} sightings, got {self.admission}")
        self._check_salts()
        self._check_attention()
        if self.hashed_rows < (1 if any(not feature.exact for feature in self.features) else 0):
            exact, row = self.rows - self.reserved - self.hashed_rows, self.dim * 4
            raise BundleError(
                f"budget: {(self.rows - self.reserved) * row:,} bytes hold {self.rows - self.reserved:,} rows, but the "
                "exact features alone need "
                f"{exact:,}; give at least {(exact + 1) * row:,} bytes, or hash a feature"
            )

    @property
    def served(self) -> "Schema":
        """The schema of a server, which has no place when it ranks: the position path then adds its constant."""
        return replace(self, placement=()) if self.placement else self

    def _check_salts(self) -> None:
        salts: dict[tuple[str, str], str] = {}
        vocabularies: dict[str, tuple[str, ...]] = {}
        for feature in self.features:
            of = ("item" if feature.of == "history" else feature.of, feature.column)
            if salts.setdefault(of, feature.salt) != feature.salt:
                raise BundleError(
                    f"features: {feature.name} reads {of[0]} column {of[1]!r} under salt {feature.salt!r}, "
                    f"another feature under {salts[of]!r}; give them one salt, since a column is looked up once"
                )
            if vocabularies.setdefault(feature.salt, feature.vocabulary) != feature.vocabulary:
                raise BundleError(
                    f"features: {feature.name} shares the salt {feature.salt!r} with a feature of another vocabulary; "
                    "make both exact with the same values, or both hashed"
                )

    def _check_attention(self) -> None:
        columns = {feature.column: feature.chunks for feature in self.of("item")}
        for feature in self.features:
            if feature.pooling == "attention" and (
                feature.of != "history" or columns.get(feature.column) != feature.chunks
            ):
                raise BundleError(
                    f"features: {feature.name} is pooled by attention, which takes a feature of the history and one of "
                    "the item that reads the same column with as many chunks"
                )

    def exact_region(self, salt: str) -> tuple[int, int]:
        """Returns first row and stride of an exact feature: value v's chunk j reads row `start + v · stride + j`."""
        start = self.hashed_rows
        for other, (feature, chunks) in self._exact().items():
            if other == salt:
                return start, chunks
            start += len(feature.vocabulary) * chunks
        raise KeyError(salt)

    @cached_property
    def hashed_rows(self) -> int:
        """Rows that hashed values share; they come first."""
        exact = sum(len(feature.vocabulary) * chunks for feature, chunks in self._exact().values())
        return self.rows - self.reserved - exact

    def _exact(self) -> dict[str, tuple[Feature, int]]:
        """Maps each salt to an exact feature and the most chunks with which the salt is read."""
        found: dict[str, tuple[Feature, int]] = {}
        for feature in self.features:
            if feature.exact:
                chunks = max(feature.chunks, found[feature.salt][1] if feature.salt in found else 1)
                found[feature.salt] = (feature, chunks)
        return found

    @property
    def hash_spec(self) -> HashSpec:
        return HashSpec(rows=max(self.hashed_rows, 1))

    def slots(self, feature: Feature) -> int:
        """Returns the bags of one example and chunk: L under attention, else 1."""
        return self.history_length if feature.pooling == "attention" else 1

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The K lookups in order: `name#chunk`, under attention `name#chunk@slot`, the slots outermost."""
        found: list[str] = []
        for feature in self.features:
            for slot in range(self.slots(feature)):
                place = f"@{slot}" if feature.pooling == "attention" else ""
                found += [f"{feature.name}#{chunk}{place}" for chunk in range(feature.chunks)]
        return tuple(found)

    @property
    def attends(self) -> bool:
        """True if a history is weighed by the candidate."""
        return any(feature.pooling == "attention" for feature in self.features)

    def of(self, source: Source) -> list[Feature]:
        """Returns the features read from one source, in schema order."""
        return [feature for feature in self.features if feature.of == source]

    def columns(self, source: Literal["user", "item", "event"]) -> dict[str, Feature]:
        """Maps each column to the feature with the most chunks that reads it, whose lookups serve all the others."""
        read = self.of(source) + (self.of("history") if source == "item" else [])
        widest: dict[str, Feature] = {}
        for feature in read:
            if feature.column not in widest or feature.chunks > widest[feature.column].chunks:
                widest[feature.column] = feature
        return widest

    def with_reserved(self, rows: int) -> "Schema":
        """Returns the schema of a table with this many rows more at its end, which no feature reads."""
        return replace(self, rows=self.rows - self.reserved + rows, reserved=rows)

    def to_json(self) -> dict[str, Any]:
        """Returns the schema as JSON has it. Without reserved rows it is what earlier releases wrote."""
        found = asdict(self)
        if not self.reserved:
            del found["reserved"]
        return found

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Schema":
        """Reads a schema that `to_json` wrote; raises BundleError on any other content."""
        try:
            return msgspec.convert(data, Schema)
        except msgspec.ValidationError as error:
            raise BundleError(f"schema: {error}") from error
