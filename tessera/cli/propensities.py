"""Command `tessera propensities`: how likely users examine each position, from impressions that were explored."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from features.errors import DatasetError
from tessera.terminal import DatasetArgument, JsonOption, out_console, print_json

NONE = "no exploration: not estimable; set explore = 0.01 under [events.placement], and serve a new bundle"


def propensities(
    dataset: DatasetArgument,
    bundle: Annotated[Path | None, typer.Option(help="Directory of a bundle; prints its position path too.")] = None,
    outcome: Annotated[str | None, typer.Option(help="Kind of outcome; by default the label's.")] = None,
    json: JsonOption = False,
) -> None:
    """Estimate how likely users examine each position, from impressions in which chance arranged positions."""
    from features.config import nearest
    from features.dataset.descriptor import load_dataset
    from features.dataset.logs.impressions import joined_rows
    from features.shown.propensity import explored_sets
    from features.shown.propensity import propensities as estimated

    described = load_dataset(dataset)
    events = described.events
    if events.origin != "impressions":
        raise DatasetError(
            f'{described.source}: [events] from = "files": rows of files do not say which positions chance arranged; '
            'propensities are estimated from = "impressions"'
        )
    kind = outcome or str(events.label.column)
    if kind not in events.outcomes:
        near = nearest(kind, events.outcomes)
        raise DatasetError(f"--outcome {kind!r} is no kind of outcome of the dataset; the nearest is {near!r}")
    path = _path(bundle) if bundle is not None else None
    rows = joined_rows(events, described.directory)
    curves: dict[str, list[Any]] = {}
    for surface in sorted({row.surface for row in rows}):
        sets = explored_sets((row for row in rows if row.surface == surface), kind=events.outcomes.index(kind))
        curves[surface] = estimated(sets)
    if json:
        found = [{"surface": name, **_plain(one)} for name, curve in curves.items() for one in curve]
        print_json({"outcome": kind, "rows": len(rows), "propensities": found, "path": path})
        return
    for surface, curve in curves.items():
        _print(surface, curve, kind)
    if path is not None:
        _print_path(path)


def _plain(one: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(one)


def _path(directory: Path) -> dict[str, Any]:
    """Returns the position path of a bundle: the curve of each column, and the constant of a server.

    Raises:
        DatasetError: The bundle has no position path.
    """
    from models.bundle.bundle import load_bundle

    loaded = load_bundle(directory)
    if not loaded.schema.placement:
        if loaded.dataset.events.placement is not None:
            raise DatasetError(
                f"{directory}: the bundle has no position path, since its run found that the path does not pay; set "
                'placement = "always" under [run] to keep it'
            )
        raise DatasetError(f"{directory}: the bundle has no position path; declare [events.placement], and train again")
    path = loaded.network().placement
    return {"constant": float(path.reference), "curves": path.curves()}


def _print(surface: str, curve: list[Any], kind: str) -> None:
    where = f"surface {surface}" if surface else "no surface"
    if not curve:
        out_console.print(f"{where}: {NONE}", soft_wrap=True, highlight=False)
        return
    table = _table(f"{where}, outcome {kind}", ">position", ">propensity", ">95 % interval", ">explored", ">outcomes")
    for one in curve:
        known = one.value is not None
        value, bounds = (f"{one.value:.3f}", f"{one.low:.3f} to {one.high:.3f}") if known else ("not estimable", "")
        table.add_row(str(one.position), value, bounds, f"{one.shown:,}", f"{one.clicks:,}")
    out_console.print(table)


def _print_path(path: dict[str, Any]) -> None:
    table = _table("position path of the bundle", "column", "value", ">log-odds")
    for row in path["curves"]:
        table.add_row(row["column"], row["value"], f"{row['logit']:+.3f}")
    out_console.print(table)
    note = f"a server adds the constant {path['constant']:+.3f}; the log-odds above are relative to it"
    out_console.print(note, highlight=False)


def _table(title: str, *columns: str) -> Table:
    """Returns an empty table; a column whose name starts with > is right-aligned."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table
