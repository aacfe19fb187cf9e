"""Measures of predictions, against values worked out by hand."""

import numpy as np
import pytest

from models.evaluate import Popularity, Quality, by_item_novelty, calibration_error, quality

LABELS = np.array([1, 0, 1, 0], dtype=np.float32)


def test_measures_by_hand() -> None:
    found = quality(LABELS, np.array([0.8, 0.4, 0.3, 0.2]))
    assert (found.rows, found.positives) == (4, 0.5)
    # Of the four pairs of a positive and a negative, only (0.3, 0.4) stands the wrong way round.
    assert found.auc == 3 / 4
    loss = -np.log([0.8, 0.6, 0.3, 0.8]).mean()
    assert found.log_loss == pytest.approx(loss)
    assert found.normalized_entropy == pytest.approx(loss / np.log(2))


def test_a_tie_counts_half() -> None:
    assert quality(LABELS, np.array([0.5, 0.5, 0.5, 0.1])).auc == (0.5 + 1 + 0.5 + 1) / 4


def test_predicting_the_positive_rate_is_a_normalized_entropy_of_one_and_an_auc_of_a_half() -> None:
    labels = np.array([1, 0, 0, 0, 0], dtype=np.float32)
    found = quality(labels, np.full(5, 0.2))
    assert found.normalized_entropy == pytest.approx(1)
    assert found.auc == 0.5


def test_certainty_is_clipped_and_never_infinite() -> None:
    wrong = quality(LABELS, 1 - LABELS)
    assert wrong.auc == 0
    assert wrong.log_loss == pytest.approx(-np.log(1e-7), rel=1e-4)
    assert quality(LABELS, LABELS.astype(np.float32)).log_loss == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("label", [0, 1])
def test_one_label_alone_has_a_loss_but_no_auc(label: int) -> None:
    found = quality(np.full(3, label, dtype=np.float32), np.full(3, 0.5))
    assert found == Quality(3, label, None, pytest.approx(np.log(2)), 0.5, None)


def test_no_examples_have_no_measures() -> None:
    assert quality(LABELS[:0], LABELS[:0]) == Quality(0, 0.0, None, None, None, None)


def test_known_and_unseen_items_make_up_all() -> None:
    probabilities = np.array([0.8, 0.4, 0.3, 0.2])
    known = np.array([True, True, False, False])
    found = by_item_novelty(LABELS, probabilities, known)
    assert list(found) == ["all", "known", "unseen"]
    assert found["all"] == quality(LABELS, probabilities)
    assert found["known"] == quality(LABELS[:2], probabilities[:2])
    assert found["unseen"] == quality(LABELS[2:], probabilities[2:])


def test_popularity_is_drawn_towards_the_overall_rate() -> None:
    items, labels = np.array([0, 0, 0, 1]), np.array([1, 1, 0, 0], dtype=np.float32)
    predict = Popularity(items, labels, size=3, prior=2.0)
    np.testing.assert_allclose(predict(np.array([0, 1, 2, 0])), [3 / 5, 1 / 3, 1 / 2, 3 / 5])


def test_calibration_error_is_the_mean_distance_of_bins_from_their_shares() -> None:
    rng = np.random.default_rng(0)
    true = rng.random(150_000)
    labels = (rng.random(len(true)) < true).astype(np.float32)
    assert calibration_error(labels, true) < 0.01
    assert calibration_error(labels, np.clip(true + 0.1, 0, 1)) == pytest.approx(0.095, abs=0.01)
    assert calibration_error(labels, np.full(len(true), 0.5)) == pytest.approx(abs(labels.mean() - 0.5), abs=0.01)
    assert calibration_error(np.ones(1, dtype=np.float32), np.array([0.25])) == 0.75
