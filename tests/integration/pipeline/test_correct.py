"""A run corrects new items where users have tastes, leaves the correction out where it does not pay, and refuses it."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from features.dataset.descriptor import Dataset, load_dataset
from features.errors import DatasetError
from features.frame import build_frame
from models.bundle.from_frame import kept_labels
from models.encoder.meaning.neighbours import LABELLED
from models.ranker.train import TrainConfig
from models.table.default_schema import TableOptions
from tessera.pipeline.options import RunOptions
from tessera.pipeline.run import run
from tests.build import SMALL_NETWORK, coloured_dataset, coloured_tables

OPTIONS = RunOptions(
    quantizer="residual-kmeans",
    encoder_dim=8,
    levels=2,
    codes=4,
    aggregates="off",
    correct="neighbours",
    training=TrainConfig(batch=64, max_epochs=1, network=SMALL_NETWORK),
)
DESCRIPTOR = """
name = "tastes"

[items]
path = "items.csv"
id = "item"
text = ["text"]

[events]
path = "events.csv"
user = "user"
item = "item"
time = "time"
label = { column = "label" }

[split]
by = "time"
"""


def _tastes(directory: Path, *, random: bool = False) -> Dataset:
    """Users who like the items of one of ten colours, so only a user's own labels say what the user likes."""
    rng = np.random.default_rng(0)
    directory.mkdir()
    names = [f"i{number}" for number in range(200)]
    colours = np.arange(200) % 10
    words = [f"a colour{colour} thing of colour{colour}" for colour in colours]
    pl.DataFrame({"item": names, "text": words}).write_csv(directory / "items.csv")
    user, item = rng.integers(0, 40, 6_000), rng.integers(0, 200, 6_000)
    label = rng.integers(0, 2, 6_000) if random else ((colours[item] + user) % 10 < 5).astype(int)
    events = {"user": [f"u{one}" for one in user], "item": [names[one] for one in item]}
    pl.DataFrame(events | {"time": np.arange(6_000), "label": label}).write_csv(directory / "events.csv")
    (directory / "tastes.toml").write_text(DESCRIPTOR)
    return load_dataset(directory / "tastes.toml")


def test_a_run_corrects_new_items_and_says_what_that_gives(tmp_path: Path) -> None:
    said = io.StringIO()
    dataset, out = _tastes(tmp_path / "data"), tmp_path / "out"
    console = Console(file=said, width=200)
    result = run(dataset, out, OPTIONS, console=console, registry=None, until="publish")
    assert result.bundle is not None
    report = result.bundle.manifest.metrics["correction"]
    assert report["auc"] > 0.02 > abs(report["permuted_auc"])
    assert report["log_loss"] < -0.01
    assert f"correct: {report['events']:,} events of held-out items: AUC +" in said.getvalue()
    correction = result.bundle.correction
    assert correction is not None
    assert correction.weight == report["weight"] > 0
    assert correction.space == result.bundle.manifest.encoder
    assert len(correction.rates) == 200
    assert result.bundle.manifest.choices["correct"] == "neighbours"
    again = run(dataset, out, OPTIONS, console=Console(quiet=True), registry=None, until="publish")
    assert again.executed == {}
    # Without the correction the stages before it stay in place.
    off = run(dataset, out, replace(OPTIONS, correct="off"), console=console, registry=None, until="publish")
    assert set(off.executed) == {"evaluate", "publish"}
    assert off.bundle is not None
    assert off.bundle.correction is None
    assert "correct" not in off.bundle.manifest.choices


def test_a_correction_that_does_not_pay_is_left_out(tmp_path: Path) -> None:
    said = io.StringIO()
    dataset = _tastes(tmp_path / "data", random=True)
    result = run(
        dataset, tmp_path / "out", OPTIONS, console=Console(file=said, width=200), registry=None, until="publish"
    )
    assert result.bundle is not None
    assert result.bundle.manifest.format == 4
    assert result.bundle.correction is None
    assert "left out, since it does not pay" in said.getvalue()


@pytest.mark.parametrize(
    ("options", "edit", "problem"),
    [
        ({}, ('text = ["text"]\n', ""), "the items have no content"),
        ({}, ('label = { column = "label" }', "label = { implicit = true }"), "every event is positive"),
        ({"reads": ("content",)}, None, 'add "id" to reads'),
        ({"table": TableOptions(admission=0)}, None, "set table.admission"),
    ],
)
def test_a_run_without_anything_to_correct_by_is_refused_before_its_first_stage(
    tmp_path: Path, options: dict[str, object], edit: tuple[str, str] | None, problem: str
) -> None:
    _tastes(tmp_path / "data")
    path = tmp_path / "data" / "tastes.toml"
    if edit is not None:
        path.write_text(path.read_text().replace(*edit))
    chosen = replace(OPTIONS, **options)  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match=problem) as error:
        run(load_dataset(path), tmp_path / "out", chosen, console=Console(quiet=True), registry=None, until="publish")
    assert "tastes.toml: correct" in str(error.value)
    assert not (tmp_path / "out" / "encode").exists()


def test_the_published_labels_are_the_last_of_each_user_before_the_test_part() -> None:
    dataset = coloured_dataset()
    frame = build_frame(dataset, coloured_tables(events=3_000), split=dataset.split, history_length=5)
    found = kept_labels(frame, LABELLED)
    events = frame.examples.filter(pl.col("split") != "test").sort("user", "time", "event")
    for user in range(20):
        own = events.filter(pl.col("user") == user).tail(2 * LABELLED)
        mine = found.filter(pl.col("user_id") == frame.users["user_id"][user])
        assert mine["item_id"].to_list() == frame.items["item_id"].gather(own["item"]).to_list()
        assert mine["label"].to_list() == own["label"].to_list()
        assert mine["time"].to_list() == own["time"].to_list()
    assert set(found["label"]) == {0, 1}
