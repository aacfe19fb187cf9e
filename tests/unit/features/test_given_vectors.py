"""Vectors in the descriptor and in files: what is refused, and the words that name it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from features.content.content import FIELDS, contents
from features.content.given.encoder import GivenVectors
from features.content.kinds import fit_encoder, load_encoder, names_of, reads_vectors
from features.dataset.descriptor import Dataset, load_dataset
from features.dataset.files import file_slices
from features.dataset.input_files import InputFiles
from features.dataset.tables import read_items
from features.errors import BundleError, DatasetError, TesseraError
from features.framing.texts import item_texts
from features.message import Rows, item_rows
from features.value.vector import read_vectors
from features.wire.decoder import item_decoder
from tessera.pipeline.options import RunOptions, for_dataset, load_options

ROWS = [{"sku": str(n), "title": f"thing {n}", "vec": [n + 1.0, 0.5, -2.0], "space": "v3"} for n in range(6)]


def dataset(directory: Path, vectors: str, *, rows: Any = ROWS, name: str = "items.jsonl", text: str = "") -> Dataset:
    """A dataset whose items have vectors."""
    if name.endswith("jsonl"):
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pl.DataFrame(rows).write_parquet(directory / name)
    pl.DataFrame({"user": ["a"], "sku": ["1"], "y": [1]}).write_parquet(directory / "events.parquet")
    (directory / "shop.toml").write_text(
        f"""
        name = "shop"
        [items]
        path = "{name}"
        id = "sku"
        {text}
        vectors = {vectors}
        [events]
        path = "events.parquet"
        user = "user"
        item = "sku"
        label = {{ column = "y", implicit = true, positive = ">= 1" }}
        [split]
        by = "random"
        """
    )
    return load_dataset(directory / "shop.toml")


def vectors_of(found: Dataset, name: str = "clip") -> np.ndarray:
    """The vectors of a catalogue by its files."""
    items = read_items(found, fields=(name,))
    assert items is not None
    return read_vectors(items[FIELDS].struct.field(name).to_list(), 3)


def test_a_column_a_file_and_their_long_forms_are_read_and_the_space_has_a_name(tmp_path: Path) -> None:
    expected = np.array([row["vec"] for row in ROWS], dtype=np.float32)
    np.save(tmp_path / "clip.npy", expected.astype(np.float64))
    for declared in (
        '{ clip = "vec" }',
        '{ clip = "clip.npy" }',
        '{ clip = { column = "vec", space = "v3", space_column = "space" } }',
        '{ clip = { file = "clip.npy", space = "v3", dim = 3 } }',
    ):
        found = dataset(tmp_path, declared)
        assert found.items is not None
        assert vectors_of(found).tobytes() == expected.tobytes()
        assert found.items.spaces == {"clip": "v3" if "v3" in declared else "clip"}
        assert (found.has_content, found.has_text) == (True, False)
    assert "clip.npy" in InputFiles(found).by_table["items"]


def test_a_csv_holds_vectors_as_json(tmp_path: Path) -> None:
    found = dataset(tmp_path, '{ clip = "vec" }')
    table = pl.DataFrame([row | {"vec": json.dumps(row["vec"])} for row in ROWS])
    table.write_csv(tmp_path / "items.csv")
    assert found.items is not None
    again = found.model_copy(update={"items": found.items.model_copy(update={"path": "items.csv"})})
    assert vectors_of(again).tobytes() == vectors_of(found).tobytes()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"vec": [1.0, 2.0]}, r"items.jsonl: \[items\] column 'vec', row 3: vectors.clip: holds 2 numbers, expected 3"),
        ({"vec": [0, 0.0, 0]}, r"column 'vec', row 3: vectors.clip: has length 0"),
        ({"vec": [1.0, float("nan"), 2.0]}, r"row 3: vectors.clip: number 2 is missing, or no number"),
        ({"vec": [1.0, 1e39, 2.0]}, r"row 3: vectors.clip: number 2 is infinite in float32"),
        ({"vec": [1.0, "x", 2.0]}, r"row 3: vectors.clip: number 2 is missing, or no number"),
        ({"space": "v4"}, r"column 'space', row 3: vectors.clip: the vector is of space 'v4', expected 'v3'"),
        ({"space": None}, r"column 'space', row 3: vectors.clip: no space is named, expected 'v3'"),
    ],
)
def test_a_wrong_vector_in_a_file_is_refused_by_file_and_row(
    tmp_path: Path, change: dict[str, Any], fault: str
) -> None:
    rows = [row | change if number == 2 else row for number, row in enumerate(ROWS)]
    found = dataset(tmp_path, '{ clip = { column = "vec", space = "v3", space_column = "space" } }', rows=rows)
    with pytest.raises(DatasetError, match=fault):
        vectors_of(found)


def test_an_item_without_a_vector_has_a_zero_row(tmp_path: Path) -> None:
    rows = [row | {"vec": None, "space": None} if number == 2 else row for number, row in enumerate(ROWS)]
    found = dataset(tmp_path, '{ clip = { column = "vec", space = "v3", space_column = "space" } }', rows=rows)
    assert np.flatnonzero(~vectors_of(found).any(axis=1)).tolist() == [2]


def test_an_npy_file_must_have_the_rows_of_the_catalogue(tmp_path: Path) -> None:
    found = dataset(tmp_path, '{ clip = "clip.npy" }')
    with pytest.raises(DatasetError, match=r"clip.npy: \[items.vectors\] clip: no such file"):
        InputFiles(found)
    for values, fault in (
        (np.ones((5, 3)), "holds 5 vectors, but the catalogue has 6 rows"),
        (np.ones(6), r"numbers of shape \(R, D\) expected"),
        (np.array([["a"]] * 6), r"numbers of shape \(R, D\) expected"),
        (np.array([[None]] * 6, dtype=object), "cannot be read as npy"),
        (np.where(np.arange(6)[:, None] == 4, np.nan, np.ones((6, 3))), r"row 5: vectors.clip: number 1 is NaN"),
    ):
        np.save(tmp_path / "clip.npy", values)
        with pytest.raises(DatasetError, match=fault):
            vectors_of(found)


@pytest.mark.parametrize(
    ("declared", "fault"),
    [
        ('{ clip = { space = "v3" } }', r"vectors.clip.column: is missing"),
        ('{ clip = { column = "vec", spaces = "v3" } }', r"unknown key 'spaces'; the nearest valid name is 'space'"),
        ('{ clip = { column = "vec", space = "v 3" } }', r"space 'v 3': a name is letters"),
        ('{ clip = "sku" }', r"vectors.clip: column 'sku' is declared for another use too"),
        ('{ clip = "vec", next = "vec" }', r"vectors.next: column 'vec' is of vectors.clip too"),
        ('{ "a b" = "vec" }', r"vectors.a b.space: space 'a b': a name is letters"),
        ('{ lsa = "vec" }', r"vectors.lsa: the name is that of an encoder"),
    ],
)
def test_a_declaration_that_cannot_be_used_is_refused_by_name(tmp_path: Path, declared: str, fault: str) -> None:
    with pytest.raises(TesseraError, match=fault):
        load_options(dataset(tmp_path, declared))


def test_slices_of_a_catalogue_have_one_width_and_the_rows_of_the_npy_file(tmp_path: Path) -> None:
    np.save(tmp_path / "clip.npy", np.arange(18, dtype=np.float32).reshape(6, 3) + 1)
    found = dataset(tmp_path, '{ clip = "clip.npy" }', name="items.parquet")
    slices = file_slices(found.items, tmp_path, table="items", rows=2)  # type: ignore[arg-type]
    assert len(slices) > 1 or slices[0].rows == 6
    read = pl.concat(item_texts(found, slices, fields=("clip",)))
    np.testing.assert_array_equal(read_vectors(read[FIELDS].struct.field("clip").to_list(), 3), vectors_of(found))
    rows = [row | {"vec": [1.0] * (3 if number < 4 else 2)} for number, row in enumerate(ROWS)]
    other = dataset(tmp_path, '{ clip = "vec" }', rows=rows, name="items.parquet")
    pl.DataFrame(rows).write_parquet(tmp_path / "items.parquet", row_group_size=2)
    slices = file_slices(other.items, tmp_path, table="items", rows=2)  # type: ignore[arg-type]
    assert len(slices) == 3
    with pytest.raises(DatasetError, match=r"row 5: vectors.clip: holds 2 numbers, expected 3"):
        list(item_texts(other, slices, fields=("clip",)))


def test_a_message_has_the_bits_of_its_row_in_the_file(tmp_path: Path) -> None:
    found = dataset(tmp_path, '{ clip = { column = "vec", space = "v3", space_column = "space" } }')
    items = found.items
    assert items is not None
    decode = item_decoder(items)
    decoded = [decode(json.dumps(row).encode()).row for row in [*ROWS, ROWS[0] | {"space": "v4"}, {"sku": "9"}]]
    frame, bad = item_rows(Rows(decode.columns, decoded), items, {})
    assert {place: why.split(": ", 1)[1] for place, why in bad.items()} == {
        6: "[items] column 'space', row 1: vectors.clip: the vector is of space 'v4', expected 'v3'; vectors of two "
        "spaces must not be mixed"
    }
    encoder = GivenVectors("clip", "v3", 3)
    from_files = read_items(found, fields=("clip",))
    assert from_files is not None
    found_vectors = encoder.encode(contents(frame))
    assert found_vectors[:6].tobytes() == encoder.encode(contents(from_files)).tobytes()
    assert not found_vectors[6].any()


def test_the_encoder_is_chosen_by_the_names_of_vectors(tmp_path: Path) -> None:
    found = dataset(tmp_path, '{ clip = "vec" }')
    assert for_dataset(RunOptions(), found).encoder == "clip"
    assert load_options(found, ["encoder=clip"]).encoder == "clip"
    with pytest.raises(TesseraError, match=r"expected one of lsa, .*, clip, got 'clp'"):
        load_options(found, ["encoder=clp"])
    with pytest.raises(DatasetError, match="encoder 'static' reads text, but"):
        for_dataset(RunOptions(encoder="static+clip", vectors=("clip",)), found)
    with_text = dataset(tmp_path, '{ clip = "vec" }', text='text = ["title"]')
    assert for_dataset(RunOptions(), with_text).encoder == "lsa"
    assert names_of("lsa+clip", ("clip",)) == ("lsa", "clip")
    with pytest.raises(TesseraError, match="clip: the vectors of the items have no options"):
        load_options(with_text, ["encoder=clip", "encoder_options.clip.pool=mean"])


def test_a_saved_encoder_says_that_it_reads_vectors_and_its_id_names_space_and_width(tmp_path: Path) -> None:
    found = dataset(tmp_path, '{ clip = "vec" }', text='text = ["title"]')
    items = read_items(found, fields=("title", "clip"))
    assert items is not None
    for number, (encoder, reads) in enumerate((("clip", True), ("lsa+clip", True), ("lsa", False))):
        made = fit_encoder(encoder, contents(items), dim=4, seed=0, model=None, spaces={"clip": "v3"})
        place = tmp_path / str(number)
        place.mkdir()
        made.save(place)
        assert reads_vectors(place) is reads
        assert load_encoder(place).encode(contents(items)).tobytes() == made.encode(contents(items)).tobytes()
    assert len({GivenVectors("a", space, dim).id for space in ("v3", "v4") for dim in (3, 4)}) == 4
    assert GivenVectors("a", "v3", 3).id == GivenVectors("b", "v3", 3).id
    path = tmp_path / "0" / "encoder.json"
    path.write_text(path.read_text().replace('"v3"', '"v4"'))
    with pytest.raises(BundleError, match="expected v3-"):
        load_encoder(tmp_path / "0")
