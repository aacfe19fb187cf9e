"""Pairs by likes, by shared values, by texts and by a teacher; files that cannot be used are refused by name."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from features.content.encoder import unit
from features.errors import DatasetError
from models.encoder.likes import Likes
from models.encoder.pairs import co_liked, item_task, shared_value, teacher, text_pairs

IDS = [f"item-{number}" for number in range(8)]
VECTORS = unit(np.random.default_rng(0).normal(size=(8, 4)))
KNOWN = np.arange(8) < 6


def test_a_task_is_symmetric_and_names_no_item_that_is_not_known() -> None:
    rng = np.random.default_rng(0)
    likes = Likes(rng.integers(0, 20, 100), rng.integers(0, 8, 100), 8)
    task = co_liked(VECTORS, likes, KNOWN)
    dense = task.alike.toarray()
    assert (dense == dense.T).all()
    assert not dense[~KNOWN].any()
    assert not np.diag(dense).any()
    np.testing.assert_allclose(dense[:6, :6], likes.cosines(np.arange(8), 2).toarray()[:6, :6], rtol=1e-6)


def test_two_common_fans_are_enough_only_where_pairs_are_few() -> None:
    # Each user likes a pair of items; a pair has two fans, or three.
    pairs = [(first, second, 2 + (first + second) % 2) for first in range(60) for second in range(first)]
    names = {fan: number for number, fan in enumerate(dict.fromkeys((p, f) for p in pairs for f in range(p[2])))}
    events = [(names[pair, fan], item) for pair in pairs for fan in range(pair[2]) for item in pair[:2]]
    many = Likes(np.array([user for user, _ in events]), np.array([item for _, item in events]), 60)
    vectors = unit(np.random.default_rng(0).normal(size=(60, 4)))
    assert co_liked(vectors, many, np.ones(60, dtype=bool)).pairs == sum(fans == 3 for *_, fans in pairs) == 900
    # Ten items alone have five pairs of three fans an item or fewer.
    few = np.arange(60) < 10
    assert co_liked(vectors, many, few).pairs == 45


def test_the_control_has_the_same_weights_in_other_places() -> None:
    task = item_task("t", VECTORS, np.array([0, 1, 2]), np.array([1, 2, 3]), np.array([0.1, 0.2, 0.3], np.float32))
    control = task.permuted(0)
    assert sorted(control.alike.data) == sorted(task.alike.data)
    assert (control.alike != task.alike).nnz
    assert not control.alike[4:].nnz


def test_a_rare_shared_value_says_more_than_a_common_one() -> None:
    values = [["a", "rare"], ["a", "rare"], ["a"], ["a"], [], ["b"], ["b", "rare"], ["b"]]
    alike = shared_value(VECTORS, values, KNOWN, name="people", seed=0).alike
    assert alike[0, 1] == pytest.approx(1 / np.log2(5) + 1 / np.log2(3))
    assert alike[0, 2] == pytest.approx(1 / np.log2(5))
    assert alike[5].nnz == 0


def test_two_texts_of_an_item_are_a_pair() -> None:
    task = text_pairs("ict", VECTORS[:3], VECTORS[3:6], np.array([0, 0, 5]))
    assert task.pairs == 3
    assert task.item.tolist() == [0, 0, 5, 0, 0, 5]
    assert task.alike[2].indices.tolist() == [5]
    np.testing.assert_array_equal(task.vectors, VECTORS[:6])


def test_a_teachers_scores_become_likeness(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    rows = {"first": ["item-0", "item-1", "item-7"], "second": ["item-1", "item-0", "item-1"], "score": [2.0, 4.0, 8.0]}
    pl.DataFrame(rows).write_parquet(path)
    task = teacher(path, VECTORS, IDS, KNOWN)
    # The pair with a new item is left out; a pair that is named twice has the larger score.
    assert (task.name, task.pairs, task.alike[0, 1]) == ("scores", 1, 1.0)
    pl.DataFrame(rows).drop("score").write_parquet(path)
    assert teacher(path, VECTORS, IDS, KNOWN).alike[0, 1] == 1.0


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"first": ["item-0"], "score": [1.0]}, "'second' is missing"),
        ({"first": ["item-0"], "second": ["SKU-9"]}, "'SKU-9'"),
        ({"first": ["item-0"], "second": [None]}, "None"),
        ({"first": ["item-0"], "second": ["item-1"], "score": [-1.0]}, "row 1: score -1.0"),
        ({"first": ["item-0"], "second": ["item-1"], "score": [float("nan")]}, "row 1: score nan"),
        ({"first": ["item-0"], "second": ["item-1"], "score": [None]}, "row 1: score None"),
        ({"first": ["item-0"], "second": ["item-1"], "score": ["high"]}, "score"),
        ({"first": ["item-0"], "second": ["item-7"]}, "no pair of two known items"),
        ({"first": ["item-0"], "second": ["item-0"]}, "no pair of two known items"),
    ],
)
def test_a_file_of_pairs_that_cannot_be_used_is_refused_by_name(
    tmp_path: Path, columns: dict[str, list[object]], named: str
) -> None:
    path = tmp_path / "scores.parquet"
    pl.DataFrame(columns).write_parquet(path)
    with pytest.raises(DatasetError, match=named) as refused:
        teacher(path, VECTORS, IDS, KNOWN)
    assert str(path) in str(refused.value)


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    path.write_text("first,second\n")
    with pytest.raises(DatasetError, match="no pairs can be read"):
        teacher(path, VECTORS, IDS, KNOWN)
