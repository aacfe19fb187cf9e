"""A small synthetic dataset, run once to a bundle, that the integration tests of the online parts share."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from features.dataset.descriptor import Dataset, load_dataset
from features.dataset.tables import read_table
from models.bundle.bundle import Bundle, load_bundle
from tessera.demo.synthetic import write_synthetic
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.run import RunOptions, run


@dataclass(frozen=True)
class World:
    """A finished run."""

    dataset: Dataset
    directory: Path
    bundle: Bundle

    def messages(self, count: int) -> list[bytes]:
        """The first held-back events, as messages in time order."""
        test = read_frame(self.directory / "frame").part("test")
        raw = read_table(self.dataset.events, self.dataset.directory, table="events")
        rows = raw[test.sort("time", "event")["event"].to_numpy()[:count]].to_dicts()
        return [json.dumps(row, default=str).encode() for row in rows]


def quiet() -> Console:
    """A console that prints nowhere."""
    return Console(file=io.StringIO())


def make_world(directory: Path, **options: Any) -> World:
    """Generates the data and does the offline job."""
    descriptor = write_synthetic(directory / "data", users=200, items=300, events=8_000)
    dataset = load_dataset(descriptor)
    result = run(dataset, directory / "run", RunOptions(**options), console=quiet(), registry=None, until="publish")
    assert result.bundle is not None
    (directory / "made").touch()
    return World(dataset, directory / "run", result.bundle)


def open_world(directory: Path) -> World:
    """Opens a world that another process has made."""
    run = directory / "run"
    (descriptor,) = (directory / "data").glob("*.toml")
    return World(load_dataset(descriptor), run, load_bundle(run / "publish" / "bundle"))
