"""The correction by neighbours repairs a planted error, its control does nothing, and its bits depend on no batch."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.content.encoder import unit
from features.errors import BundleError, TrainingError
from models.encoder.meaning.neighbours import (
    LABELLED,
    LabelledItems,
    NeighbourCorrection,
    coded_labels,
    corrected,
    fit_weight,
    item_rates,
    load_correction,
    odds,
)
from models.ranker.correct import labelled_before, permuted_votes

USERS, ITEMS, D = 60, 300, 12
RATES = np.random.default_rng(9).normal(0, 0.2, ITEMS - 60).astype(np.float32)
LIKE = NeighbourCorrection("lsa-1", 1.0, 0.5, RATES)


def _tastes(seed: int = 0) -> tuple[np.ndarray, pl.DataFrame, pl.DataFrame]:
    """Users who like one side of one dim of their own; the ranker knows nothing of it. Items from 240 are new."""
    rng = np.random.default_rng(seed)
    vectors = unit(rng.normal(size=(ITEMS, D)))
    user = np.repeat(np.arange(USERS), 60)
    item = np.concatenate([rng.choice(ITEMS, 60, replace=False) for _ in range(USERS)])
    label = (vectors[item, user % D] + rng.normal(size=len(user)) * 0.05 > 0).astype(np.int64)
    events = pl.DataFrame({"user": user, "item": item, "time": np.tile(np.arange(60), USERS), "label": label})
    return vectors, events.filter(pl.col("item") < 240), events.filter(pl.col("item") >= 240)


def _loss(labels: np.ndarray, scores: np.ndarray) -> float:
    return float(-np.mean(np.where(labels == 1, np.log(scores), np.log(1 - scores))))


def _slow_vote(correction: NeighbourCorrection, asked: int, items: list[int], labels: list[int], vectors: np.ndarray):
    """The same vote, one labelled item after another, in the words of the decision record."""

    def rate(item: int) -> float:
        return float(correction.rates[item]) if item < len(correction.rates) else 0.0

    likely = (sum(labels) + 5 * correction.base_rate) / (len(labels) + 5)
    base = np.log(likely / (1 - likely))
    said = [label - 1 / (1 + np.exp(-(base + rate(item)))) for item, label in zip(items, labels, strict=True)]
    mean = sum(said) / len(said)
    total = weights = 0.0
    for item, value in zip(items, said, strict=True):
        near = 0.0 if item == asked else max(float(vectors[asked].astype(float) @ vectors[item].astype(float)), 0) ** 4
        total, weights = total + near * (value - mean), weights + near
    return correction.weight * total / (weights + 0.3)


def test_labels_of_near_items_correct_a_new_item_and_dealt_out_labels_do_not() -> None:
    vectors, known, new = _tastes()
    labels, flat = new["label"].to_numpy(), np.full(new.height, 0.5)
    labelled = labelled_before(new, known)
    votes, _ = LIKE.votes(new["item"].to_numpy(), labelled, vectors)
    weight = fit_weight(labels, flat, votes)
    assert weight > 0
    assert _loss(labels, corrected(flat, weight * votes)) < 0.93 * _loss(labels, flat)
    dealt = permuted_votes(LIKE, new["item"].to_numpy(), labelled, vectors, seed=1)
    control = fit_weight(labels, flat, dealt)
    assert _loss(labels, corrected(flat, control * dealt)) > 0.99 * _loss(labels, flat)


@given(count=st.integers(1, LABELLED), seed=st.integers(0, 50), asked=st.lists(st.integers(0, ITEMS - 1), min_size=1))
def test_the_votes_are_those_of_the_slow_twin_in_any_batch_bit_for_bit(count: int, seed: int, asked: list[int]) -> None:
    rng = np.random.default_rng(seed)
    vectors = unit(rng.normal(size=(ITEMS, D)))
    items, labels = rng.integers(0, ITEMS, count), rng.integers(0, 2, count)
    labelled, rows = LabelledItems.of(items, labels), np.array(asked)
    together, parts = LIKE.votes(rows, labelled, vectors)
    each = np.concatenate([LIKE.votes(rows[place : place + 1], labelled, vectors)[0] for place in range(len(rows))])
    # In a batch of examples each row has labelled items of its own.
    repeated = LabelledItems(labelled.items.repeat(len(rows), axis=0), labelled.labels.repeat(len(rows), axis=0))
    of_examples, _ = LIKE.votes(rows, repeated, vectors)
    assert together.tobytes() == each.tobytes() == of_examples.tobytes()
    assert parts.sum(axis=1).tolist() == together.tolist()
    slow = [_slow_vote(LIKE, one, items.tolist(), labels.tolist(), vectors) for one in asked]
    np.testing.assert_allclose(together, slow, atol=1e-5)
    scores = rng.random(len(rows)).astype(np.float32)
    one_by_one = [corrected(scores[n : n + 1], together[n : n + 1])[0] for n in range(len(rows))]
    assert corrected(scores, together).tolist() == one_by_one


def test_only_the_labelled_items_before_an_event_vote_and_only_the_last_of_them() -> None:
    many = LABELLED + 5
    known = pl.DataFrame({"user": [0] * many, "item": range(many), "time": range(many), "label": [1, 0] * 32 + [1]})
    asked = pl.DataFrame({"user": [0, 0, 0, 1], "item": [99] * 4, "time": [0, 2, 99, 99], "label": [1] * 4})
    found = labelled_before(asked, known)
    assert [(row >= 0).sum() for row in found.items] == [0, 2, LABELLED, 0]
    assert found.items[1, :2].tolist() == [0, 1]
    assert found.labels[1, :2].tolist() == [1, 0]
    assert found.items[2].tolist() == list(range(5, many))
    late = labelled_before(asked, known, lag=1)
    assert [(row >= 0).sum() for row in late.items] == [0, 1, LABELLED, 0]


def test_a_user_without_labelled_items_and_a_user_who_likes_everything_get_no_correction() -> None:
    vectors, *_ = _tastes()
    plain = NeighbourCorrection("lsa-1", 5.0, 0.5, np.zeros(ITEMS, dtype=np.float32))
    nothing = LabelledItems.of(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    fond = LabelledItems.of(np.arange(20), np.ones(20, dtype=np.int64))
    scores = np.array([0.25, 0.5, 0.75], dtype=np.float32)
    for labelled in (nothing, fond):
        votes, _ = plain.votes(np.array([250, 251, 252]), labelled, vectors)
        np.testing.assert_allclose(votes, 0, atol=1e-12)
    assert corrected(scores, np.array([0.0, 0.5, 0.0])).tolist()[::2] == scores.tolist()[::2]
    assert corrected(scores, np.array([0.0, 0.5, 0.0]))[1] == np.float32(1 / (1 + np.exp(-0.5)))


def test_an_item_never_votes_for_itself() -> None:
    vectors, *_ = _tastes()
    alone = LabelledItems.of(np.array([250, 7]), np.array([1, 0]))
    _, parts = LIKE.votes(np.array([250]), alone, vectors)
    assert parts[0, 0] == 0
    assert not parts[0, 2:].any()


def test_votes_that_do_not_help_get_no_weight_and_few_events_none_at_all() -> None:
    labels = np.tile([0, 1], 100)
    assert fit_weight(labels, np.full(200, 0.5), -(labels - 0.5)) == 0.0
    with pytest.raises(TrainingError, match="50 events of items held out, expected 100 at least"):
        fit_weight(labels[:50], np.full(50, 0.5), np.zeros(50))


def test_the_rate_of_an_item_is_drawn_to_the_base_rate_and_a_label_goes_with_its_item() -> None:
    rates = item_rates(np.array([0, 10, 10_000]), np.array([0, 10, 9_000]), 0.5)
    expected = odds(np.array([0.5, 15 / 20, 0.9]))
    np.testing.assert_allclose(rates, expected, atol=0.01)
    assert coded_labels(np.array([3, 4]), np.array([1, 0])).tolist() == [7, 8]


def test_a_saved_correction_is_the_correction_and_its_id_changes_with_any_byte(tmp_path: Path) -> None:
    LIKE.save(tmp_path)
    found = load_correction(tmp_path)
    assert (found.id, found.weight, found.base_rate, found.space) == (LIKE.id, 1.0, 0.5, "lsa-1")
    assert found.rates.tobytes() == RATES.tobytes()
    others = (NeighbourCorrection("lsa-1", 1.0, 0.5, RATES * 2), NeighbourCorrection("lsa-2", 1.0, 0.5, RATES))
    assert len({LIKE.id, *(other.id for other in others)}) == 3
    (tmp_path / "correction.json").write_bytes(b"{")
    with pytest.raises(BundleError, match="fit it again"):
        load_correction(tmp_path)
    LIKE.save(tmp_path)
    (tmp_path / "rates.safetensors").write_bytes(b"")
    with pytest.raises(BundleError, match="fit it again"):
        load_correction(tmp_path)
