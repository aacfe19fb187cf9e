"""Choices of a frame that jobs build, and the parts that they leave.

Shape letter: P partitions.
"""

from dataclasses import dataclass, field
from pathlib import Path

from features.aggregate.aggregator import Aggregator
from features.aggregate.plan import NOTHING, AggregatePlan
from features.dataset.descriptor import Dataset
from features.dataset.profile import Labels
from features.dataset.split import Split
from features.frame_blocks import BLOCK_ROWS
from features.framing.by_user import NumberCounts, PartCounts
from features.framing.dimension import Dimension
from features.framing.parse import SLICE_ROWS, EventCounts, TableCounts, event_slices
from features.storage.file import size_bytes

PARTITION_ROWS = 1 << 21
"""Events of a partition, about."""
_ROW_BYTES = 32


@dataclass(frozen=True)
class JobSizes:
    """Sizes that bound the memory of a worker.

    Attributes:
        slice_rows: Rows of a parquet file that are read at once.
        partition_rows: Events of a partition, about.
        block_rows: Examples of a block, about.
    """

    slice_rows: int = SLICE_ROWS
    partition_rows: int = PARTITION_ROWS
    block_rows: int = BLOCK_ROWS


@dataclass(frozen=True)
class FrameChoices:
    """Choices of a frame.

    Attributes:
        dataset: Descriptor of the tables.
        split: Usually the dataset's own split.
        history_length: L, the number of positive items an example sees.
        plan: Aggregates of the examples.
        optional: Names of the aggregates that are left out if they have too many keys.
        base_rate: Rate that a rate starts with; None for the share of positives in training.
    """

    dataset: Dataset
    split: Split
    history_length: int
    plan: AggregatePlan = NOTHING
    optional: frozenset[str] = frozenset()
    base_rate: float | None = None


@dataclass
class Built:
    """Parts of a frame beside its examples.

    Attributes:
        shards: Shards of the labelled events.
        users, items: Rows of users and items.
        plan: Aggregates of the examples, with their base rate.
        aggregator: State of the aggregates before the test part.
        large: Names of the aggregates that were left out.
        events: Counts of each slice of the events.
        tables: Counts of each slice of `item` and `user`.
        strange: Counts of each shard's ids that are in no table.
        distinct: Number of users and items that events have.
        parts: Counts of each partition.
    """

    shards: tuple[Path, ...]
    users: Dimension
    items: Dimension
    plan: AggregatePlan
    aggregator: Aggregator
    large: list[str]
    events: list[EventCounts]
    tables: dict[str, list[TableCounts]]
    strange: list[NumberCounts] = field(default_factory=list)
    distinct: dict[str, int] = field(default_factory=dict)
    parts: list[PartCounts] = field(default_factory=list)

    @property
    def labels(self) -> Labels:
        """The events by label."""
        return labels_of(self.events)


def is_large(dataset: Dataset, partition_rows: int = PARTITION_ROWS) -> bool:
    """Returns whether the events are more than two partitions, by the footers or the sizes of their files."""
    slices = event_slices(dataset)
    rows = sum(one.rows if one.rows is not None else size_bytes(one.file) // _ROW_BYTES for one in slices)
    return rows > 2 * partition_rows


def labels_of(counts: list[EventCounts]) -> Labels:
    """Returns the events by label."""
    positives, kept, rows, labelled = (
        sum(getattr(one, name) for one in counts) for name in ("positives", "kept", "rows", "labelled")
    )
    return Labels(positives, labelled - positives, rows - kept)
