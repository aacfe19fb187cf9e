"""Measures of concepts and aspects on small answers that are known by construction."""

import numpy as np

from features.content.encoder import unit
from models.encoder.meaning import judge


def test_an_item_is_not_its_own_neighbour() -> None:
    vectors = unit(np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.0]]))
    found = judge.nearest_others(vectors, 2)
    assert found.shape == (4, 2)
    assert all(row not in others for row, others in enumerate(found.tolist()))
    assert set(found[0].tolist()) == {1, 3}


def test_shares_and_kept_items_are_counted_over_all_answers() -> None:
    carries = np.array([True, False, False, False])
    before, after = np.array([[0, 1], [1, 2]]), np.array([[1, 3], [2, 3]])
    assert judge.share(before, carries) == 0.25
    # Found before and without the concept: 1, 1 and 2; of these, 1 and 2 are found after.
    assert judge.others_kept(before, after, carries) == 2 / 3


def test_only_items_with_a_value_count_when_values_are_shared() -> None:
    values = [{"war"}, {"war", "drama"}, set(), {"comedy"}]
    found = np.array([[1, 3], [0, 3]])
    assert judge.sharing(found, np.array([0, 2]), values) == 0.5


def test_items_of_the_user_and_excluded_items_are_never_found() -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(10, 4)))
    out = np.zeros(10, dtype=bool)
    out[3] = True
    found = judge.search(vectors[:2], vectors, 5, seen=[np.array([0, 1]), np.array([2])], out=out)
    assert not {0, 1, 3} & set(found[0].tolist())
    assert not {2, 3} & set(found[1].tolist())
