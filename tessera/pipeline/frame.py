"""Stage `frame`: joins events, users and items into the training frame, with the items' codes and tokens."""

from pathlib import Path

from features.aggregate.plan import plan_of
from features.aggregate.stored import save_aggregates
from features.aggregate_frame import with_aggregates, within_bounds
from features.dataset.profile import few_known, profile
from features.dataset.split import PARTS
from features.durable import write_directory
from features.errors import DatasetError
from features.frame import Frame, build_frame, write_examples
from features.jobs.shard import write_parquet
from models.semantic_id.codebook import kinds as codebooks
from tessera.pipeline.artifact import AGGREGATES, PROFILE, read_frame, with_content, with_tokens, write_json
from tessera.pipeline.job import Finished, Job
from tessera.pipeline.stage import Advance

READS = ("seed", "history_length", "aggregates", "aggregate_keys")
READS_CODED = (*READS, "tokens", "pieces")


def frame(job: Job, assigned: Finished | None) -> Finished:
    """Runs the stage, after `assign` if the items have text, and prints the warnings of `tessera check`."""

    def work(directory: Path, advance: Advance) -> None:
        # The profile reads the raw tables, which are large. It comes first, so that they are released before the join.
        write_json(directory / PROFILE, profile(job.dataset, job.tables).to_json())
        job.tables.release_raw()
        advance(1, 4)
        frame = _joined(job, assigned)
        job.tables.release()
        advance(2, 4)
        if assigned is not None:
            book = codebooks.load(assigned.directory / "codebook")
            frame, tokenizer = with_tokens(frame, job.options.tokens, book, pieces=job.options.pieces)
            write_directory(directory / "tokens", tokenizer.save)
        advance(3, 4)
        plan = plan_of(job.dataset, job.options.aggregates, most_keys=job.options.aggregate_keys)
        plan, large = within_bounds(frame, plan, {one.name for one in plan.aggregations} - set(job.dataset.aggregates))
        if large:
            job.warn(
                f"frame: no default aggregates {', '.join(large)}: more than {plan.most_keys:,} keys; declare "
                "them and raise aggregate_keys in [run], or declare coarser columns"
            )
        frame, aggregator = with_aggregates(frame, plan, base_rate=_base_rate(job))
        save_aggregates(aggregator, directory / AGGREGATES)
        for name in ("users", "items"):
            write_parquet(getattr(frame, name), directory / f"{name}.parquet")
        write_examples(frame, directory)
        advance(4, 4)

    before: dict[str, Finished | str] = dict(job.previous.after("frame")) if job.previous else {}
    described = job.dataset.model_dump(mode="json", include={"items", "users", "events", "split", "aggregates"})
    finished = job.do(
        "frame",
        work,
        reads=READS if assigned is None else READS_CODED,
        descriptor=described,
        tables=("items", "users", "events"),
        after=before | ({} if assigned is None else {"assign": assigned}),
    )
    job.tables.release()
    _warn(job, read_frame(finished.directory))
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


def _warn(job: Job, frame: Frame) -> None:
    # The first row of an event is the event itself; drawn negatives follow.
    events = frame.examples.unique("event", keep="first", maintain_order=True)
    for kind, table, declared in (
        ("item", frame.items, job.dataset.items),
        ("user", frame.users, job.dataset.users),
    ):
        if declared is not None:
            named = table[f"{kind}_id"].gather(events[kind]).to_frame()
            for line in few_known(named, table.filter("listed"), kind):
                job.warn(f"frame: {line}")
