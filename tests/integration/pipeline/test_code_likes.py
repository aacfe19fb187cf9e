"""A codebook with a term for co-liked items: a choice of the run that changes codes and nothing else of a codebook."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from features.dataset.tables import read_events
from features.errors import TesseraError
from features.jobs.shard import read_shards
from models.encoder.likes import training_likes
from models.semantic_id.codebook import kinds as codebooks
from tessera.encoders.run_items import RunItems
from tessera.pipeline.run import RunOptions, run
from tessera.pipeline.stage import made_of
from tests.integration.world import World, quiet

OPTIONS = RunOptions(code_likes=20.0, training=replace(RunOptions().training, max_epochs=1))


@pytest.fixture(scope="module")
def likes_run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("likes") / "out"
    run(world.dataset, out, OPTIONS, console=quiet(), registry=None, until="train")
    return out


def codes(out: Path) -> np.ndarray:
    return read_shards(out / "assign" / "codes")["codes"].to_numpy()


def test_likes_bring_codes_together_and_the_stage_names_what_it_read(world: World, likes_run: Path) -> None:
    assert made_of(likes_run / "assign").options["code_likes"] == 20.0
    assert "code_likes" not in made_of(world.directory / "assign").options
    assert set(made_of(likes_run / "assign").files) > set(made_of(world.directory / "assign").files)
    plain, joined = codes(world.directory), codes(likes_run)
    assert not np.array_equal(plain, joined)
    found = RunItems(likes_run)
    pairs = found.likes().neighbours(np.flatnonzero(found.known), found.known, count=5)

    def same(of: np.ndarray) -> float:
        return float((of[pairs.of, 0] == of[pairs.item, 0]).mean())

    assert same(joined) > same(plain)


def test_the_likes_before_the_frame_are_those_of_the_frame(world: World) -> None:
    items = RunItems(world.directory)
    found = training_likes(read_events(world.dataset)[0], world.dataset.split, items.ids)
    expected = items.likes()
    assert np.array_equal(found.fans, expected.fans)
    assert (found.cosines(np.arange(50)) != expected.cosines(np.arange(50))).nnz == 0


def test_a_warm_start_goes_on_from_such_a_codebook_with_its_names(
    world: World, likes_run: Path, tmp_path: Path
) -> None:
    warm = replace(OPTIONS, warm_start=likes_run)
    run(world.dataset, tmp_path / "warm", warm, console=quiet(), registry=None, until="assign")
    assert (codes(tmp_path / "warm")[:, 0] == codes(likes_run)[:, 0]).mean() > 0.7
    assert codebooks.load(tmp_path / "warm" / "assign" / "codebook").levels == 3


def test_a_codebook_without_such_a_term_is_refused_by_name(world: World, tmp_path: Path) -> None:
    other = RunOptions(code_likes=1.0, quantizer="residual-kmeans")
    with pytest.raises(TesseraError, match="code_likes: a residual-kmeans codebook has no term"):
        run(world.dataset, tmp_path / "out", other, console=quiet(), registry=None, until="assign")
