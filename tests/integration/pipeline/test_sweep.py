"""Sweeps on real stages: killed and continued, blind to the test part, within bounds, and recorded in MLflow."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from features.dataset.descriptor import load_dataset
from features.errors import TesseraError
from models.registry.registry import Registry
from tessera.demo.synthetic import write_synthetic
from tessera.pipeline.options import load_options
from tessera.pipeline.run import run
from tessera.sweep.space import Base
from tessera.sweep.study import TrialReport
from tessera.sweep.sweep import BEST, SweepPlan, SweepResult, require_trials, sweep
from tessera.sweep.trial import Bounds
from tests.integration.world import quiet

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning")
ROOT = Path(__file__).parents[3]
GIVEN = ("quantizer=residual-kmeans", "training.max_epochs=3", "encoder_dim=16")
OVER = ("table.dim=8,16", "training.table_rate=0.03..0.3", "ranker.kind=dcn-v2,deepfm")
PLAN = SweepPlan(3, over=OVER)


def searched(descriptor: Path, out: Path, plan: SweepPlan = PLAN, registry: Registry | None = None) -> SweepResult:
    return sweep(Base(load_dataset(descriptor), GIVEN), out, plan, console=quiet(), registry=registry)


def results(found: SweepResult) -> list[TrialReport]:
    """The trials without their times, which differ from process to process."""
    return [
        TrialReport(*(getattr(one, name) for name in ("number", "state", "choices", "log_loss", "epochs", "bytes")))
        for one in found.trials
    ]


@pytest.fixture(scope="module")
def descriptor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("data"), users=80, items=100, events=3_000)


@pytest.fixture(scope="module")
def straight(descriptor: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    return searched(descriptor, tmp_path_factory.mktemp("sweep"))


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_to_the_same_trials(
    descriptor: Path, straight: SweepResult, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    shutil.copytree(straight.directory / "stages", out / "stages")
    words = ["sweep", str(descriptor), "--trials", "3", "--out", str(out)]
    words += [word for pair in GIVEN for word in ("--set", pair)] + [word for pair in OVER for word in ("--over", pair)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tessera", *words],
        cwd=ROOT,
        env=os.environ | {"TESSERA_HOME": str(tmp_path / "home")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    give_up = time.monotonic() + 400
    # The checkpoint of trial 1 is written after its first epoch.
    while not (out / "trials" / "00001").exists():
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        assert time.monotonic() < give_up
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()

    again = searched(descriptor, out)
    assert results(again) == results(straight)
    assert again.made < 3
    assert again.table == straight.table
    assert searched(descriptor, out).made == 0


@pytest.mark.slow
def test_trials_do_not_depend_on_the_test_part(descriptor: Path, straight: SweepResult, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(descriptor.parent, data)
    events = pl.read_parquet(data / "events.parquet").sort("time")
    last = pl.int_range(pl.len()) >= int(0.9 * events.height)
    other = pl.when(last).then(1 - pl.col("clicked")).otherwise(pl.col("clicked")).cast(events.schema["clicked"])
    flipped = events.with_columns(other.alias("clicked"))
    assert (flipped["clicked"] != events["clicked"]).sum() == 300
    flipped.write_parquet(data / "events.parquet")

    found = searched(data / descriptor.name, tmp_path / "sweep", replace(PLAN, trials=2))
    assert results(found) == results(straight)[:2]


@pytest.mark.slow
def test_a_run_with_the_pasted_table_trains_the_best_trial(
    descriptor: Path, straight: SweepResult, tmp_path: Path
) -> None:
    assert straight.best is not None
    pasted = descriptor.with_name("pasted.toml")
    pasted.write_text(descriptor.read_text() + "\n" + (straight.directory / BEST).read_text())
    dataset = load_dataset(pasted)
    result = run(dataset, tmp_path / "run", load_options(dataset), console=quiet(), registry=None, until="train")
    epochs = json.loads((result.directory / "train" / "ranker" / "epochs.json").read_text())
    assert tuple(epochs["validation_log_loss"]) == straight.best.epochs


@pytest.mark.slow
def test_bounds_make_trials_infeasible_and_each_trial_is_a_run(
    descriptor: Path, straight: SweepResult, tmp_path: Path
) -> None:
    out, most = tmp_path / "sweep", straight.trials[0].bytes
    assert most is not None
    shutil.copytree(straight.directory / "stages", out / "stages")
    registry = Registry(f"sqlite:///{tmp_path / 'mlflow.db'}", artifacts=tmp_path / "artifacts")
    plan = SweepPlan(2, Bounds(most - 1), ("table.dim=8",))
    base = Base(load_dataset(descriptor), GIVEN)

    def interrupt(report: TrialReport, wanted: int) -> None:
        raise KeyboardInterrupt

    stopped = sweep(base, out, plan, console=quiet(), registry=registry, told=interrupt)
    assert (stopped.stopped, stopped.best, len(stopped.trials)) == (True, None, 1)
    found = searched(descriptor, out, plan, registry)
    assert found.made == 1
    assert [one.state for one in found.trials] == ["infeasible", "finished"]
    assert found.trials[0].why == f"the table has {most:,} bytes, --bytes allows {most - 1:,}"
    assert found.best == found.trials[1]
    again = registry.trials.record(
        "synthetic", "x 0", state="finished", params={}, metrics={}, series={"loss": (0.5, 0.4)}
    )
    same = registry.trials.record(
        "synthetic", "x 0", state="finished", params={}, metrics={}, series={"loss": (0.5, 0.4)}
    )
    assert again == same
    assert len({one.run for one in found.trials} | {again}) == 3

    slow = searched(descriptor, tmp_path / "other", replace(plan, bounds=Bounds(latency=1e-6), trials=1))
    assert slow.trials[0].why == "a request takes 1.00x the default's time, --latency allows 1e-06x"
    with pytest.raises(TesseraError, match="no trial finished"):
        require_trials(slow)
    with pytest.raises(TesseraError, match="made with another space and bound"):
        searched(descriptor, out, replace(PLAN, bounds=Bounds()))
