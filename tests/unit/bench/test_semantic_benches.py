"""The benches of Semantic IDs: what they hold out, what they claim, and that they run."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from features.dataset.descriptor import load_dataset
from features.errors import DatasetError
from features.frame import Frame
from models.ranker.evaluate import Quality
from models.ranker.train import TrainConfig
from models.semantic_id.report.compare import compare
from tessera.bench.offline import cold_start, id_churn, semantic_ids
from tessera.bench.offline.codebook_change import codebook_change
from tessera.bench.offline.semantic_ids import Coding, MeasuredCodebook
from tessera.demo.synthetic import write_synthetic
from tests.build import SMALL_NETWORK
from tests.integration.world import quiet

FAST = TrainConfig(max_epochs=1, network=SMALL_NETWORK)


@pytest.fixture(scope="module")
def descriptor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("data"), users=120, items=200, events=5_000)


def test_held_out_items_stand_in_no_history_and_in_no_part_but_new() -> None:
    examples = pl.DataFrame(
        {"item": [0, 1, 2, 1], "history": [[1, 2], [], [1], [0, 2]], "split": ["train", "train", "test", "test"]},
        schema={"item": pl.UInt32, "history": pl.List(pl.UInt32), "split": pl.String},
    )
    frame = Frame(pl.DataFrame(), pl.DataFrame(), examples)
    found = cold_start.without(frame, np.array([False, True, False])).examples
    assert found["history"].to_list() == [[2], [], [], [0, 2]]
    assert found["split"].to_list() == ["train", "new", "test", "new"]


def of_auc(known: float, new: float) -> dict[str, Quality]:
    blank = Quality(rows=1, positives=0.5, auc=0.0, log_loss=0.5, normalized_entropy=1.0, calibration_error=0.0)
    return {"known": replace(blank, auc=known), "new": replace(blank, auc=new)}


def test_claims_are_of_paired_differences() -> None:
    base = [0.70, 0.80, 0.75]
    gains = [0.03, 0.04, 0.035]
    found = {
        "user only": [of_auc(0.7, auc) for auc in base],
        "id + Semantic ID": [of_auc(0.7, auc + gain) for auc, gain in zip(base, gains, strict=True)],
    }
    value, p = cold_start.claims(found)
    assert value.value == pytest.approx(0.035)
    assert value.holds
    # The spread between seeds is larger than the gain, the spread of the gains is not.
    assert p.value == pytest.approx(0.0068, abs=5e-4)
    assert not cold_start.claims(found | {"user only": found["id + Semantic ID"]})[0].holds


def test_semantic_ids_are_claimed_against_rankers_that_have_everything_else() -> None:
    found = {name: [of_auc(0.7, 0.7)] * 2 for name in cold_start.VARIANTS}
    compared = [claim.claim for claim in cold_start.claims(found)]
    assert not any("hashed id" in claim for claim in compared)
    ours, theirs = cold_start.VARIANTS["id + Semantic ID"], cold_start.VARIANTS["id"]
    assert replace(ours, tokens=None) == theirs
    assert sum("less that of id" in claim for claim in compared) >= 4


def test_cold_start_measures_each_variant_on_known_and_new_items(descriptor: Path, tmp_path: Path) -> None:
    chosen = ["user only", "id", "id + Semantic ID"]
    result = cold_start.cold_start(
        load_dataset(descriptor), tmp_path, seeds=1, console=quiet(), parts=chosen, config=FAST
    )
    assert [row["variant"] for row in result.rows] == chosen
    assert all(0.3 < row["new_auc"] < 1 for row in result.rows)
    with pytest.raises(DatasetError, match="the items' columns are"):
        cold_start.cold_start(
            load_dataset(descriptor), tmp_path / "b", seeds=1, console=quiet(), held_out="nothing > 3", config=FAST
        )


@pytest.mark.slow
def test_a_codebook_that_changed_leaves_a_ranker_measured_at_three_times(descriptor: Path, tmp_path: Path) -> None:
    result = codebook_change(load_dataset(descriptor), tmp_path, seeds=1, console=quiet(), config=FAST)
    rows = {(row["new_codebook"], row["rows"]): row for row in result.rows}
    assert len(rows) == 8
    assert len(result.claims) == 4
    # From nothing it knows nothing at once, and something after an epoch.
    assert abs(rows["cold", "from nothing"]["auc_at_once"] - 0.5) < 0.1
    assert rows["cold", "from nothing"]["auc_epoch"] > 0.52
    assert rows["cold", "moved"]["auc_at_once"] != rows["cold", "left"]["auc_at_once"]


def test_churn_is_claimed_by_the_seed_that_speaks_most_against_it() -> None:
    codes = np.random.default_rng(0).integers(0, 4, size=(50, 3)).astype(np.uint16)
    other = codes.copy()
    other[:20] = (other[:20] + 1) % 4
    same, changed = (id_churn.Churn(compare(codes, after), 0.3, 0.2) for after in (codes, other))
    ways = {
        (kind, growth, way): [same, changed]
        for kind in ("rqvae", "residual-kmeans", "balanced-kmeans")
        for growth in id_churn.GROWTHS
        for way in id_churn.WAYS
    }
    claims = list(id_churn._claims(ways))
    assert [claim.holds for claim in claims[:3]] == [False, False, False]
    assert claims[1].value == pytest.approx(0.6)
    assert claims[2].value == pytest.approx(1.5)


def test_a_coding_is_measured_on_vectors_that_were_held_out() -> None:
    vectors = np.random.default_rng(1).normal(size=(400, 4)).astype(np.float32)
    seen: list[int] = []

    def method(given: np.ndarray, fitted: np.ndarray, seed: int) -> Coding:
        seen.append(int(fitted.sum()))
        decoded = np.where(fitted[:, None], given, given[~fitted].mean(axis=0))
        return Coding(np.tile(np.arange(3, dtype=np.uint16), (400, 1)), decoded.astype(np.float32), 2.0, 5.0)

    found = semantic_ids.measure(method, vectors, seed=0)
    assert 330 < seen[0] < 390
    assert found.error == 0
    assert found.held_out_error == pytest.approx(1.0, abs=1e-5)
    assert found.unique == pytest.approx(1 / 400)
    assert found.usage == pytest.approx(1 / 256)
    assert isinstance(found, MeasuredCodebook)


def fitted(seconds: float, error: float) -> MeasuredCodebook:
    return MeasuredCodebook(seconds, 200_000, error, error, 1.0, 1.0, 1.0)


def curves(
    ours: list[tuple[float, float]], theirs: list[tuple[float, float]]
) -> dict[tuple[str, int], list[MeasuredCodebook]]:
    """A seed in which each budget of the two methods took (seconds, error)."""
    found = {}
    for name, points in (("residual-kmeans", ours), ("faiss RQ, beam 1", theirs)):
        found |= {(name, b): [fitted(*at)] for b, at in zip(semantic_ids.BUDGETS[name][0], points, strict=True)}
    return found


def test_the_time_to_an_error_lies_between_the_budgets_around_it() -> None:
    curve = [fitted(1, 0.4), fitted(4, 0.2), fitted(8, 0.21), fitted(16, 0.1)]
    assert semantic_ids.seconds_to(0.5, curve) == 1
    assert semantic_ids.seconds_to(0.3, curve) == pytest.approx(2)
    assert semantic_ids.seconds_to(0.2, curve) == pytest.approx(4)
    assert semantic_ids.seconds_to(0.15, curve) == pytest.approx(8)
    assert semantic_ids.seconds_to(0.05, curve) == float("inf")


def test_codebooks_are_compared_at_equal_error_and_not_at_their_defaults() -> None:
    theirs = [(2.0, 0.25), (4.0, 0.22), (6.0, 0.20), (10.0, 0.20), (25.0, 0.20)]
    half = [(seconds / 2, error) for seconds, error in theirs]
    assert all(claim.holds for claim in semantic_ids.claims(curves(half, theirs)))
    # Fast at its default against the default of faiss, and slower than faiss for the same error.
    slow = [(3.0, 0.25), (6.0, 0.22), (9.0, 0.20), (9.5, 0.20), (12.0, 0.20)]
    reached, time, _ = semantic_ids.claims(curves(slow, theirs))
    assert reached.holds
    assert time.value == pytest.approx(1.5, rel=0.05)
    assert not time.holds
    worse = [(1.0, 0.3), (2.0, 0.28), (3.0, 0.26), (4.0, 0.25), (5.0, 0.24)]
    assert [claim.holds for claim in semantic_ids.claims(curves(worse, theirs))] == [False, False, True]
