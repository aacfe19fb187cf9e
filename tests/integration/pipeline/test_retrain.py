"""`tessera retrain`: once for each state of the data, resumed where it was killed, published through the gates."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from features.errors import DatasetError
from features.lock import locked
from models.registry.release import CHALLENGER, CHAMPION
from tessera.demo.synthetic import write_synthetic
from tessera.retraining import _read
from tessera.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning")
# Ends of stages at which a retraining is killed; all by hand.
STAGES = os.environ.get("RETRAIN_STAGES", "frame train").split()
# Small data are noisy, so the gates are wide.
GATES = "auc=0.5 ne=0.9 calibration=9 slice_auc=0.9 latency=99 bytes=9 sure=0.9"
SMALL = ["training.max_epochs=1", "levels=2", "codes=16", *(f"gates.{gate}" for gate in GATES.split())]


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pl.DataFrame]:
    """A shop that has seen the first part of its events, and all events."""
    path = write_synthetic(tmp_path_factory.mktemp("shop"), users=80, items=100, events=3_000)
    events = pl.read_parquet(path.parent / "events.parquet")
    events.head(2_400).write_parquet(path.parent / "events.parquet")
    return path, events


class Shop:
    """A copy of the shop with a home of its own."""

    def __init__(self, directory: Path, source: Path) -> None:
        directory.mkdir(parents=True)
        self.path = directory / source.name
        for file in source.parent.iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        self.runs, self.home = directory / "runs", directory / "home"
        self.registry = Settings(home=self.home).open_registry()

    def start(self, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tessera", "retrain", str(self.path), "--out", str(self.runs), "--json"]
        chosen = [part for choice in SMALL for part in ("--set", choice)]
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("TESSERA_", "MLFLOW_"))
        }
        return subprocess.Popen(
            [*command, *chosen, *options], env=environment | {"TESSERA_HOME": str(self.home)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def retrain(self, *options: str) -> dict[str, Any]:
        with self.start(*options) as process:
            out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    def grow(self, events: pl.DataFrame, count: int) -> None:
        events.head(count).write_parquet(self.path.parent / "events.parquet")

    def killed(self, stage: str, begun: set[str]) -> None:
        """Retrains until a stage of a run that is not in `begun` has ended, and kills the process then."""
        with self.start() as process:
            give_up = time.monotonic() + 200
            while not [path for path in self.runs.glob(f"*/{stage}") if path.parent.name not in begun]:
                assert process.poll() is None
                assert time.monotonic() < give_up
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_each_state_of_the_data_is_trained_once_from_the_champion_s_run(
    grown: tuple[Path, pl.DataFrame], tmp_path: Path, subtests: pytest.Subtests
) -> None:
    source, events = grown
    shop = Shop(tmp_path / "a", source)
    model = "synthetic"
    first = shop.retrain()
    with subtests.test("the first run begins from new values and is champion"):
        assert (first["new"], first["warm_start"], first["answer"]) == (True, None, "")
        assert first["new_events"] == first["events"] > 0
        assert shop.registry.resolve(model, CHAMPION).bundle == first["bundle"]
    with subtests.test("nothing new trains and publishes nothing"):
        again = shop.retrain()
        assert (again["new"], again["bundle"], again["version"]) == (False, first["bundle"], first["version"])
        assert len(shop.registry.releases(model)) == 1
    shop.grow(events, 2_700)
    second = shop.retrain()
    with subtests.test("new events are trained from the champion's run and challenge it"):
        assert (second["new"], Path(second["warm_start"])) == (True, Path(first["directory"]))
        assert 0 < second["new_events"] < second["events"]
        assert second["answer"] == "passed"
        assert shop.registry.resolve(model, CHALLENGER).bundle == second["bundle"]
        assert shop.registry.lineage(shop.registry.resolve(model, CHALLENGER)).parent == first["bundle"]
    shop.grow(events, 3_000)
    third = shop.retrain("--keep", "1")
    with subtests.test("a run is kept while its bundle has an alias, or while a newer run began from it"):
        assert Path(third["warm_start"]) == Path(first["directory"]), "the champion's, not the newest"
        assert third["removed"] == [second["directory"]], "its bundle is no longer the challenger"
        assert Path(first["directory"]).is_dir()


@pytest.mark.slow
def test_a_retraining_that_is_killed_ends_as_one_that_was_not(grown: tuple[Path, pl.DataFrame], tmp_path: Path) -> None:
    source, events = grown
    calm, killed = (Shop(tmp_path / name, source) for name in ("calm", "killed"))
    for shop in (calm, killed):
        shop.retrain()
        shop.grow(events, 3_000)
    expected = calm.retrain()
    begun = {path.name for path in killed.runs.iterdir() if path.is_dir()}
    for stage in STAGES:
        killed.killed(stage, begun)
    found = killed.retrain()
    assert found["new"]
    assert found["bundle"] == expected["bundle"]
    assert len(killed.registry.releases("synthetic")) == len(calm.registry.releases("synthetic")) == 2
    assert killed.registry.resolve("synthetic", CHALLENGER).bundle == expected["bundle"]
    assert not killed.retrain()["new"]


def test_two_retrainings_of_one_directory_and_a_damaged_state_are_refused(
    grown: tuple[Path, pl.DataFrame], tmp_path: Path
) -> None:
    shop = Shop(tmp_path / "s", grown[0])
    with locked(shop.runs / "retrain", wait_s=0), shop.start() as process:
        _, err = process.communicate(timeout=100)
    assert process.returncode == 2
    assert "in use by another process" in err
    (shop.runs / "x").mkdir(parents=True)
    (shop.runs / "x" / "retrain.json").write_text('{"bundle": 3}')
    with pytest.raises(DatasetError, match=r"is no state of a retraining .*; remove .*/x"):
        _read(shop.runs / "x")
