"""Command `tessera skew`: proves a sample of served answers from snapshot, log and batch, and watches for drift."""

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from tessera.terminal import BundleOption, JsonOption, ModelNameOption, out_console, print_json

_MOST_SHOWN = 5
_DIFFERS, _DRIFTED = 1, 3


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
    drift_psi: Annotated[float, typer.Option(help="Population stability index that is no alarm.")] = 0.1,
    drift_share: Annotated[
        float, typer.Option(help="Change of a share of missing or unseen values that is no alarm.")
    ] = 0.01,
    drift_alpha: Annotated[float, typer.Option(help="Probability of a false alarm in a window.")] = 0.01,
    profile: Annotated[
        Path | None, typer.Option(help="Profile to compare distributions with, in place of the bundle's.")
    ] = None,
    write_profile: Annotated[
        Path | None, typer.Option(help="Write the profile of the compared records to this file.")
    ] = None,
    every_s: Annotated[
        float, typer.Option(min=0, help="Compare new records at this interval until stopped; 0: once.")
    ] = 0.0,
    window_hours: Annotated[float, typer.Option(min=0.01, help="Length of a window of drift, with --every-s.")] = 24.0,
    metrics_port: Annotated[int, typer.Option(help="Serve Prometheus metrics on this port; 0: do not.")] = 0,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the report with the version, for console and gates.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Recompute what servers read for sampled answers, and compare distributions with training's.

    Exit with 1 if a value differs, and with 3 if a distribution alone drifted and no profile is written.
    """
    from serving.skew.alarm import DriftLimits
    from serving.skew.metrics import SkewMetrics
    from serving.skew.prove import SkewLimits
    from tessera.settings import Settings
    from tessera.stream_service import bundle_at, until_stopped

    settings = Settings.from_environment()
    loaded = bundle_at(settings, model, bundle)
    kept = _Kept(settings, loaded) if keep else None
    drift_limits = DriftLimits(drift_alpha, drift_psi, drift_share)
    rounds = _Rounds(settings, loaded, SkewLimits(clock_ms, late_s), from_snapshot, _Drift(drift_limits, profile))
    until_ms = _now_ms()
    since_ms = until_ms - int(3_600_000 * hours) if hours else 0
    if not every_s:
        rounds.begin(since_ms)
        report = rounds.compare(since_ms, None)
        if write_profile:
            rounds.write(write_profile)
        if kept:
            kept.put(report)
        _show(report, json=json)
        # A new reference is written because the distributions are others.
        if report.different or (report.drift.alarms and not write_profile):
            raise typer.Exit(_DIFFERS if report.different else _DRIFTED)
        return
    metrics, stop = SkewMetrics(), until_stopped()
    if metrics_port:
        metrics.serve(metrics_port)
    window_ms = int(3_600_000 * window_hours)
    began_ms = until_ms // window_ms * window_ms
    # A watch that starts again counts the window from its beginning, so it knows the users that were counted.
    rounds.begin(began_ms, until_ms=max(since_ms, began_ms))
    while True:
        # The end of a round is the start of the next, so that each record is compared once.
        report = rounds.compare(since_ms, until_ms)
        metrics.note(report)
        if kept:
            kept.put(report)
        _show(report, json=json)
        if stop.wait(every_s):
            return
        since_ms, until_ms = until_ms, _now_ms()
        if until_ms // window_ms * window_ms > began_ms:
            began_ms = until_ms // window_ms * window_ms
            rounds.begin(began_ms)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class _Kept:
    """Keeps the newest report with the version of a bundle in the registry, where console and gates find it."""

    def __init__(self, settings: Any, bundle: Any) -> None:
        self._registry = settings.open_registry(create=False)
        # An unknown version ends the command before it compares.
        self._release = self._registry.release(bundle.dataset.name, bundle.id)

    def put(self, report: Any) -> None:
        """Keeps a report in place of the last one."""
        from models.registry.documents import SKEW_REPORT

        self._registry.documents.put(self._release, SKEW_REPORT, report.to_json() | {"kept_ms": _now_ms()})


class _Drift:
    """Choices of the watch of distributions: tolerances, and a profile in place of the bundle's."""

    def __init__(self, limits: Any, profile: Path | None) -> None:
        self.limits, self.path = limits, profile

    def watch(self, bundle: Any, since_ms: int) -> Any:
        """Returns a watch of a window; None without a profile."""
        from models.profile.profile import read_profile
        from serving.skew.drift import DriftWatch

        found = read_profile(self.path) if self.path else bundle.profile
        if found is None:
            return None
        named = str(self.path) if self.path else "training"
        return DriftWatch(
            bundle.schema,
            found,
            bundle=bundle.id,
            limits=self.limits,
            reference=named,
            since_ms=since_ms,
            varying=bundle.dataset.events.varying,
        )


class _Rounds:
    """Rounds of comparisons of one bundle, with the watch of the present window."""

    def __init__(self, settings: Any, bundle: Any, limits: Any, from_snapshot: bool, drift: _Drift) -> None:
        self._settings, self._bundle, self._limits, self._from_snapshot = settings, bundle, limits, from_snapshot
        self._drift = drift
        self._watch: Any = None

    def begin(self, since_ms: int, *, until_ms: int | None = None) -> None:
        """Begins a window, with the records that were appended before a time, milliseconds since 1970."""
        from serving.skew.prove import read_records

        self._watch = self._drift.watch(self._bundle, since_ms)
        if self._watch is not None and until_ms is not None:
            with contextlib.closing(self._settings.open_log()) as log:
                log.create_topics(self._settings.topics.partitions())
                records, _ = read_records(log, self._settings.topics, since_ms=since_ms, until_ms=until_ms)
            self._watch.add(records)

    def compare(self, since_ms: int, until_ms: int | None) -> Any:
        """Returns the report of the records that were appended in a time, milliseconds since 1970."""
        from serving.skew.drift import DriftReport
        from serving.skew.prove import prove, read_records

        topics = self._settings.topics
        with contextlib.closing(self._settings.open_log()) as log:
            log.create_topics(topics.partitions())
            records, unreadable = read_records(log, topics, since_ms=since_ms, until_ms=until_ms)
            snapshot = self._settings.open_snapshots().newest(self._bundle) if self._from_snapshot else None
            report = prove(log, self._bundle, topics, records, snapshot=snapshot, limits=self._limits)
        if unreadable:
            report.skipped["unreadable"] += unreadable
        if self._watch is None:
            note = "the bundle is of a release without profiles; publish it again or name --profile"
            return replace(report, drift=DriftReport(self._bundle.id, note=note))
        self._watch.add(records)
        return replace(report, drift=self._watch.look())

    def write(self, path: Path) -> None:
        """Writes the profile of the window's records."""
        from features.errors import TesseraError
        from models.profile.profile import write_profile

        if self._watch is None:
            raise TesseraError("--write-profile: the bundle has no profile, whose cells are needed; publish it again")
        write_profile(self._watch.profile(), path)


def _show(report: Any, *, json: bool) -> None:
    if json:
        print_json(report.to_json())
    else:
        _print(report)
        _print_drift(report.drift)


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


def _print_drift(drift: Any) -> None:
    if drift.note:
        out_console.print(f"drift: not watched: {drift.note}", soft_wrap=True)
        return
    if not drift.users:
        return
    alarms = f"{len(drift.alarms)} of {len(drift.measures)} measures alarm"
    out_console.print(f"drift from {drift.reference}: {drift.users:,} users, {alarms}", soft_wrap=True)
    shown = drift.measures[: max(len(drift.alarms), _MOST_SHOWN)]
    table = Table("measure", "alarm", "PSI", "largest change")
    table.columns[0].no_wrap = True
    for one in shown:
        change = f"{one.cell}: {one.trained:.1%} to {one.served:.1%} of {one.users:,} users"
        table.add_row(one.name, "yes" if one.alarm else "no", f"{one.psi:.3f}", change)
    out_console.print(table)
