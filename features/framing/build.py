"""Builds a training frame of any size, job after job, on any engine.

    parse → ids → numbers, split → by user: history, negatives → by time: aggregates → blocks

Each job reads shards and writes shards, so that a worker holds a slice of the files or a partition. The number of
partitions follows from the number of events. `features.frame.build_frame` is the same frame of data that fit in memory.

Shape letters: P partitions, T ranges of time.
"""

import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import msgspec

from features.aggregate.aggregator import Aggregator
from features.aggregate.plan import NOTHING, AggregatePlan, with_base_rate
from features.dataset.profile import refuse_one_sided
from features.dataset.split import PARTS
from features.errors import DatasetError
from features.frame_blocks import DIRECTORY
from features.framing.aggregates import AggregateGroup, SortByTime, SpreadColumns, collect, in_order
from features.framing.blocks import WriteBlock
from features.framing.by_user import ByUser, NumberCounts, NumberEvents, PartCounts, counts_path, file_name
from features.framing.choices import Built, FrameChoices, JobSizes, labels_of
from features.framing.dimension import Dimension
from features.framing.numbers import DistinctIds, ListedIds, Numbers, number_ids
from features.framing.parse import (
    EventCounts,
    ParseEvents,
    ParseTable,
    TableCounts,
    event_slices,
    read_counts,
    table_slices,
)
from features.framing.split import SplitRule, Times, split_rule
from features.jobs.engine import Engine
from features.jobs.shuffle import partition_path
from features.jobs.worklist import RowCounts

Progress = Callable[[int, int], None]
Task = Callable[[Path], RowCounts]


class FrameJobs:
    """The jobs of one frame.

    Args:
        choices: Choices of the frame.
        place: Directory of the jobs' files on a file system that all workers see; jobs go on with what is there.
        out: Directory of the frame; gets the examples in blocks.
        engine: Engine of the jobs; by default this process.
        sizes: Sizes of slices, partitions and blocks; by default those that suit one machine.
        progress: Called with (jobs done, jobs) in hundredths.
    """

    def __init__(
        self,
        choices: FrameChoices,
        place: Path,
        out: Path,
        *,
        engine: Engine | None = None,
        sizes: JobSizes | None = None,
        progress: Progress = lambda done, total: None,
    ) -> None:
        self._choices, self._place, self._out = choices, place.absolute(), out.absolute()
        self._engine, self._sizes, self._progress = engine, sizes or JobSizes(), progress
        self._done = 0
        events = choices.dataset.events
        self._named = tuple(kind for kind in ("user", "item") if getattr(events, kind) is not None)

    def run(self) -> Built:
        """Runs all jobs.

        Raises:
            TesseraError: A file or value cannot be used, or the engine cannot run a job.
        """
        shards, events = self._parse_events()
        tables = {kind: self._parse_table(kind) for kind in ("user", "item")}
        starts = _before(count.rows for count in events)
        dimensions, distinct = {}, {}
        for kind in ("user", "item"):
            dimensions[kind], distinct[kind] = self._dimension(kind, tables[kind], shards, starts)
        built = Built(
            shards=shards,
            users=dimensions["user"],
            items=dimensions["item"],
            plan=self._choices.plan,
            aggregator=Aggregator(NOTHING),
            large=[],
            events=events,
            tables={kind: [read_counts(path, TableCounts) for path in paths] for kind, paths in tables.items()},
            distinct=distinct,
        )
        self._examples(built, starts)
        return built

    def clear(self) -> None:
        """Removes the jobs' files."""
        shutil.rmtree(self._place)

    def _parse_events(self) -> tuple[tuple[Path, ...], list[EventCounts]]:
        slices = event_slices(self._choices.dataset, self._sizes.slice_rows)
        for kind in self._named:
            self._directory(f"ids/{kind}/seen")
        parse = ParseEvents(self._choices.dataset, slices, self._named, self._id_partitions, self._place / "ids")
        shards = self._run("parse", parse, len(slices), "events")
        counts = [read_counts(path, EventCounts) for path in shards]
        refuse_one_sided(self._choices.dataset, labels_of(counts), str(slices[0].file))
        return shards, counts

    def _parse_table(self, kind: str) -> tuple[Path, ...]:
        slices = table_slices(self._choices.dataset, kind, self._sizes.slice_rows)
        return self._run(f"parse {kind}s", ParseTable(self._choices.dataset, kind, slices), len(slices), f"{kind}s")

    def _dimension(
        self, kind: str, listed: Sequence[Path], shards: Sequence[Path], starts: tuple[int, ...]
    ) -> tuple[Dimension, int]:
        """Numbers the ids of a kind; returns the rows and the number of ids that events have."""
        if kind not in self._named:
            return Dimension(kind, tuple(listed), sum(_table_rows(listed)), None), 0
        rows, total = _before(_table_rows(listed)), sum(_table_rows(listed))
        out = self._directory(f"ids/{kind}/listed")
        self._tasks(f"listed {kind}s", ListedIds(f"{kind}_id", rows, self._id_partitions, out), listed, out)
        seen = self._place / "ids" / kind / "seen"
        ids = DistinctIds(_scattered(out, listed), _scattered(seen, shards), starts)
        distinct = self._run(f"{kind} ids", ids, self._id_partitions, f"ids/{kind}/distinct")
        directory = self._place / "numbers" / kind
        known = number_ids(distinct, total, directory)
        return Dimension(kind, tuple(listed), total, Numbers(directory)), known

    def _examples(self, built: Built, starts: tuple[int, ...]) -> None:
        shards, kept, places = built.shards, self._kept, _before(count.kept for count in built.events)
        count = max(1, -(-kept // self._sizes.partition_rows))
        found = [time for counts in built.events for time in counts.times]
        times = Times([path for path, c in zip(shards, built.events, strict=True) if c.kept], min(found), max(found))
        rule = split_rule(self._choices.split, kept, times, self._directory("split") / "places")
        numbered = self._number(built, starts, places, rule, count)
        aggregated = bool(self._choices.plan.columns)
        borders = _borders(times, kept, count) if aggregated else None
        blocks = self._blocks(rule, kept)
        out = self._directory("examples")
        by_user = ByUser(
            dataset=self._choices.dataset.model_copy(update={"split": self._choices.split}),
            named=self._named,
            numbered=numbered,
            length=self._choices.history_length,
            items=built.items.height,
            blocks=blocks,
            borders=borders,
            out=out,
            rows=self._sizes.partition_rows,
            read=(*self._choices.plan.value_columns, *_counted(self._choices.plan)),
        )
        for name in ("blocks", "timed"):
            self._directory(f"examples/{name}")
        paths = self._run("by user", by_user, count, "examples")
        counted = (counts_path(out / "blocks" / path.name).read_bytes() for path in paths)
        built.parts = [msgspec.json.decode(content, type=PartCounts) for content in counted]
        files = [
            file_name(path.stem, number)
            for path, counts in zip(paths, built.parts, strict=True)
            for number in range(counts.files)
        ]
        by_block = tuple(out / "blocks" / name for name in files)
        self._refuse_empty(built.parts)
        spread: tuple[Path, ...] = ()
        if borders is not None:
            timed = tuple(out / "timed" / name for name in files)
            spread = self._aggregate(timed, len(borders) + 1, built, blocks)
        (self._out / DIRECTORY).mkdir(parents=True, exist_ok=True)
        crossed = self._choices.dataset.events.crossed
        dimensions = {"user": built.users, "item": built.items}
        write = WriteBlock(by_block, spread, built.plan.columns, crossed, dimensions, blocks, self._out)
        self._run("blocks", write, sum(blocks.values()), "written")

    def _number(
        self,
        built: Built,
        starts: tuple[int, ...],
        places: tuple[int, ...],
        rule: SplitRule,
        count: int,
    ) -> tuple[Path, ...]:
        out = self._directory("numbered")
        dimensions = {"user": built.users, "item": built.items}
        task = NumberEvents(
            numbers={kind: one.numbers for kind, one in dimensions.items() if one.numbers is not None},
            listed={kind: one.listed for kind, one in dimensions.items()},
            starts=starts,
            places=places,
            rule=rule,
            lists=tuple(dict.fromkeys(name for counts in built.events for name in counts.lists)),
            count=count,
            out=out,
        )
        self._tasks("number", task, built.shards, out)
        numbered = _scattered(out, built.shards)
        built.strange = [msgspec.json.decode(counts_path(path).read_bytes(), type=NumberCounts) for path in numbered]
        return numbered

    def _aggregate(
        self, timed: tuple[Path, ...], ranges: int, built: Built, blocks: dict[str, int]
    ) -> tuple[Path, ...]:
        by_time = self._run("by time", SortByTime(timed), ranges, "by-time")
        directory = by_time[0].parent
        rate = self._choices.base_rate
        if rate is None:
            labelled, positives = (
                sum(getattr(one, name)["train"] for one in built.parts) for name in ("labelled", "positives")
            )
            rate = positives / labelled
        plan = with_base_rate(self._choices.plan, rate)
        dimensions = {"user": built.users, "item": built.items}
        task = AggregateGroup(plan, dimensions, directory, ranges, in_order(directory, ranges), self._choices.optional)
        out = self._directory("aggregates")
        groups = tuple(partition_path(out, number).with_suffix("") for number in range(len(plan.groups)))
        self._tasks("aggregates", task, groups, out)
        built.plan, built.aggregator, built.large = collect(plan, out)
        kept = tuple(path for path, group in zip(groups, plan.groups, strict=True) if _is_kept(group.by, built.plan))
        spread = self._directory("aggregated")
        self._tasks("join", SpreadColumns(built.plan, kept, directory, blocks, spread), by_time, spread)
        return _scattered(spread, by_time)

    @cached_property
    def _id_partitions(self) -> int:
        """D, a power of two that follows from the number of slices."""
        dataset, rows = self._choices.dataset, self._sizes.slice_rows
        tables = (table_slices(dataset, kind, rows) for kind in ("user", "item"))
        most = max(len(event_slices(dataset, rows)), *map(len, tables))
        return 1 << (-(-most * rows // self._sizes.partition_rows) - 1).bit_length()

    @cached_property
    def _kept(self) -> int:
        """Number of labelled events."""
        shards = sorted((self._place / "events").glob("part-*.parquet"))
        return sum(read_counts(path, EventCounts).kept for path in shards)

    def _blocks(self, rule: SplitRule, kept: int) -> dict[str, int]:
        """Returns the number of blocks of each part; a user without enough items may make them a little smaller."""
        split, label = self._choices.split, self._choices.dataset.events.label
        each = 1 + label.negatives if label.implicit else 1
        shares = {"train": split.train, "validation": split.validation, "test": 1 - split.train - split.validation}
        if rule.by == "leave-one-out":
            shares = {"train": 1.0, "validation": 1 / 3, "test": 1 / 3}
        return {
            part: max(1, -(-round(kept * each * share) // self._sizes.block_rows)) for part, share in shares.items()
        }

    def _refuse_empty(self, counts: Sequence[PartCounts]) -> None:
        for part in PARTS:
            if not any(one.examples[part] for one in counts):
                raise DatasetError(
                    f"{self._choices.dataset.source}: [split] by = {self._choices.split.by!r} leaves the part {part!r} "
                    "empty; change its fractions, or by"
                )

    def _run(self, label: str, task: Task, count: int, name: str) -> tuple[Path, ...]:
        """Does a task for each of `count` partitions in a directory of their own; returns their paths."""
        out = self._directory(name)
        paths = [partition_path(out, number) for number in range(count)]
        self._tasks(label, task, paths, out)
        return tuple(paths)

    def _tasks(self, label: str, task: Task, paths: Sequence[Path], out: Path) -> None:
        from features.jobs.beam import run_tasks

        if not paths:
            return

        def progress(done: int, total: int) -> None:
            self._progress(self._done * 100 + 100 * done // max(total, 1), 100 * self._total)

        run_tasks(task, paths, out, label=f"frame: {label}", engine=self._engine, progress=progress)
        self._done += 1
        self._progress(self._done * 100, 100 * self._total)

    @property
    def _total(self) -> int:
        """Jobs of the frame, about."""
        tables = sum(1 for source in (self._choices.dataset.items, self._choices.dataset.users) if source is not None)
        return 4 + 2 * tables + len(self._named) + (3 if self._choices.plan.columns else 0)

    def _directory(self, name: str) -> Path:
        found = self._place / name
        found.mkdir(parents=True, exist_ok=True)
        return found


def _table_rows(shards: Sequence[Path]) -> list[int]:
    return [read_counts(path, TableCounts).rows for path in shards]


def _scattered(directory: Path, shards: Sequence[Path]) -> tuple[Path, ...]:
    return tuple(directory / f"{shard.stem}.arrow" for shard in shards)


def _before(counts: Iterable[int]) -> tuple[int, ...]:
    """Returns the sum of the numbers before each number."""
    return tuple(accumulate(counts, initial=0))[:-1]


def _borders(times: Times, kept: int, count: int) -> tuple[int, ...]:
    """Returns the first time of each range but the first; equal times are in one range."""
    ranks = [kept * number // count for number in range(1, count)]
    return tuple(sorted(set(times.at(ranks)))) if ranks else ()


def _counted(plan: AggregatePlan) -> tuple[str, ...]:
    return tuple(name for name in plan.counted_columns if name not in ("user", "item"))


def _is_kept(by: tuple[str, ...], plan: AggregatePlan) -> bool:
    return any(one.by == by for one in plan.aggregations)
