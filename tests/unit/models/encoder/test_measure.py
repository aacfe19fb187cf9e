"""Co-likes against a slow twin, and measures on data whose right answer is known."""

import numpy as np
import pytest
from numpy.typing import NDArray

from features.content.encoder import unit
from models.encoder.likes import Likes, Neighbours
from models.encoder.measure import (
    ContentRanker,
    LabelledPairs,
    alignment,
    auc,
    gold,
    nearest,
    new_items,
    recall,
    uniformity,
)

ITEMS, USERS = 12, 40


@pytest.fixture(scope="module")
def events() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    return rng.integers(0, USERS, 200), rng.integers(0, ITEMS, 200)


def test_a_cosine_is_the_common_fans_over_the_geometric_mean_of_the_fans(
    events: tuple[NDArray[np.int64], NDArray[np.int64]],
) -> None:
    users, items = events
    fans = [set(users[items == item]) for item in range(ITEMS)]
    found = Likes(users, items, ITEMS).cosines(np.arange(ITEMS)).toarray()
    for one in range(ITEMS):
        for other in range(ITEMS):
            common = len(fans[one] & fans[other])
            wanted = common / np.sqrt(len(fans[one]) * len(fans[other])) if common >= 3 and one != other else 0
            assert found[one, other] == pytest.approx(wanted, rel=1e-6)


def test_gold_holds_the_best_known_items_and_never_a_new_one(
    events: tuple[NDArray[np.int64], NDArray[np.int64]],
) -> None:
    likes = Likes(*events, ITEMS)
    new = np.arange(ITEMS) < 3
    found = gold(likes, new, count=2)
    cosines = likes.cosines(np.arange(ITEMS)).toarray()
    assert set(found.of) == {0, 1, 2}
    for item in range(3):
        mine = found.of == item
        assert found.item[mine].min() >= 3
        np.testing.assert_allclose(found.cosine[mine], np.sort(cosines[item, 3:])[::-1][:2], rtol=1e-6)


def test_new_items_are_those_of_the_cold_start_bench() -> None:
    assert new_items(1_000, 3).tolist() == (np.random.default_rng([3, 1]).random(1_000) < 0.1).tolist()


def test_recall_counts_the_wanted_items_among_the_nearest_without_the_item_itself() -> None:
    angles = np.array([0.0, 0.1, 0.2, 0.9, 1.5])
    vectors = np.column_stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
    known = np.ones(5, dtype=bool)
    wanted = Neighbours(np.array([0, 0, 4]), np.array([1, 3, 0]), np.ones(3, dtype=np.float32))
    # Item 0 finds 1 and 2, item 4 finds 3 and 2.
    assert recall(vectors, wanted, known, count=2) == pytest.approx((0.5 + 0) / 2)
    # New items are not found themselves, so no place is lost to them.
    known[0] = False
    assert recall(vectors, Neighbours(np.array([0]), np.array([2]), np.ones(1, np.float32)), known, count=2) == 1
    assert recall(vectors, Neighbours(np.array([0]), np.array([3]), np.ones(1, np.float32)), known, count=2) == 0


def test_nearest_agrees_with_a_full_sort() -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(60, 5)))
    among = np.arange(60) % 3 > 0
    found = nearest(vectors[:7], vectors, among, 10)
    scores = np.where(among, vectors[:7] @ vectors.T, -np.inf)
    assert found.tolist() == np.argsort(-scores, axis=1)[:, :10].tolist()


def test_equal_pairs_are_aligned_and_a_single_point_is_least_uniform() -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(50, 8)))
    assert alignment(vectors, vectors) == 0
    assert alignment(vectors, -vectors) == pytest.approx(4)
    assert uniformity(np.tile(vectors[:1], (20, 1))) == pytest.approx(0, abs=1e-6)
    assert uniformity(vectors) < -2


def test_the_ranker_learns_what_content_says_and_nothing_from_shuffled_content() -> None:
    rng = np.random.default_rng(0)
    items, users, size = 300, 60, 9_000
    vectors, tastes = unit(rng.normal(size=(items, 6))), unit(rng.normal(size=(users, 6)))
    user, item = rng.integers(0, users, size), rng.integers(0, items, size)
    likes = np.einsum("nd,nd->n", vectors[item], tastes[user])
    examples = LabelledPairs(user, item, (likes + rng.normal(size=size) * 0.2 > 0).astype(np.int64))
    new = new_items(items, 0)
    train, test = examples.where(~new[item]), examples.where(new[item])
    good = auc(test.label, ContentRanker(vectors, train, users).predict(test))
    shuffled = vectors[rng.permutation(items)]
    bad = auc(test.label, ContentRanker(shuffled, train, users).predict(test))
    assert good > 0.85
    assert bad < 0.6


def test_a_training_example_does_not_know_its_own_label() -> None:
    """Pure noise stays unpredictable: a sum that holds the example's own vector would give its label away."""
    rng = np.random.default_rng(0)
    vectors = unit(rng.normal(size=(100, 30)))
    examples = LabelledPairs(rng.integers(0, 300, 1_500), rng.integers(0, 100, 1_500), rng.integers(0, 2, 1_500))
    ranker = ContentRanker(vectors, examples, 300)
    fresh = LabelledPairs(rng.integers(0, 300, 1_500), rng.integers(0, 100, 1_500), rng.integers(0, 2, 1_500))
    assert abs(auc(fresh.label, ranker.predict(fresh)) - 0.5) < 0.06
    own = ranker._features(examples, own=True)
    without = LabelledPairs(examples.user[1:], examples.item[1:], examples.label[1:])
    alone = ContentRanker(vectors, without, 300)
    alone._rate = ranker._rate
    np.testing.assert_allclose(own[0, :5], alone._features(examples.where(np.arange(1_500) == 0))[0, :5], atol=1e-5)
