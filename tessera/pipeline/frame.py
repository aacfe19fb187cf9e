"""Stage `frame`: joins events, users and items into the training frame, with the items' codes and tokens."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import polars as pl
from pyarrow import parquet

from features.aggregate.plan import AggregatePlan, plan_of
from features.aggregate.stored import save_aggregates
from features.aggregate_frame import with_aggregates, within_bounds
from features.dataset.descriptor import Dataset
from features.dataset.profile import profile
from features.dataset.split import PARTS
from features.durable import write_directory, write_file
from features.errors import DatasetError, TesseraError
from features.frame import Frame, build_frame, write_examples
from features.frame_blocks import shown_items, stored_blocks
from features.framing.build import FrameJobs
from features.framing.choices import Built, FrameChoices, is_large
from features.framing.profile import profile_of
from features.jobs.shard import each_shard, read_shards, write_parquet
from models.semantic_id.codebook import kinds as codebooks
from models.semantic_id.tokens import Tokenizer, fit_tokenizer
from models.table.schema import SEMANTIC_ID
from serving.policy.policies import check_filters
from tessera.pipeline.artifact import AGGREGATES, PROFILE, with_content, with_tokens, write_json
from tessera.pipeline.job import Finished, Job
from tessera.pipeline.stage import Advance

_JOBS = ".jobs"
READS = ("seed", "history_length", "aggregates", "aggregate_keys")
READS_CODED = (*READS, "tokens", "pieces")


def frame(job: Job, assigned: Finished | None) -> Finished:
    """Runs the stage, after `assign` if the items have text, and prints the warnings of `tessera check`."""

    def work(directory: Path, advance: Advance) -> None:
        if is_large(job.dataset):
            job.tables.release()
            _by_jobs(job, assigned, directory, advance, _base_rate(job))
            return
        # The profile reads the raw tables, which are large. It comes first, so that they are released before the join.
        write_json(directory / PROFILE, profile(job.dataset, job.tables).to_json())
        job.tables.release_raw()
        advance(1, 4)
        frame = _joined(job, assigned)
        check_filters(job.dataset, frame.items)
        job.tables.release()
        advance(2, 4)
        if assigned is not None:
            book = codebooks.load(assigned.directory / "codebook")
            frame, tokenizer = with_tokens(frame, job.options.tokens, book, pieces=job.options.pieces)
            write_directory(directory / "tokens", tokenizer.save)
        advance(3, 4)
        plan = plan_of(job.dataset, job.options.aggregates, most_keys=job.options.aggregate_keys)
        plan, large = within_bounds(frame, plan, _optional(plan, job.dataset))
        _warn_of_large(job, plan, large)
        frame, aggregator = with_aggregates(frame, plan, base_rate=_base_rate(job))
        save_aggregates(aggregator, directory / AGGREGATES)
        for name in ("users", "items"):
            write_parquet(getattr(frame, name), directory / f"{name}.parquet")
        write_examples(frame, directory)
        advance(4, 4)

    before: dict[str, Finished | str] = dict(job.previous.after("frame")) if job.previous else {}
    described = job.dataset.model_dump(
        mode="json", include={"items", "users", "events", "split", "aggregates", "features"}
    )
    finished = job.do(
        "frame",
        work,
        reads=READS if assigned is None else READS_CODED,
        descriptor=described,
        tables=("items", "users", "events"),
        after=before | ({} if assigned is None else {"assign": assigned}),
    )
    job.tables.release()
    for line in msgspec.json.decode((finished.directory / PROFILE).read_bytes())["warnings"]:
        job.warn(f"frame: {line}")
    return finished


def _base_rate(job: Job) -> float | None:
    """The rate that the earlier run's network knows, if this run goes on from one that had aggregates."""
    plan = job.previous.aggregates if job.previous else None
    return plan.base_rate if plan and plan.columns else None


def _joined(job: Job, assigned: Finished | None) -> Frame:
    tables = {"events": job.tables.events[0]}
    items, users = job.tables.items, job.tables.users
    if users is not None:
        tables["users"] = users
    if items is not None:
        tables["items"] = items if assigned is None else with_content(items, assigned.directory)
    frame = build_frame(job.dataset, tables, split=job.split, history_length=job.options.history_length)
    for part in PARTS:
        if not frame.part(part).height:
            raise DatasetError(
                f"{job.dataset.source}: [split] by = {job.split.by!r} leaves the part {part!r} empty; "
                "change its fractions, or by"
            )
    return frame


def _by_jobs(job: Job, assigned: Finished | None, directory: Path, advance: Advance, base_rate: float | None) -> None:
    """Fills the stage's directory; memory is bounded by a slice of the files or a partition of the events."""
    options = job.options
    plan = plan_of(job.dataset, options.aggregates, most_keys=options.aggregate_keys)
    optional = frozenset(_optional(plan, job.dataset))
    choices = FrameChoices(job.dataset, job.split, options.history_length, plan, optional, base_rate)
    jobs = FrameJobs(choices, directory / _JOBS, directory, engine=job.engine, progress=advance)
    built = jobs.run()
    _warn_of_large(job, plan, built.large)
    parts = stored_blocks(directory)
    write_json(directory / PROFILE, profile_of(job.dataset, built, parts).to_json())
    tokenizer = None
    if assigned is not None:
        book = codebooks.load(assigned.directory / "codebook")
        codes = read_shards(assigned.directory / "codes", ["codes"])["codes"].to_numpy().reshape(-1, book.levels)
        shown = shown_items(parts["train"], built.items.height)[: len(codes)]
        tokenizer = fit_tokenizer(options.tokens, book.levels, book.codes, codes, shown, pieces=options.pieces)
        tokens = directory / "tokens"
        if not tokens.exists():
            write_directory(tokens, tokenizer.save)
    _write(_coded(built, assigned, tokenizer), directory / "items.parquet")
    _write(built.users.slices(), directory / "users.parquet")
    save_aggregates(built.aggregator, directory / AGGREGATES)
    jobs.clear()


def _optional(plan: AggregatePlan, dataset: Dataset) -> set[str]:
    """Returns the names of the default aggregates, which are left out if they have too many keys."""
    return {one.name for one in plan.aggregations} - set(dataset.aggregates)


def _warn_of_large(job: Job, plan: AggregatePlan, large: list[str]) -> None:
    """Prints the aggregates that were left out."""
    if large:
        job.warn(
            f"frame: no default aggregates {', '.join(large)}: more than {plan.most_keys:,} keys; declare "
            "them and raise aggregate_keys in [run], or declare coarser columns"
        )


def _coded(built: Built, assigned: Finished | None, tokenizer: Tokenizer | None) -> Iterator[pl.DataFrame]:
    """Yields the items slice after slice, with their vectors, codes and tokens."""
    if assigned is None or tokenizer is None:
        yield from built.items.slices()
        return
    coded = each_shard(assigned.directory / "codes")
    held = next(coded)
    empty = held.clear()
    for items in built.items.slices():
        known = int(items["listed"].sum())
        parts = [held]
        while (rows := sum(part.height for part in parts)) < known:
            parts.append(next(coded, empty))
            if parts[-1] is empty:
                raise TesseraError(f"{assigned.directory}: codes of {rows:,} items are missing; run the stage again")
        found = pl.concat(parts)
        own, held = found.head(known), found.slice(known)
        if not own["item_id"].equals(items["item_id"].head(known)):
            raise TesseraError(f"{assigned.directory}: the codes are of other items; run the stage again")
        named = own.rename({"vector": "content_vector", "codes": "semantic_codes"})
        joined = items.drop("listed").join(named, on="item_id", how="left", maintain_order="left")
        yield joined.with_columns(items["listed"], tokenizer.column(joined["semantic_codes"]).alias(SEMANTIC_ID))


def _write(slices: Iterable[pl.DataFrame], path: Path) -> None:
    """Writes slices of a table as row groups of one parquet file."""

    def fill(aside: Path) -> None:
        writer = None
        for frame in slices:
            table = frame.to_arrow()
            writer = writer or parquet.ParquetWriter(aside, table.schema, compression="zstd", write_statistics=False)
            writer.write_table(table)
        if writer is not None:
            writer.close()

    write_file(path, fill)
