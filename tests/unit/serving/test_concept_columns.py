"""Concepts in filters: a filled column decides, an empty column is predicted, and an unknown name is refused."""

import numpy as np
import polars as pl
import pytest

from features.content.encoder import unit
from features.errors import EventError
from features.value.filter import Filter
from models.encoder.meaning.concept_fit import fit_column, fit_examples
from models.encoder.meaning.concepts import join
from serving.retrieval.filter import Attributes
from serving.retrieval.meaning import CARRIED, PREDICTED, Meaning

D = 8


def _catalogue() -> tuple[np.ndarray, list[list[str]]]:
    rng = np.random.default_rng(0)
    carries = rng.random(200) < 0.3
    vectors = rng.normal(size=(200, D))
    vectors[:, 0] += 6 * carries
    return unit(vectors), [["war"] if has else ["peace"] for has in carries]


@pytest.fixture(scope="module")
def meaning() -> Meaning:
    vectors, values = _catalogue()
    head = fit_column(vectors, values, column="genres", source="lsa")
    own = fit_examples("own", vectors[:4], vectors, source="lsa")
    return Meaning(join([head, own]), "b-1")


def test_a_filled_column_decides_and_an_empty_one_is_predicted(meaning: Meaning) -> None:
    vectors, values = _catalogue()
    fighting = vectors[next(row for row, found in enumerate(values) if found == ["war"])][None]
    stated, silent = ({"genres": "peace|love"}, {"genres": None})
    (declared,), (predicted,) = meaning.columns(fighting, [stated]), meaning.columns(fighting, [silent])
    assert "war" in (declared[PREDICTED] or [])
    assert [name for name in declared[CARRIED] or [] if name != "own"] == ["love", "peace"]
    assert "war" in (predicted[CARRIED] or [])


def test_the_filter_of_without_matches_items_that_carry_none(meaning: Meaning) -> None:
    vectors, values = _catalogue()
    items = pl.DataFrame({"item_id": [str(row) for row in range(200)], "genres": values, "year": range(200)})
    named = meaning.with_columns(items, vectors)
    attributes = Attributes(named, ("year", *meaning.filterable))
    wanted = meaning.excluding(["war"], Filter.model_validate({"column": "year", "gte": 100}))
    assert wanted is not None
    matching = attributes.mask(wanted, 200)
    assert matching.tolist() == [row >= 100 and found != ["war"] for row, found in enumerate(values)]


def test_a_shared_concept_is_marked_as_predicted_unless_both_items_declare_it(meaning: Meaning) -> None:
    vectors, values = _catalogue()
    first, second = [row for row, found in enumerate(values) if found == ["war"]][:2]
    both = [{"genres": ["war"]}, {"genres": ["war"]}]
    stated = meaning.shared(vectors[first], vectors[second], both)[0]
    guessed = meaning.shared(vectors[first], vectors[second], [{"genres": ["war"]}])[0]
    assert (stated.concept, stated.predicted) == ("war", False)
    assert (guessed.concept, guessed.predicted) == ("war", True)


def test_unknown_concepts_are_refused_with_the_known_ones(meaning: Meaning) -> None:
    with pytest.raises(EventError, match=r"avoid: bundle b-1 has no concept 'love'; choose of peace, war, own"):
        meaning.steered(np.ones(D, dtype=np.float32), ["love"])
    with pytest.raises(EventError, match=r"without: .* declare concepts"):
        Meaning(None, "b-1").excluding(["war"], None)


def test_without_a_concept_nothing_changes(meaning: Meaning) -> None:
    query = np.ones(D, dtype=np.float32)
    assert meaning.steered(query, []) is query
    assert meaning.excluding([], None) is None
    assert Meaning(None, "b-1").columns(np.zeros((2, D), dtype=np.float32), [{}, {}]) == [{}, {}]
