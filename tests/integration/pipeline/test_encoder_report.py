"""The report of a run's spaces: a view beside its base, the control below both, and a second run beside the first."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from features.errors import TesseraError
from models.encoder.judging.measures import MEASURES
from models.encoder.tuning.options import TuneOptions
from tessera.cli.main import app
from tessera.encoders.report import CONTROL, report
from tessera.encoders.tune import ViewOptions, tune_view
from tests.integration.world import World


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("report") / "run"
    for stage in ("encode", "frame"):
        shutil.copytree(world.directory / stage, directory / stage)
    tune_view(directory, ViewOptions(tune=TuneOptions(rounds=3, patience=3, batch=64)))
    return directory


def test_a_report_names_every_space_and_its_control_finds_least(run: Path) -> None:
    document = report(run)
    spaces = {row["space"]: row for row in document["spaces"]}
    assert list(spaces) == ["base", "similar", CONTROL]
    assert spaces[CONTROL]["recall_later"] < min(spaces[name]["recall_later"] for name in ("base", "similar"))
    assert spaces[CONTROL]["uniformity"] < spaces["base"]["uniformity"]
    channels = {row["channel"]: row["hit@10"] for row in document["search"]}
    assert channels["fused"] >= channels["vectors"]
    assert spaces[CONTROL]["concepts"] < spaces["base"]["concepts"]
    (conditional,) = (row for row in document["conditional"] if row["space"] == "base")
    assert conditional["item_and_value"] > conditional["item_alone"]
    assert document["aspects"][0].keys() > {"run", "space"}
    assert set(document["measures"]) == set(MEASURES)
    assert document["measures"]["recall_later"] == spaces["similar"]["recall_later"]
    (encoder,) = document["encoders"]
    assert encoder["items_per_s"] > 0
    assert json.loads((run / "encoder-report.json").read_text()) == json.loads(json.dumps(document))
    assert CONTROL in (run / "encoder-report.html").read_text()


def test_two_runs_stand_side_by_side(run: Path, world: World) -> None:
    document = report(run, world.directory)
    assert {row["run"] for row in document["encoders"]} == {str(run), str(world.directory)}
    base = [row["recall_later"] for row in document["spaces"] if row["space"] == "base"]
    assert base[0] == base[1]


def test_the_command_prints_every_table_and_a_missing_run_is_refused(run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["encoder", "report", str(run)])
    assert result.exit_code == 0, result.output
    for word in ("spaces", "search", "encoders", "similar", "BM25", "conditional", "logged"):
        assert word in result.output
    with pytest.raises(TesseraError, match="encode"):
        report(tmp_path)
