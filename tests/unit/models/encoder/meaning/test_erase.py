"""Erasures take a planted concept from vectors; a gate leaves the vectors without the concept to the bit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from features.content.encoder import unit
from features.content.step import Erase, load_step
from features.errors import DatasetError
from models.encoder.meaning.concepts import Probe
from models.encoder.meaning.erase import cluster_means, leace, phrases, random_subspace

D = 16


def _planted(count: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    carries = rng.random(count) < 0.25
    vectors = rng.normal(size=(count, D))
    vectors[:, 0] += 5 * carries
    return unit(vectors), carries


def _separation(vectors: np.ndarray, carries: np.ndarray) -> float:
    """Largest difference of class means over the deviation, in any dim."""
    difference = vectors[carries].mean(axis=0) - vectors[~carries].mean(axis=0)
    return float(np.abs(difference / vectors.std(axis=0)).max())


def test_leace_equals_class_means_and_changes_vectors_least() -> None:
    vectors, carries = _planted()
    step = leace(vectors, carries, name="horror")
    erased = step(vectors)
    assert _separation(vectors, carries) > 1
    assert _separation(erased, carries) < 1e-3
    # A closed form: on whitened vectors the change is an orthogonal projection of rank 1.
    assert step.tensors["left"].shape == (D, 1)
    assert np.isclose((step.tensors["right"] @ step.tensors["left"]).item(), 1, atol=1e-4)


def test_the_control_leaves_the_concept() -> None:
    vectors, carries = _planted()
    assert _separation(random_subspace(vectors, 1, seed=1)(vectors), carries) > 1


@pytest.mark.parametrize("fit", ["clusters", "phrases"])
def test_a_gate_leaves_vectors_without_the_concept_to_the_bit(fit: str) -> None:
    vectors, carries = _planted()
    weight = np.zeros(D, dtype=np.float32)
    weight[0] = 1.0
    gate = Probe(weight, -0.5)
    open_gate = vectors[:, 0] > 0.5
    methods: dict[str, Callable[[], Erase]] = {
        "clusters": lambda: cluster_means(vectors, carries, gate, name="horror"),
        "phrases": lambda: phrases(vectors, np.eye(D)[:1], gate, name="horror"),
    }
    erased = methods[fit]()(vectors)
    assert np.array_equal(erased[~open_gate], vectors[~open_gate].astype(np.float64))
    assert np.abs(erased[open_gate, 0]).mean() < 0.5 * np.abs(vectors[open_gate, 0]).mean()


def test_a_saved_erasure_is_the_erasure(tmp_path: Path) -> None:
    vectors, carries = _planted()
    step = cluster_means(vectors, carries, None, name="horror")
    step.save(tmp_path)
    assert np.array_equal(load_step(tmp_path)(vectors), step(vectors))


def test_an_empty_concept_is_refused_by_name() -> None:
    vectors, _ = _planted()
    nothing = np.zeros(len(vectors), dtype=bool)
    with pytest.raises(DatasetError, match="concept 'horror' is empty"):
        leace(vectors, nothing, name="horror")
    with pytest.raises(DatasetError, match="concept 'horror' is empty"):
        phrases(vectors, np.zeros((2, D)), None, name="horror")
    with pytest.raises(DatasetError, match="'horror': 3 of 600 items"):
        cluster_means(vectors, np.arange(600) < 3, None, name="horror")
