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
    json: JsonOption = False,
) -> None:
    """Recompute what servers read for sampled answers, and name each difference by feature. Exit with 1 if any."""
    from serving.skew.prove import SkewLimits, prove, read_records
    from streaming.snapshot import Snapshots
    from tessera.settings import Settings
    from tessera.stream_service import bundle_at

    settings = Settings.from_environment()
    loaded = bundle_at(settings, model, bundle)
    since_ms = int((time.time() - 3_600 * hours) * 1_000) if hours else 0
    with contextlib.closing(settings.open_log()) as log:
        log.create_topics(settings.topics.partitions())
        records, unreadable = read_records(log, settings.topics, since_ms=since_ms)
        snapshot = Snapshots(settings.snapshots).newest(loaded) if from_snapshot else None
        limits = SkewLimits(clock_ms=clock_ms, late_s=late_s)
        report = prove(log, loaded, settings.topics, records, snapshot=snapshot, limits=limits)
    if unreadable:
        report.skipped["unreadable"] += unreadable
    if json:
        print_json(report.to_json())
    else:
        _print(report)
    if report.different:
        raise typer.Exit(1)


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
