"""A run in two processes: a bundle in row ranges that one process reads, also after the command was killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from features.errors import TrainingError
from models.bundle.bundle import load_bundle
from models.ranker import checkpoint
from models.ranker.loading import assembler, examples
from models.ranker.train import predict
from models.table.row_files import row_files
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.options import load_options
from tessera.pipeline.run import run
from tests.integration.world import World, quiet

ROOT = Path(__file__).parents[3]
CHOICES = ("training.max_epochs=1", "reads=id,code", "training.processes=2")


def started(world: World, out: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tessera", "run", str(world.dataset.directory / world.dataset.source.name)]
    command += ["--out", str(out), "--until", "train", "--processes", "2", *more]
    command += [word for choice in CHOICES[:2] for word in ("--set", choice)]
    environment = os.environ | {"TESSERA_HOME": str(out.parent / "home")}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def training(out: Path) -> list[int]:
    """Returns the ids of the processes that train into a directory."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = line.read_bytes()
        except OSError:
            continue
        if b"models.sharded.rank" in words and str(out).encode() in words:
            found.append(int(line.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes by /proc")
def test_a_run_in_two_processes_gives_a_bundle_of_row_ranges_also_after_it_was_killed(
    world: World, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(world.directory, tmp_path / "run"))
    command = started(world, out)
    while command.poll() is None and len(training(out)) < 2:
        time.sleep(0.05)
    command.send_signal(signal.SIGKILL)
    _, errors = command.communicate()
    assert command.returncode == -signal.SIGKILL, errors.decode()
    ended = time.monotonic() + 90
    while training(out) and time.monotonic() < ended:
        time.sleep(0.05)
    assert training(out) == []

    console = quiet()
    result = run(
        world.dataset, out, load_options(world.dataset, CHOICES), console=console, registry=None, until="publish"
    )
    assert "2 processes" in console.file.getvalue()  # type: ignore[attr-defined]
    assert result.bundle is not None
    bundle = load_bundle(result.bundle.directory)
    assert (bundle.manifest.format, len(row_files(bundle.directory))) == (6, 2)
    frame = read_frame(out / "frame")
    test = frame.part("test")
    found = predict(bundle.ranker(), assembler(bundle.schema, frame, test, bundle.admission()), examples(test))
    measured = bundle.manifest.metrics["quality"]["ranker"]["all"]["auc"]
    assert roc_auc_score(test["label"].to_numpy(), found.astype(np.float64)) == pytest.approx(measured, abs=1e-6)

    options = load_options(world.dataset, CHOICES[:2])
    single = run(world.dataset, out, options, console=quiet(), registry=None, until="publish").bundle
    assert single is not None
    assert [path.name for path in row_files(single.directory)] == ["table.safetensors"]
    assert single.manifest.metrics["quality"]["ranker"]["all"]["auc"] == pytest.approx(measured, abs=0.002)


def test_a_stopped_training_of_another_number_of_processes_is_kept_and_named(world: World, tmp_path: Path) -> None:
    out = Path(shutil.copytree(world.directory, tmp_path / "run"))
    kept = out / ".train.partial" / "ranker.checkpoint"
    kept.mkdir(parents=True)
    position = checkpoint.Position("key", 0, 8, (), 2)
    checkpoint.save(checkpoint.part_of(kept, 0), position, {"now.table.weight": torch.zeros(1)})
    options = load_options(world.dataset, CHOICES)
    for count in (1, 3):
        other = replace(options, training=replace(options.training, processes=count))
        with pytest.raises(TrainingError, match=rf"has 2 processes, this command {count}.*--processes 2"):
            run(world.dataset, out, other, console=quiet(), registry=None, until="train")
    assert kept.is_dir()
