"""Command `tessera skew`: proves a sample of served answers from snapshot, log and batch."""

import contextlib
import time
from typing import Annotated, Any

import typer
from rich.table import Table

from tessera.terminal import BundleOption, JsonOption, ModelNameOption, out_console, print_json


def skew(
    model: ModelNameOption = None,
    bundle: BundleOption = None,
    hours: Annotated[float, typer.Option(min=0, help="Compare the records of the last hours; 0: all.")] = 0.0,
    from_snapshot: Annotated[
        bool,
        typer.Option("--from-snapshot", help="Fold from the snapshot, not the start; earlier records are skipped."),
    ] = False,
    clock_ms: Annotated[int, typer.Option(min=0, help="Largest difference of two machines' clocks.")] = 1_000,
    late_s: Annotated[float, typer.Option(min=0, help="Seconds that a server may be behind the log.")] = 60.0,
    every_s: Annotated[
        float, typer.Option(min=0, help="Compare new records at this interval until stopped; 0: once.")
    ] = 0.0,
    metrics_port: Annotated[int, typer.Option(help="Serve Prometheus metrics on this port; 0: do not.")] = 0,
    json: JsonOption = False,
) -> None:
    """Recompute what servers read for sampled answers, and name each difference by feature. Exit with 1 if any."""
    from serving.skew.metrics import SkewMetrics
    from serving.skew.prove import SkewLimits
    from tessera.settings import Settings
    from tessera.stream_service import bundle_at, until_stopped

    settings = Settings.from_environment()
    loaded = bundle_at(settings, model, bundle)
    limits = SkewLimits(clock_ms=clock_ms, late_s=late_s)
    until_ms = _now_ms()
    since_ms = until_ms - int(3_600_000 * hours) if hours else 0
    if not every_s:
        report = _compared(settings, loaded, limits, from_snapshot, (since_ms, None))
        _show(report, json=json)
        if report.different:
            raise typer.Exit(1)
        return
    metrics, stop = SkewMetrics(), until_stopped()
    if metrics_port:
        metrics.serve(metrics_port)
    while True:
        # The end of a round is the start of the next, so that each record is compared once.
        report = _compared(settings, loaded, limits, from_snapshot, (since_ms, until_ms))
        metrics.note(report)
        _show(report, json=json)
        if stop.wait(every_s):
            return
        since_ms, until_ms = until_ms, _now_ms()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _compared(settings: Any, bundle: Any, limits: Any, from_snapshot: bool, between_ms: tuple[int, int | None]) -> Any:
    """Returns the report of the records that were appended in a time, milliseconds since 1970."""
    from serving.skew.prove import prove, read_records
    from streaming.snapshot import Snapshots

    with contextlib.closing(settings.open_log()) as log:
        log.create_topics(settings.topics.partitions())
        records, unreadable = read_records(log, settings.topics, since_ms=between_ms[0], until_ms=between_ms[1])
        snapshot = Snapshots(settings.snapshots).newest(bundle) if from_snapshot else None
        report = prove(log, bundle, settings.topics, records, snapshot=snapshot, limits=limits)
    if unreadable:
        report.skipped["unreadable"] += unreadable
    return report


def _show(report: Any, *, json: bool) -> None:
    if json:
        print_json(report.to_json())
    else:
        _print(report)


def _print(report: Any) -> None:
    counts = f"{report.requests:,} requests, {report.values:,} values: {report.different:,} differ"
    notes = [f"{count:,} records skipped ({reason})" for reason, count in report.skipped.items()]
    if report.undecided:
        notes.insert(0, f"{report.undecided:,} values undecided, since the stream changed them during the read")
    out_console.print("; ".join([counts, *notes]), soft_wrap=True)
    if not report.requests:
        out_console.print("no record of this bundle; start the server with `tessera serve --skew-sample 0.01`")
    if not report.differences:
        return
    table = Table("feature", "kind", "values", "example")
    for difference in report.differences:
        first = difference.examples[0]
        item = f" item {first['item']}" if first["item"] else ""
        example = f"request {first['request']}{item}: served {first['served']}, expected {first['expected']}"
        table.add_row(difference.feature, difference.kind, f"{difference.count:,}", example)
    out_console.print(table)
