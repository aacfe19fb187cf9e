"""The correction by neighbours repairs a planted error, does nothing to known items, and its control does nothing."""

from pathlib import Path

import numpy as np
import pytest

from features.content.encoder import unit
from features.errors import BundleError, TrainingError
from models.encoder.meaning.neighbours import (
    NeighbourCorrection,
    fit_correction,
    load_correction,
    mean_residuals,
)
from models.encoder.measure import LabelledPairs

USERS, ITEMS, D = 60, 300, 12


def _tastes(seed: int = 0) -> tuple[np.ndarray, LabelledPairs, LabelledPairs]:
    """Users who like one side of one dim of their own; the ranker knows nothing of it."""
    rng = np.random.default_rng(seed)
    vectors = unit(rng.normal(size=(ITEMS, D)))
    user = np.repeat(np.arange(USERS), 60)
    item = np.concatenate([rng.choice(ITEMS, 60, replace=False) for _ in range(USERS)])
    label = (vectors[item, user % D] + rng.normal(size=len(user)) * 0.05 > 0).astype(np.int64)
    pairs = LabelledPairs(user.astype(np.int64), item.astype(np.int64), label)
    new = item >= 240
    return vectors, pairs.where(~new), pairs.where(new)


def _loss(labels: np.ndarray, scores: np.ndarray) -> float:
    return float(-np.mean(np.where(labels == 1, np.log(scores), np.log(1 - scores))))


def test_residuals_of_near_items_correct_a_new_item() -> None:
    vectors, known, new = _tastes()
    flat = np.full(len(new.label), 0.5)
    like = NeighbourCorrection("lsa", 1.0)
    votes = mean_residuals(vectors, new, known, known.label - 0.5, like=like)
    fitted = fit_correction(new.label, flat, votes, source="lsa")
    assert fitted.weight > 0
    assert _loss(new.label, fitted.apply(flat, votes)) < 0.9 * _loss(new.label, flat)
    shuffled = mean_residuals(vectors, new, known, known.label - 0.5, like=like, permuted=1)
    control = fit_correction(new.label, flat, shuffled, source="lsa")
    assert _loss(new.label, control.apply(flat, shuffled)) > 0.97 * _loss(new.label, flat)


def test_an_item_with_enough_events_is_left_as_it_is() -> None:
    scores, votes = np.array([0.2, 0.2, 0.2]), np.array([0.5, 0.5, 0.5])
    correction = NeighbourCorrection("lsa", 2.0, most_events=10)
    corrected = correction.apply(scores, votes, np.array([0, 9, 10]))
    assert (corrected[:2] > 0.2).all()
    assert corrected[2] == 0.2


def test_a_user_without_labelled_items_gets_no_correction_and_an_item_never_votes_for_itself() -> None:
    vectors, known, _ = _tastes()
    like = NeighbourCorrection("lsa", 1.0)
    stranger = LabelledPairs(np.array([USERS + 5]), np.array([0]), np.array([1]))
    assert mean_residuals(vectors, stranger, known, known.label - 0.5, like=like).tolist() == [0.0]
    alone = LabelledPairs(np.array([0]), np.array([7]), np.array([1]))
    assert mean_residuals(vectors, alone, alone, np.array([0.9]), like=like).tolist() == [0.0]


def test_votes_do_not_depend_on_the_order_of_the_examples() -> None:
    vectors, known, new = _tastes()
    like = NeighbourCorrection("lsa", 1.0)
    votes = mean_residuals(vectors, new, known, known.label - 0.5, like=like)
    order = np.random.default_rng(1).permutation(len(new.user))
    shuffled = LabelledPairs(new.user[order], new.item[order], new.label[order])
    again = mean_residuals(vectors, shuffled, known, known.label - 0.5, like=like)
    assert np.allclose(again, votes[order], atol=1e-6)


def test_votes_that_do_not_help_get_no_weight() -> None:
    labels = np.tile([0, 1], 100)
    correction = fit_correction(labels, np.full(200, 0.5), -(labels - 0.5), source="lsa")
    assert correction.weight == 0.0
    with pytest.raises(TrainingError, match="expected 100 at least"):
        fit_correction(labels[:50], np.full(50, 0.5), np.zeros(50), source="lsa")


def test_a_saved_correction_is_the_correction(tmp_path: Path) -> None:
    correction = NeighbourCorrection("lsa", 3.5, most_events=7)
    correction.save(tmp_path)
    assert load_correction(tmp_path) == correction
    (tmp_path / "correction.json").write_bytes(b"{")
    with pytest.raises(BundleError, match="fit it again"):
        load_correction(tmp_path)
