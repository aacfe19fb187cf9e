"""Measures of predictions, against values worked out by hand."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from models.ranker.evaluate import (
    LEAST_OF_LABEL,
    PARTS,
    RATE_BASELINES,
    Keys,
    Popularity,
    Quality,
    added,
    by_novelty,
    calibration_error,
    novelty,
    quality,
    rate_baselines,
    running_rates,
)
from tests.build import coloured_frame

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


def test_known_and_unseen_items_and_known_and_unseen_users_each_make_up_all() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(400) < 0.4).astype(np.float32)
    probabilities = rng.random(400)
    items, users = (Keys(rng.integers(0, size, 400), rng.random(400) < share) for size, share in ((30, 0.8), (9, 0.3)))
    found = by_novelty(labels, probabilities, items, users)
    assert found.keys() == PARTS.keys()
    assert found["all"] == quality(labels, probabilities)
    for ending, keys in (("", items), ("_users", users)):
        for name, held in (("known", keys.known), ("unseen", ~keys.known)):
            part = found[f"{name}{ending}"]
            assert part == replace(quality(labels[held], probabilities[held]), distinct=len(set(keys.ids[held])))
            assert part.auc is not None
        assert found[f"known{ending}"].rows + found[f"unseen{ending}"].rows == 400


@pytest.mark.parametrize("positives", [0, LEAST_OF_LABEL - 1, LEAST_OF_LABEL])
def test_a_part_with_too_few_of_a_label_has_rows_and_users_but_no_auc(positives: int) -> None:
    labels = np.repeat(np.array([1, 0], dtype=np.float32), [positives, 50])
    probabilities = np.linspace(0.1, 0.9, len(labels))
    nothing = Keys(np.arange(len(labels)), np.zeros(len(labels), dtype=np.bool_))
    for mirrored in (labels, 1 - labels):
        found = by_novelty(mirrored, probabilities, nothing, nothing)
        unseen = found["unseen_users"]
        assert (unseen.rows, unseen.distinct) == (len(labels), len(labels))
        assert (unseen.auc is None) == (unseen.normalized_entropy is None) == (positives < LEAST_OF_LABEL)
        assert found["known_users"] == Quality(0, 0.0, None, None, None, None, distinct=0)


def test_a_dataset_without_users_has_empty_parts_by_user() -> None:
    frame = coloured_frame()
    assert novelty(frame.replace(users=frame.users.clear()), "user") is None
    found = by_novelty(LABELS, LABELS, None, None)
    assert found["all"].rows == 4
    assert {part for part, one in found.items() if one.rows == 0} == PARTS.keys() - {"all"}


def test_users_of_the_test_part_are_known_by_their_training_events_alone() -> None:
    frame = coloured_frame()
    test, first = frame.part("test"), frame.part("test")["user"][0]
    # The user keeps the events of the validation part.
    examples = frame.examples.filter((pl.col("user") != first) | (pl.col("split") != "train"))
    found = novelty(frame.replace(examples=examples), "user")
    assert found is not None
    np.testing.assert_array_equal(found.ids, test["user"].to_numpy())
    np.testing.assert_array_equal(found.known, test["user"].to_numpy() != first)


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


def test_added_rates_are_log_odds_over_those_of_the_overall_rate() -> None:
    users, items = np.array([0.5, 0.2, 1.0]), np.array([0.8, 0.2, 1.0])
    # Odds of 1 and 4 over a rate of a half, then a quarter and a quarter.
    found = added(users, items, 0.5)
    np.testing.assert_allclose(found[:2], [4 / 5, (1 / 16) / (1 + 1 / 16)])
    assert 0.999 < found[2] < 1
    np.testing.assert_allclose(added(users[:1], np.array([0.2]), 0.2), [0.5])


def test_a_running_rate_counts_what_came_strictly_before_and_nothing_of_the_same_time_or_later() -> None:
    rng = np.random.default_rng(0)
    keys, times = rng.integers(0, 7, 400), rng.integers(0, 60, 400)
    labels = (rng.random(400) < 0.3).astype(np.float32)
    found = running_rates(keys, times, labels, rate=0.3, prior=5.0)
    for n in range(400):
        before = (keys == keys[n]) & (times < times[n])
        assert found[n] == pytest.approx((labels[before].sum() + 5 * 0.3) / (before.sum() + 5))


def test_the_counting_baselines_predict_the_test_part_in_its_order() -> None:
    frame = coloured_frame(events=3_000, items=12, users=6)
    test = frame.part("test")
    found = rate_baselines(frame)
    assert tuple(found) == RATE_BASELINES
    # The label is decided by the item, so a baseline that mixes the rows up falls to a half.
    labels = test["label"].to_numpy().astype(np.float32)
    assert all((quality(labels, probabilities).auc or 0) > 0.99 for probabilities in found.values())
    # A label of the test part changes the running rates of later rows, and no static ones.
    first = pl.col("event") == test["event"][0]
    examples = frame.examples.with_columns(label=pl.when(first).then(1 - pl.col("label")).otherwise(pl.col("label")))
    other = rate_baselines(frame.replace(examples=examples))
    np.testing.assert_array_equal(found["user-item"], other["user-item"])
    changed = found["user-item-running"] != other["user-item-running"]
    assert not changed[0]
    assert changed.any()
