"""An aspect's space finds items that share a value, by column where it is filled and by content where it is not."""

from pathlib import Path

import numpy as np
import pytest

from features.content.encoder import unit
from features.errors import BundleError, DatasetError
from models.encoder.meaning.aspects import fit_aspect, load_aspect, parts

D, SOURCE = 32, "lsa-0123456789ab"
DIRECTORS = ("Agnès Varda", "Akira Kurosawa", "Chantal Akerman", "Ousmane Sembène")


def _films(count: int = 200, seed: int = 0) -> tuple[np.ndarray, list[dict[str, object]]]:
    rng = np.random.default_rng(seed)
    director, year = rng.integers(len(DIRECTORS), size=count), rng.integers(1950, 2000, size=count)
    vectors = rng.normal(size=(count, D))
    vectors[np.arange(count), director] += 5
    vectors[:, 10] += (year - 1975) / 5
    rows = [{"director": DIRECTORS[d], "year": int(y)} for d, y in zip(director, year, strict=True)]
    return unit(vectors), rows


def test_an_item_without_the_column_finds_items_that_share_its_value() -> None:
    vectors, rows = _films()
    aspect = fit_aspect("people", ["director"], vectors, rows, source=SOURCE)
    new, hidden = _films(40, seed=1)
    index = aspect.of(vectors, rows)
    queries = aspect.of(new, [{} for _ in hidden])
    found = np.argsort(-(queries @ index.T), axis=1)[:, :10]
    shared = [rows[item]["director"] == hidden[query]["director"] for query, top in enumerate(found) for item in top]
    assert np.mean(shared) > 0.8


def test_a_filled_column_decides_alone() -> None:
    vectors, rows = _films()
    aspect = fit_aspect("people", ["director"], vectors, rows, source=SOURCE)
    assert np.array_equal(aspect.of(vectors[:1], rows[:1]), aspect.of(vectors[5:6] * -1, rows[:1]))
    unknown = [{"director": "Nobody Known"}]
    assert np.array_equal(aspect.of(vectors[:1], unknown), aspect.head.of(vectors[:1]))


def test_near_numbers_are_alike() -> None:
    vectors, rows = _films()
    aspect = fit_aspect("era", ["year"], vectors, rows, source=SOURCE)
    years = aspect.by_columns([{"year": year} for year in (1960, 1963, 1990)])
    assert years[0] @ years[1] > 0.4 > 0.01 > years[0] @ years[2]
    assert not aspect.by_columns([{"year": None}, {}]).any()


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    vectors, rows = _films()
    aspect = fit_aspect("both", ["director", "year"], vectors, rows, source=SOURCE)
    sparse_rows = [row if number % 3 else {} for number, row in enumerate(rows)]
    whole = aspect.of(vectors, sparse_rows)
    alone = [aspect.of(vectors[row : row + 1], sparse_rows[row : row + 1])[0] for row in range(len(rows))]
    assert np.array_equal(np.stack(alone), whole)
    assert np.allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)


def test_a_saved_aspect_is_the_aspect(tmp_path: Path) -> None:
    vectors, rows = _films()
    aspect = fit_aspect("both", ["director", "year"], vectors, rows, source=SOURCE)
    aspect.save(tmp_path)
    loaded = load_aspect(tmp_path)
    assert loaded.id == aspect.id
    assert np.array_equal(loaded.of(vectors, rows), aspect.of(vectors, rows))
    (tmp_path / "aspect.safetensors").write_bytes(b"cut")
    with pytest.raises(BundleError, match="fit the aspect again"):
        load_aspect(tmp_path)


def test_more_values_than_the_width_keep_their_likeness() -> None:
    rng = np.random.default_rng(3)
    vectors = unit(rng.normal(size=(300, D)))
    rows = [{"actors": f"a{number % 100}, b{number % 90}"} for number in range(300)]
    aspect = fit_aspect("people", ["actors"], vectors, rows, source=SOURCE, width=64)
    assert aspect.dim == 64
    index = aspect.by_columns(rows)
    assert index[0] @ index[100] > 0.5 > index[0] @ index[1]


def test_an_aspect_of_empty_columns_is_refused_by_name() -> None:
    vectors, rows = _films()
    with pytest.raises(DatasetError, match=r"\[items.aspects\] people: 0 items .* director"):
        fit_aspect("people", ["director"], vectors, [{"director": None} for _ in rows], source=SOURCE)


def test_a_cell_is_split_into_its_values() -> None:
    assert parts("Tom Hanks, Tim Allen") == ["Tom Hanks", "Tim Allen"]
    assert parts("Action|War;Drama") == ["Action", "War", "Drama"]
    assert parts(["Smith, John", "Jane"]) == ["Smith, John", "Jane"]
    assert parts(None) == parts("") == []
    assert parts(1995) == ["1995"]
