"""Vectors that a team brings: every form of a column gives the same bits, and no wrong vector passes."""

import json
from collections.abc import Sequence

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.content.content import Content
from features.content.encoder import unit
from features.content.given.encoder import GivenVectors, with_vectors
from features.errors import DatasetError
from features.value.vector import GivenSpace, VectorFault, read_vectors, vector_texts

SPACE = GivenSpace(column="v", space="clip-v3", dim=4)
NUMBER = st.floats(width=32, allow_nan=False, allow_infinity=False)
VECTOR = st.lists(NUMBER, min_size=4, max_size=4).filter(any)
SMALL = st.lists(st.floats(-8, 8, width=32).filter(lambda one: one == 0 or abs(one) > 1e-3), min_size=4, max_size=4)


def forms(vectors: Sequence[list[float] | None]) -> list[pl.Series]:
    """The column as lists and arrays of both widths, and as the JSON text of a csv."""
    lists = pl.Series("v", vectors, dtype=pl.List(pl.Float64))
    typed = [lists, lists.cast(pl.List(pl.Float32)), lists.cast(pl.Array(pl.Float32, 4))]
    written = [None if one is None else json.dumps(one) for one in vectors]
    return [*typed, pl.Series("v", written, dtype=pl.String)]


@settings(max_examples=60, deadline=None)
@given(st.lists(VECTOR | st.none(), min_size=1, max_size=8))
def test_every_form_of_a_column_keeps_the_bits_of_float32(vectors: list[list[float] | None]) -> None:
    expected = np.array([one or [0.0] * 4 for one in vectors], dtype=np.float32)
    for column in forms(vectors):
        texts = vector_texts(column, SPACE)
        assert [bool(text) for text in texts] == [one is not None for one in vectors]
        assert read_vectors(texts, 4).tobytes() == expected.tobytes()


@settings(max_examples=60, deadline=None)
@given(st.lists(SMALL.filter(any), min_size=1, max_size=8))
def test_a_vector_has_one_unit_vector_alone_and_in_any_batch_and_encoding_it_again_changes_no_bit(
    vectors: list[list[float]],
) -> None:
    encoder = GivenVectors("clip", "clip-v3", 4)
    contents = with_vectors([], {"clip": np.array(vectors, dtype=np.float32)})
    found = encoder.encode(contents)
    alone = np.concatenate([encoder.encode([one]) for one in contents])
    assert found.tobytes() == alone.tobytes()
    again = encoder.encode(with_vectors([], {"clip": found}))
    assert again.tobytes() == found.tobytes()
    np.testing.assert_allclose(found, unit(np.array(vectors)), atol=1e-6)


def wrong_vectors() -> st.SearchStrategy[tuple[list[float | None], str]]:
    """A vector that cannot be used, and the words that name the fault."""
    width = st.lists(NUMBER, max_size=9).filter(lambda one: len(one) not in (0, 4))
    bad: list[tuple[float | None, str]] = [
        (float("nan"), "is NaN"),
        (float("inf"), "is infinite in float32"),
        (-1e39, "is infinite in float32"),
        (None, "is missing"),
    ]
    return st.one_of(
        width.map(lambda one: (list(one), f"holds {len(one)} numbers, expected 4")),
        st.sampled_from([([0.0] * 4, "has length 0"), ([1e-60] * 4, "has length 0"), ([], "holds an empty list")]),
        st.tuples(VECTOR, st.integers(0, 3), st.sampled_from(bad)).map(
            lambda drawn: (
                [*drawn[0][: drawn[1]], drawn[2][0], *drawn[0][drawn[1] + 1 :]],
                f"number {drawn[1] + 1} {drawn[2][1]}",
            )
        ),
    )


@settings(max_examples=120, deadline=None)
@given(st.lists(VECTOR | st.none(), max_size=6), wrong_vectors(), st.integers(0, 6))
def test_a_wrong_vector_is_refused_by_its_row_wherever_it_stands(
    vectors: list[list[float] | None], wrong: tuple[list[float], str], place: int
) -> None:
    place = min(place, len(vectors))
    column = pl.Series("v", [*vectors[:place], wrong[0], *vectors[place:]], dtype=pl.List(pl.Float64))
    with pytest.raises(VectorFault) as raised:
        vector_texts(column, SPACE)
    assert wrong[1] in str(raised.value)
    assert raised.value.row == place


@given(st.lists(VECTOR, min_size=1, max_size=5), st.data())
def test_a_vector_of_another_space_is_refused_by_its_row(vectors: list[list[float]], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(vectors) - 1))
    named = ["clip-v3"] * len(vectors)
    named[place] = data.draw(st.sampled_from(["clip-v4", "clip", ""]))
    spaces, column = pl.Series(named), pl.Series("v", vectors, dtype=pl.List(pl.Float64))
    declared = SPACE.model_copy(update={"space_column": "space"})
    with pytest.raises(VectorFault, match="expected 'clip-v3'") as raised:
        vector_texts(column, declared, spaces)
    assert (raised.value.row, raised.value.column) == (place, "space")
    vector_texts(column, declared, pl.Series(["clip-v3"] * len(vectors)))


@pytest.mark.parametrize(
    "column",
    [
        pl.Series("v", [1.0, 2.0]),
        pl.Series("v", [["a", "b"]]).cast(pl.List(pl.Categorical)),
        pl.Series("v", np.zeros((2, 3, 4), dtype=np.float32)),
        pl.Series("v", ["no list"]),
        pl.Series("v", [[{"a": 1}]]),
    ],
)
def test_a_column_of_another_kind_is_refused(column: pl.Series) -> None:
    with pytest.raises(VectorFault, match=r"lists? of numbers expected"):
        vector_texts(column, SPACE)


def test_a_text_without_a_vector_is_refused_and_an_empty_field_is_a_zero_row() -> None:
    encoder = GivenVectors("clip", "clip-v3", 4)
    for text in ("a red bicycle", "", Content("a", {"title": "a"})):
        with pytest.raises(DatasetError, match=r"space 'clip-v3' of vectors.clip has no text encoder"):
            encoder.encode([text])
    assert not encoder.encode([Content("a", {"clip": ""})]).any()
    assert encoder.encode([]).shape == (0, 4)
    five = with_vectors([], {"clip": np.ones((2, 5))})
    with pytest.raises(DatasetError, match=r"vectors.clip: item 0 of the batch holds 5 numbers, expected 4"):
        encoder.encode(five)
