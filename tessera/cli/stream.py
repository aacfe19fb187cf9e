"""Commands of the stream: run it, feed it, verify it, and put dead letters back."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from features.errors import FencedError, LogError, TesseraError
from tessera.cli.edge import tell
from tessera.terminal import (
    BundleOption,
    DatasetArgument,
    JsonOption,
    ModelNameOption,
    err_console,
    one_thread,
    out_console,
    print_json,
)

letters = typer.Typer(no_args_is_help=True, help="Dead letters: messages that were quarantined.")
topics = typer.Typer(no_args_is_help=True, help="The topics of the log.")
_DAY_S = 86_400.0


def stream(
    model: ModelNameOption = None,
    bundle: BundleOption = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Train champion, challenger and previous, as the registry names them.")
    ] = False,
    once: Annotated[bool, typer.Option("--once", help="Drain the topics and stop.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show a live view.")] = False,
    role: Annotated[str, typer.Option(help="trainer, writer or both; each may run in a process of its own.")] = "both",
    batch: Annotated[int, typer.Option(min=1, max=4_096, help="Most messages of a micro-batch.")] = 256,
    wait_ms: Annotated[int, typer.Option(min=1, help="Milliseconds a micro-batch waits to fill.")] = 50,
    lateness_s: Annotated[float, typer.Option(min=1, help="Seconds an event may be late, in event time.")] = 3_600,
    learning_rate: Annotated[float | None, typer.Option(min=0, help="By default the training's.")] = None,
    most_bad: Annotated[
        float, typer.Option(min=0, max=1, help="Share of faulty messages that stops the stream.")
    ] = 0.5,
    snapshot_s: Annotated[float, typer.Option(min=1, help="Seconds between snapshots.")] = 300,
    refuse_schema: Annotated[
        list[int] | None, typer.Option(help="Id of a schema whose messages become dead letters; may be repeated.")
    ] = None,
    metrics_port: Annotated[
        str, typer.Option(metavar="[HOST:]PORT", help="Serve Prometheus metrics on this port; 0: do not.")
    ] = "0",
    processes: Annotated[
        int, typer.Option(metavar="N", min=1, help="Train in N processes; at most TESSERA_PARTITIONS.")
    ] = 1,
    rank: Annotated[int | None, typer.Option(min=0, help="Start this one of the N processes alone; 0 leads.")] = None,
    meet: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="With --rank: where process 0 awaits the others.")
    ] = "127.0.0.1:29400",
    json: JsonOption = False,
) -> None:
    """Train the champion's table from the topics `items` and `events`, and keep the store fresh."""
    from streaming.metrics import StreamMetrics
    from streaming.trainer import TrainerOptions
    from tessera.cli.serve import log_lines
    from tessera.settings import Settings
    from tessera.stream_service import (
        ROLES,
        StreamConnections,
        StreamService,
        bundle_at,
        refuse_shared_topics,
        until_stopped,
    )

    if role not in (*ROLES, "both"):
        raise TesseraError(f"--role {role}: expected trainer, writer or both")
    if role == "writer" and (processes > 1 or rank is not None):
        raise TesseraError("--role writer: one process writes to the store; leave out --processes and --rank")
    if follow and bundle is not None:
        raise TesseraError("--follow: the registry names the bundles; leave out --bundle, or --follow")
    if follow and (processes > 1 or rank is not None):
        raise TesseraError(
            "--follow: one process trains all bundles; leave out --processes and --rank, or start `tessera stream "
            "--bundle DIR --processes N` for each bundle"
        )
    settings = Settings.from_environment()
    options = TrainerOptions(batch, wait_ms / 1_000, lateness_s, learning_rate, most_bad, snapshot_s)
    if follow:
        from tessera.cli.follow import follow_releases

        refuse_shared_topics(settings)
        connections = StreamConnections.of(settings, refuse_schema or ())
        roles = ROLES if role == "both" else (role,)
        shown = {"once": once, "watch": watch, "json": json}
        follow_releases(settings, model, connections, options, roles=roles, metrics_port=metrics_port, **shown)
        return
    opened = bundle_at(settings, model, bundle)
    if bundle is None:
        refuse_shared_topics(settings)
    stop = until_stopped()
    one_thread()
    gauges = StreamMetrics()
    if processes > 1 or rank is not None:
        from tessera.stream_processes import arguments, follow_leader, peers_of, run_processes

        if rank is None:
            given: dict[str, Any] = {"model": model, "bundle": opened.directory, "once": once, "watch": watch}
            given["role"] = role
            given |= {"batch": batch, "wait_ms": wait_ms, "lateness_s": lateness_s, "learning_rate": learning_rate}
            given |= {"most_bad": most_bad, "snapshot_s": snapshot_s, "refuse_schema": refuse_schema}
            log_lines(requests=False)
            run_processes(settings, processes, arguments(given | {"metrics_port": metrics_port, "json": json}))
            return
        # A probe finds each process of a cluster at its port before the others come. The figures are the leader's.
        gauges.serve(metrics_port)
        with _outages(told=not once):
            options = replace(options, peers=peers_of(settings, opened, options, (rank, processes, meet)))
            connections = StreamConnections.of(settings, refuse_schema or ())
            if rank > 0:
                follow_leader(opened, connections, options)
                return
    err_console.print(f"stream of bundle {opened.id} from {settings.kafka or settings.home / 'log.db'}")
    roles = ROLES if role == "both" else (role,)
    service = StreamService(
        opened, StreamConnections.of(settings, refuse_schema or ()), options, roles=roles, metrics=gauges
    )
    with _outages(told=rank is not None and not once), settings.traced("tessera-stream"):
        if once:
            totals: Any = service.once()
        else:
            log_lines(requests=False)
            if rank is None:
                gauges.serve(metrics_port)
            _run(service, gauges, stop, watch=watch)
    if once:
        counts = {name: getattr(totals, name) for name in ("messages", "events", "items", "neutral", "bad", "batches")}
    else:
        counts = {"messages": sum(gauges.counts.values()) - gauges.counts["batches"] - gauges.counts["outages"]}
        counts |= gauges.counts
        totals = counts | {"causes": gauges.causes, "freshness_ms": gauges.freshness_ms()}
    if json:
        print_json(totals)
    else:
        out_console.print(
            f"{counts['messages']:,} messages: {counts['events']:,} events, {counts['items']:,} items, "
            f"{counts['neutral']:,} neutral, {counts['bad']:,} dead letters; {counts['batches']:,} batches"
        )


@contextlib.contextmanager
def _outages(*, told: bool) -> Iterator[None]:
    """Ends this process with a status of its own if the log does not answer.

    Args:
        told: False leaves the error as it is.
    """
    try:
        yield
    except FencedError:
        raise
    except LogError as error:
        if not told:
            raise
        from tessera.stream_processes import OUTAGE

        tell(error, verbose=False)
        raise typer.Exit(OUTAGE) from error


def _run(service: Any, gauges: Any, stop: Any, *, watch: bool) -> None:
    """Runs a stream until `stop` is set, with a live view on request."""
    if not watch:
        service.run(stop)
        return
    from rich.live import Live

    with Live(_view(gauges), console=err_console, auto_refresh=False) as screen:
        service.run(stop, on_tick=lambda: screen.update(_view(gauges), refresh=True))


def _view(gauges: Any) -> Table:
    table = Table(title="stream", title_justify="left", show_header=False)
    p50, p99 = gauges.freshness_ms()
    loss, auc = gauges.progressive()
    rows = {
        "messages a second": f"{gauges.per_second():,.0f}",
        "applied": f"{gauges.counts['events']:,} events, {gauges.counts['items']:,} items, "
        f"{gauges.counts['deleted']:,} deletions",
        "skipped": f"{gauges.counts['neutral']:,} neutral, {gauges.counts['duplicates']:,} duplicates, "
        f"{gauges.counts['stale']:,} stale",
        "dead letters": ", ".join(f"{count:,} {cause}" for cause, count in gauges.causes.items()) or "none",
        "lag": ", ".join(f"{topic}-{part} {lag:,}" for (topic, part), lag in gauges.lag.items()) or "-",
        "fresh in the store": f"p50 {p50:,.0f} ms, p99 {p99:,.0f} ms" if p50 == p50 else "-",
        "before the update": f"log loss {loss:.4f}, AUC {auc:.4f}" if loss == loss else "-",
        "shown": ", ".join(f"{count:,} {fate}" for fate, count in gauges.shown.items()) or "-",
        "outages": f"{gauges.counts['outages']:,} {gauges.last_error}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def send(
    topic: Annotated[str, typer.Argument(help="items or events.")],
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="JSON lines, plain or gzip; one message each. A path or an address.")
    ],
    key: Annotated[str | None, typer.Option(help="Field whose value chooses the partition.")] = None,
    as_format: Annotated[
        str, typer.Option("--format", help="Format of the messages: json, avro, protobuf or arrow.")
    ] = "json",
    schema: Annotated[
        Path | None, typer.Option(help="Avro or .proto schema to register; by default one is made from the rows.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, max=10_000, help="Rows of an Arrow message.")] = 1_000,
) -> None:
    """Append a file of JSON lines to a topic of the log. If any line is invalid, nothing is appended."""
    import msgspec

    from features.dataset.jsonl import strict_lines
    from features.dataset.plain_text import read_plain
    from features.storage.copy import local_file
    from features.storage.location import locate
    from features.value.canonical import scalar
    from tessera.messages import encoded
    from tessera.settings import Settings

    if topic not in ("items", "events"):
        raise TesseraError(f"topic {topic!r}: expected items or events")
    location = locate(file)
    if not location.is_file():
        raise TesseraError(f"{file}: no such file; give JSON lines, one message each")
    lines = strict_lines(read_plain(local_file(location), f"{file}:"), f"{file}:")
    keys: list[bytes | None] = [None] * len(lines)
    if key is not None:
        for number, line in enumerate(lines):
            try:
                # The key is in canonical form, as in the server's intake: one id has one partition however it is
                # written.
                keys[number] = str(scalar(msgspec.json.decode(line, type=dict[str, Any])[key])).encode()
            except (msgspec.DecodeError, UnicodeDecodeError, KeyError) as error:
                raise TesseraError(f"{file}: line {number + 1}: no field {key!r} to choose the partition by") from error
    settings = Settings.from_environment()
    name = getattr(settings.topics, topic)
    messages = list(
        zip(keys, encoded(settings, name, lines, as_format, schema, rows, keyed=key is not None), strict=False)
    )
    with contextlib.closing(settings.open_log()) as log:
        log.create_topics(settings.topics.partitions())
        log.append(name, messages)
    count = f"{len(lines):,} rows in " if as_format == "arrow" else ""
    out_console.print(f"{count}{len(messages):,} messages appended to {topic}")


def backfill(
    dataset: DatasetArgument,
    since: Annotated[str | None, typer.Option("--from", help="First event time, ISO 8601; an order's number.")] = None,
    until: Annotated[str | None, typer.Option("--to", help="Event time to stop before.")] = None,
    runner: Annotated[str, typer.Option(help="Engine: direct, dask, prism, flink, spark or portable.")] = "direct",
    endpoint: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Address of its cluster.")] = None,
    json: JsonOption = False,
) -> None:
    """Send history from a dataset's files through the stream's own step: into the log, each event once."""
    from features.dataset.descriptor import load_dataset
    from features.jobs.messages import event_messages
    from streaming.backfill import send_history
    from tessera.settings import Settings

    settings = Settings.from_environment()
    loaded = load_dataset(dataset)
    clock = loaded.events.time is not None
    from rich.progress import Progress

    with Progress(console=err_console) as bar, contextlib.closing(settings.open_log()) as log:
        encoding, sending = bar.add_task("encode"), bar.add_task("send")
        shards = event_messages(
            loaded,
            settings.home / "backfill",
            start=_moment(since, "--from", clock=clock),
            stop=_moment(until, "--to", clock=clock),
            engine=settings.engine(runner, endpoint),
            progress=lambda done, total: bar.update(encoding, completed=done, total=total),
        )
        log.create_topics(settings.topics.partitions())
        sent = send_history(
            log,
            settings.topics.events,
            shards,
            sent=settings.home / "backfill" / "sent.msgpack",
            schemas=settings.schemas(),
            progress=lambda done: bar.update(sending, completed=done, total=None),
        )
    if json:
        print_json({"sent": sent})
    else:
        out_console.print(
            f"{sent:,} events appended; `tessera stream --once` consumes them, or the running stream does"
        )


def _moment(text: str | None, option: str, *, clock: bool) -> int | None:
    """Returns an event time as in the frame: microseconds since 1970, or the order's own number."""
    if text is None:
        return None
    try:
        if not clock:
            return int(text)
        moment = datetime.fromisoformat(text)
        return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1_000_000)
    except ValueError as error:
        kind = (
            "a time such as 2025-01-31 or 2025-01-31T08:00:00Z" if clock else "a whole number, as in the order column"
        )
        raise TesseraError(f"{option} {text}: expected {kind}") from error


def replay(model: ModelNameOption = None, bundle: BundleOption = None, json: JsonOption = False) -> None:
    """Rebuild the store from snapshot and log, while it is being read."""
    from serving.store.verify import replay as rebuild
    from tessera.settings import Settings
    from tessera.stream_service import bundle_at

    settings = Settings.from_environment()
    loaded = bundle_at(settings, model, bundle)
    with contextlib.closing(settings.open_store()) as store, contextlib.closing(settings.open_log()) as log:
        log.create_topics(settings.topics.partitions())
        snapshot = settings.open_snapshots().newest(loaded)
        done = rebuild(log, loaded, store, settings.topics, snapshot, storage=settings.storage)
    if json:
        print_json(done)
    else:
        out_console.print(f"{done.rows:,} rows and {done.records:,} records written, up to batch {done.seq:,}")


def verify(
    model: ModelNameOption = None,
    bundle: BundleOption = None,
    sample: Annotated[int | None, typer.Option(min=1, help="Rows to compare; all by default.")] = None,
    from_snapshot: Annotated[
        bool, typer.Option("--from-snapshot", help="Fold from the snapshot, not the start.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Verify that the store is the fold of the log. Otherwise print the first difference and exit with 1."""
    from serving.store.verify import verify as compare
    from tessera.settings import Settings
    from tessera.stream_service import bundle_at

    settings = Settings.from_environment()
    loaded = bundle_at(settings, model, bundle)
    with contextlib.closing(settings.open_store()) as store, contextlib.closing(settings.open_log()) as log:
        log.create_topics(settings.topics.partitions())
        snapshot = settings.open_snapshots().newest(loaded) if from_snapshot else None
        done = compare(log, loaded, store, settings.topics, snapshot=snapshot, sample=sample)
    if json:
        print_json(done)
    elif done.difference:
        out_console.print(Text.assemble(("differs", "red"), f" {done.difference}"), soft_wrap=True)
    else:
        out_console.print(f"equal: {done.rows:,} rows and {done.records:,} records, up to batch {done.seq:,}")
    if done.difference:
        raise typer.Exit(1)


@topics.command("create")
def topics_create(
    partitions: Annotated[int, typer.Option(min=1, help="Partitions of items, events and impressions.")] = 1,
    events_days: Annotated[
        float | None,
        typer.Option(
            min=1, help="Days that events, impressions, dead letters and skew records stay; by default forever."
        ),
    ] = None,
    deltas_days: Annotated[
        float | None, typer.Option(min=1, help="Days that deltas stay; more than snapshots need.")
    ] = None,
    compact_items: Annotated[
        bool, typer.Option("--compact-items", help="Keep the newest message of each item.")
    ] = False,
) -> None:
    """Create the topics that do not exist."""
    from streaming.log.protocol import Kept
    from tessera.settings import Settings

    settings = Settings.from_environment()
    names = settings.topics
    days = dict.fromkeys((names.events, names.impressions, names.dead_letters, names.skew), events_days) | {
        names.deltas: deltas_days
    }
    kept = {name: Kept(seconds=count * _DAY_S) for name, count in days.items() if count is not None}
    if compact_items:
        kept[names.items] = Kept(newest_by_key=True)
    with contextlib.closing(settings.open_log()) as log:
        log.create_topics(names.partitions(partitions), kept)
    out_console.print(f"topics: {', '.join(names.partitions(partitions))}")


@topics.command("export")
def topics_export(
    topic: Annotated[str, typer.Argument(help="impressions, outcomes or forgotten.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON lines to write.")],
    json: JsonOption = False,
) -> None:
    """Write the messages of a topic to a file, for `from = "impressions"` or `forgotten` of a descriptor."""
    from streaming.shown.export import export_topic
    from tessera.settings import Settings

    settings = Settings.from_environment()
    names = {name: getattr(settings.topics, name) for name in ("impressions", "outcomes", "forgotten")}
    if topic not in names:
        raise TesseraError(f"topic {topic!r}: expected impressions, outcomes or forgotten")
    with contextlib.closing(settings.open_log()) as log:
        log.create_topics(settings.topics.partitions())
        written = export_topic(log, names[topic], file)
    if json:
        print_json({"written": written})
    else:
        out_console.print(f"{written:,} messages of {topic} written to {file}")


@topics.command("positions")
def topics_positions() -> None:
    """Print the ends of the topics, for `tessera run --positions` on files that hold all earlier items and events."""
    from models.bundle.bundle import LogPosition
    from tessera.settings import Settings

    settings = Settings.from_environment()
    with contextlib.closing(settings.open_log()) as log:
        log.create_topics(settings.topics.partitions())
        positions = [
            LogPosition(topic, log.identity(topic), partition, offset)
            for topic in (settings.topics.items, settings.topics.events, settings.topics.deltas)
            for partition, offset in log.end_offsets(topic).items()
        ]
    print_json(positions)


@letters.command("list")
def letters_list(json: JsonOption = False) -> None:
    """List dead letters: the position of each message, and the reason."""
    from streaming.dead_letter import causes, read_dead_letters
    from tessera.settings import Settings

    settings = Settings.from_environment()
    with contextlib.closing(settings.open_log()) as log:
        log.create_topics(settings.topics.partitions())
        dead = read_dead_letters(log, settings.topics)
    if json:
        print_json(dead)
        return
    counted = ", ".join(f"{count:,} {cause}" for cause, count in causes(dead).items())
    title = f"{len(dead):,} dead letters" + (f", to be put back: {counted}" if counted else "")
    table = Table("number", "topic", "partition", "offset", "cause", "reason", "put back", title=title)
    for filed in dead:
        letter = filed.letter
        position = (str(filed.number), letter.topic, str(letter.partition), str(letter.offset))
        table.add_row(*position, letter.cause, letter.reason, "yes" if filed.put_back else "")
    out_console.print(table)


@letters.command("show")
def letters_show(number: Annotated[int, typer.Argument(help="Number in `list`.")]) -> None:
    """Print one dead letter's reason on standard error and its original bytes on standard output."""
    import sys

    from streaming.dead_letter import read_dead_letters
    from tessera.settings import Settings

    settings = Settings.from_environment()
    with contextlib.closing(settings.open_log()) as log:
        log.create_topics(settings.topics.partitions())
        letters_by_number = {filed.number: filed.letter for filed in read_dead_letters(log, settings.topics)}
    if number not in letters_by_number:
        raise TesseraError(f"letter {number}: no such letter; `tessera deadletters list` shows all")
    letter = letters_by_number[number]
    err_console.print(f"{letter.topic} partition {letter.partition} offset {letter.offset}: {letter.reason}")
    sys.stdout.buffer.write(letter.value + b"\n")


@letters.command("replay")
def letters_replay(
    numbers: Annotated[list[int] | None, typer.Argument(help="Numbers in `list`.")] = None,
    cause: Annotated[str | None, typer.Option(help="Put back all letters of this cause.")] = None,
    mended: Annotated[
        Path | None, typer.Option(help='JSON lines {"number": 7, "value": {…}}: messages to append instead.')
    ] = None,
) -> None:
    """Put dead letters back into their topics, each exactly once."""
    import msgspec

    from features.dataset.jsonl import strict_lines
    from features.dataset.plain_text import read_plain
    from streaming.dead_letter import put_back, waiting
    from tessera.settings import Settings

    replaced: dict[int, bytes] = {}
    if mended is not None:
        try:
            for line in strict_lines(read_plain(mended, f"{mended}:"), f"{mended}:"):
                row = msgspec.json.decode(line, type=dict[str, Any])
                replaced[int(row["number"])] = msgspec.json.encode(row["value"])
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
            raise TesseraError(f'{mended}: expected JSON lines {{"number": 7, "value": {{…}}}} ({error})') from error
    settings = Settings.from_environment()
    with contextlib.closing(settings.open_log()) as log:
        log.create_topics(settings.topics.partitions())
        chosen = set(numbers or ()) | (waiting(log, settings.topics, cause) if cause else set())
        if not chosen and not replaced:
            raise TesseraError("no letters chosen; name their numbers, a --cause, or a file of --mended ones")
        done = put_back(log, settings.topics, chosen, replaced)
    out_console.print(f"{len(done):,} messages put back" + (f": {', '.join(map(str, done))}" if done else ""))
