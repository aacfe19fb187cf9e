"""The whole path on one machine: runs the offline job, goes live, and writes a report.

Log, store and registry are those of the settings, embedded or on servers. The bundle comes from the registry.
"""

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import polars as pl
from rich.console import Console
from rich.text import Text

from features.dataset.descriptor import Dataset, load_dataset
from features.dataset.profile import profile
from features.dataset.tables import read_table
from tessera.demo import synthetic
from tessera.demo.live import LiveInput, go_live
from tessera.demo.new_items import encode_row, plan_new_items
from tessera.demo.newcomer import Newcomer, choose_newcomer
from tessera.pages.demo_page import DemoSummary, render_summary, write_report
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.options import load_options
from tessera.pipeline.run import run
from tessera.settings import Settings


def demo(
    descriptor: Path | None, out: Path, settings: Settings, *, small: bool, console: Console, seed: int = 0
) -> Path:
    """Runs the demo and returns the path of the report.

    Args:
        descriptor: Path of the descriptor; None for a synthetic dataset.
        out: Directory of the run and the report.
        settings: Log, store and registry; see `own_home`.
        small: True for a synthetic dataset of 100 users, 400 items and 20,000 events.
        console: Prints progress bars and the key figures.
        seed: Seed of the synthetic dataset, the training, the new items, and the draw of users; 0 or more.

    Raises:
        TesseraError: A stage cannot run, or log or store does not answer.
    """
    if descriptor is None:
        size = {"users": 100, "items": 400, "events": 20_000} if small else {}
        descriptor = synthetic.write_synthetic(out / "synthetic", seed=seed, **size)
        console.print(Text(f"a synthetic dataset, generated: {descriptor}", "dim"))
    dataset = load_dataset(descriptor)
    counts = profile(dataset)
    registry = settings.open_registry()
    options = load_options(dataset, [f"seed={seed}"])
    result = run(dataset, out / "run", options, console=console, registry=registry, until="publish")
    assert result.bundle is not None
    newcomer = choose_newcomer(dataset, result.bundle)
    given = LiveInput(
        bundle=result.bundle,
        held_back=_held_back(dataset, out / "run"),
        plan=plan_new_items(dataset, result.bundle, out / "run", seed=seed),
        newcomer=newcomer,
        titles=_titles(dataset, newcomer),
    )
    live = go_live(settings, given, console)
    epochs = msgspec.json.decode((out / "run" / "train" / "ranker" / "epochs.json").read_bytes())
    summary = DemoSummary(
        title="Tessera demo",
        dataset=dataset.name,
        synthetic=synthetic.is_synthetic(dataset.directory),
        bundle=result.bundle.id,
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        profile=_profile_lines(counts.to_json()),
        quality=result.metrics["quality"],
        semantic_ids=result.metrics.get("semantic_ids"),
        stage_seconds=dict(result.executed),
        validation_log_loss=epochs["validation_log_loss"],
        **live,
    )
    report = out / "report.html"
    write_report(report, summary)
    render_summary(console, summary)
    return report


def _held_back(dataset: Dataset, run_directory: Path) -> list[bytes]:
    """Returns the events of the test part as messages in time order, as rows of the dataset's events table."""
    test = read_frame(run_directory / "frame").blocks("test").whole("event", "time")
    test = test.unique("event", keep="first").sort("time", "event")
    raw = read_table(dataset.events, dataset.directory, table="events")
    return [encode_row(row) for row in raw[test["event"].to_numpy()].iter_rows(named=True)]


def _titles(dataset: Dataset, newcomer: Newcomer | None) -> dict[str, str]:
    if dataset.items is None or not dataset.items.text:
        return {}
    raw = read_table(dataset.items, dataset.directory, table="items")
    ids = raw[dataset.items.id].cast(pl.String).to_list()
    texts = [str(text or "")[:80] for text in raw[dataset.items.text[0]].to_list()]
    return dict(zip(ids, texts, strict=True)) | ({newcomer.item: newcomer.title} if newcomer else {})


def _profile_lines(counts: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = []
    for name, value in counts.items():
        if isinstance(value, bool | int | float | str):
            lines.append((name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value)))
    return lines
