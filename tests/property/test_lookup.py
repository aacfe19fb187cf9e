"""Laws of the assembler: what an example reads does not depend on the company it is assembled in."""

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from features.errors import BundleError
from features.hashing import HashSpec, fingerprint
from features.history import Jagged
from models.table.admission import Admission
from models.table.batch import Assembler, Batch, Entities, Examples
from models.table.column_rows import ColumnValues, Growable
from models.table.reference import pool
from models.table.schema import Feature, Numeric, Schema

SCHEMA = Schema(
    features=(
        Feature("user_id", "user", "user_id", "user_id"),
        Feature("item_id", "item", "item_id", "item_id", 2),
        Feature("item.tags", "item", "tags", "item.tags", 2, "sum"),
        Feature("history.item_id", "history", "item_id", "item_id", 1),
        Feature("history.tags", "history", "tags", "item.tags", 2, "mean"),
        Feature("event.place", "event", "place", "event.place"),
    ),
    numeric=(
        Numeric("user.age", "user", "age", 1.0, 2.0),
        Numeric("item.price", "item", "price", 0.5, 0.1),
        Numeric("event.hour", "event", "hour"),
        Numeric("history.length", "history", "history", 0.3, 1.0),
    ),
    rows=97,
    dim=4,
    history_length=5,
)
TYPES: dict[str, dict[str, Any]] = {
    "user": {"user_id": pl.String, "age": pl.Float32},
    "item": {"item_id": pl.String, "tags": pl.List(pl.String), "price": pl.Float32},
    "event": {"place": pl.String, "hour": pl.Float32},
}
WORDS = st.sampled_from(["", "a", "b", "c", "Ж"])
NUMBERS = st.none() | st.floats(-1e6, 1e6, width=32)
WORD_LISTS = st.none() | st.lists(WORDS, max_size=3)
ROWS = {
    "user": st.tuples(st.none() | WORDS, NUMBERS),
    "item": st.tuples(st.none() | WORDS, WORD_LISTS, NUMBERS),
    "event": st.tuples(st.none() | WORDS, NUMBERS),
}
TABLE = torch.rand(SCHEMA.rows, SCHEMA.dim, generator=torch.Generator().manual_seed(0))


def entities(of: Any, frame: pl.DataFrame) -> Entities:
    return Entities(SCHEMA, of, frame, Admission.off())


def column_values(column: pl.Series, *, chunks: int) -> ColumnValues:
    schema = Schema((Feature("f", "item", "f", "s", chunks),), (), rows=97, dim=4, history_length=1)
    return ColumnValues(column, schema, schema.features[0], Admission.off())


def frame(of: str, rows: list[Any]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=TYPES[of], orient="row")


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Assembler, Examples]:
    """An assembler over random entities, and examples that point into it."""
    frames = {of: frame(of, draw(st.lists(ROWS[of], min_size=1, max_size=4))) for of in ("user", "item", "event")}
    size = draw(st.integers(1, 5))

    def index(of: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        points = st.lists(st.integers(0, frames[of].height - 1), min_size=size, max_size=size)
        return np.array(draw(points), dtype=np.int64)

    histories = draw(
        st.lists(st.lists(st.integers(0, frames["item"].height - 1), max_size=3), min_size=size, max_size=size)
    )
    flat = np.array([item for history in histories for item in history], dtype=np.int64)
    found = [entities(of, frames[of]) for of in ("user", "item", "event")]
    examples = Examples(
        user=index("user"),
        item=index("item"),
        history=Jagged(flat, np.cumsum([0, *map(len, histories)])),
        labels=(np.arange(size) % 2).astype(np.float32),
        context=index("event"),
    )
    return Assembler(SCHEMA, *found), examples


def inputs(batch: Batch) -> Tensor:
    """Returns all inputs of a network for a batch, an example a row."""
    return torch.cat([pool(TABLE, batch), batch.numeric, batch.labels[:, None]], dim=1)


@given(worlds())
def test_a_batch_is_its_examples_one_by_one(world: tuple[Assembler, Examples]) -> None:
    source, examples = world
    alone = [inputs(source.batch(examples.take(np.array([place])))) for place in range(len(examples))]
    assert torch.equal(inputs(source.batch(examples)), torch.cat(alone))


@given(worlds(), st.randoms(use_true_random=False))
def test_permuting_the_examples_permutes_the_outputs(world: tuple[Assembler, Examples], random: Any) -> None:
    source, examples = world
    order = list(range(len(examples)))
    random.shuffle(order)
    assert torch.equal(inputs(source.batch(examples.take(np.array(order)))), inputs(source.batch(examples))[order])


@given(worlds())
def test_permuting_the_features_permutes_the_lookups_and_changes_no_row(world: tuple[Assembler, Examples]) -> None:
    source, examples = world
    turned = Schema(SCHEMA.features[::-1], SCHEMA.numeric[::-1], SCHEMA.rows, SCHEMA.dim, SCHEMA.history_length)
    batch = source.batch(examples)
    other = Assembler(turned, source.users, source.items, source.events).batch(examples)
    place = [SCHEMA.keys.index(key) for key in turned.keys]
    before = pool(TABLE, batch).view(batch.size, -1, SCHEMA.dim)
    assert torch.equal(pool(TABLE, other).view(batch.size, -1, SCHEMA.dim), before[:, place])
    assert torch.equal(other.numeric, batch.numeric.flip(1))


@given(worlds())
def test_every_lookup_reads_the_rows_of_the_hash_contract(world: tuple[Assembler, Examples]) -> None:
    source, examples = world
    batch = source.batch(examples)
    assert batch.values.numel() == int(batch.lengths.sum())
    assert batch.lengths.shape == (len(SCHEMA.keys) * batch.size,)
    assert ((batch.values >= 0) & (batch.values < SCHEMA.rows)).all()
    # Lookup-major: the first B lengths are those of the first key.
    parts = batch.values.split(batch.lengths.view(-1, batch.size).sum(dim=1).tolist())
    expected, _ = source.users.rows("user_id", examples.user)
    assert parts[0].tolist() == expected[:, 0].tolist()
    expected, _ = source.items.rows("item_id", examples.item)
    assert [parts[1].tolist(), parts[2].tolist()] == expected.T.tolist()
    expected, _ = source.items.rows("item_id", examples.history.values)
    assert parts[SCHEMA.keys.index("history.item_id#0")].tolist() == expected[:, 0].tolist()


@given(st.lists(WORD_LISTS, max_size=6) | st.lists(st.none() | WORDS, max_size=6), st.integers(1, 3))
def test_a_value_reads_the_same_rows_alone_and_in_lists_and_nothing_reads_none(column: list[Any], chunks: int) -> None:
    listed = any(isinstance(cell, list) for cell in column)
    series = pl.Series(column, dtype=pl.List(pl.String) if listed else pl.String)
    found, lengths = column_values(series, chunks=chunks).rows(np.arange(len(column)))
    cells = [[] if cell is None else cell if isinstance(cell, list) else [cell] for cell in column]
    flat = [value for cell in cells for value in cell]
    assert lengths.tolist() == [len(cell) for cell in cells]
    np.testing.assert_array_equal(found, HashSpec(97).lookup("s", chunks, fingerprint(flat)))


def test_a_column_of_nothing_reads_no_row() -> None:
    for dtype in (pl.String, pl.Null, pl.List(pl.String)):
        rows = column_values(pl.Series([None, None], dtype=dtype), chunks=2)
        found, lengths = rows.rows(np.array([1, 0, 1]))
        assert found.shape == (0, 2)
        assert lengths.tolist() == [0, 0, 0]


def same_entities(left: Entities, right: Entities, of: str) -> None:
    assert left.size == right.size
    every = np.arange(left.size)
    for name in SCHEMA.columns(of):  # type: ignore[arg-type]
        for one, two in zip(left.rows(name, every), right.rows(name, every), strict=True):
            np.testing.assert_array_equal(one, two)
    for numeric in SCHEMA.numeric:
        if numeric.of == of:
            np.testing.assert_array_equal(left.numeric(numeric.name, every), right.numeric(numeric.name, every))


@given(st.data(), st.sampled_from(["user", "item", "event"]))
def test_appending_entities_is_building_them_at_once(data: st.DataObject, of: Any) -> None:
    parts = [data.draw(st.lists(ROWS[of], max_size=4)) for _ in range(3)]
    grown = entities(of, frame(of, parts[0]))
    for part in parts[1:]:
        grown.append(frame(of, part))
    same_entities(grown, entities(of, frame(of, [row for part in parts for row in part])), of)


@given(st.data(), st.sampled_from(["user", "item", "event"]))
def test_replacing_entities_is_building_them_with_their_last_values(data: st.DataObject, of: Any) -> None:
    rows = data.draw(st.lists(ROWS[of], min_size=1, max_size=4))
    changed = entities(of, frame(of, rows))
    for _ in range(2):
        places = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=4))
        values = data.draw(st.lists(ROWS[of], min_size=len(places), max_size=len(places)))
        changed.replace(np.array(places, dtype=np.int64), frame(of, values))
        for place, value in zip(places, values, strict=True):
            rows[place] = value
        added = data.draw(st.lists(ROWS[of], max_size=2))
        changed.append(frame(of, added))
        rows += added
    same_entities(changed, entities(of, frame(of, rows)), of)


@given(worlds(), st.sets(st.integers(0, len(SCHEMA.features) - 1), min_size=1))
def test_a_batch_of_some_features_is_that_part_of_the_whole(
    world: tuple[Assembler, Examples], chosen: set[int]
) -> None:
    source, examples = world
    features = [SCHEMA.features[place] for place in sorted(chosen)]
    keys = [f"{feature.name}#{chunk}" for feature in features for chunk in range(feature.chunks)]
    whole = pool(TABLE, source.batch(examples)).view(len(examples), -1, SCHEMA.dim)
    part = pool(TABLE, source.batch(examples, features)).view(len(examples), -1, SCHEMA.dim)
    assert torch.equal(part, whole[:, [SCHEMA.keys.index(key) for key in keys]])


def test_a_missing_or_boundless_number_is_the_mean_and_others_are_scaled() -> None:
    users = entities("user", frame("user", [("a", None), ("b", float("nan")), ("c", float("inf")), ("d", -7)]))
    np.testing.assert_allclose(users.numeric("user.age", np.arange(4)), [0, 0, 0, (-np.log1p(7) - 1) / 2], rtol=1e-6)


def test_a_short_history_counts_itself_as_a_number() -> None:
    users, items = frame("user", [("u", 1.0)]), frame("item", [("i", ["x", "y"], 1.0), ("j", None, None)])
    source = Assembler(
        SCHEMA,
        entities("user", users),
        entities("item", items),
        entities("event", frame("event", [("here", 1.0)])),
    )
    zeros = np.zeros(2, dtype=np.int64)
    history = Jagged(np.array([0, 1, 0]), np.array([0, 0, 3]))
    batch = source.batch(Examples(zeros, zeros, history, np.zeros(0, dtype=np.float32), zeros))
    np.testing.assert_allclose(batch.numeric[:, 3], [-0.3, np.log1p(3) - 0.3], rtol=1e-6)
    assert batch.labels.numel() == 0
    # Item j has no tags, so the mean is over the four tags of the two visits of i.
    tags = SCHEMA.keys.index("history.tags#0")
    assert batch.lengths.view(-1, 2)[tags].tolist() == [0, 4]
    assert batch.scale[:, tags].tolist() == [1.0, 0.25]
    assert torch.equal(pool(TABLE, batch).view(2, -1, 4)[0, tags], torch.zeros(4))


def test_features_of_one_column_with_two_salts_are_refused_or_read_rows_of_their_own() -> None:
    features = (Feature("one", "user", "user_id", "salt one"), Feature("two", "user", "user_id", "salt two"))
    try:
        schema = Schema(features, (), rows=1_000, dim=4, history_length=1)
    except BundleError:
        return
    users = Entities(schema, "user", pl.DataFrame({"user_id": ["a"]}), Admission.off())
    empty = Entities(schema, "item", pl.DataFrame({"item_id": ["i"]}), Admission.off())
    zero = np.zeros(1, dtype=np.int64)
    examples = Examples(zero, zero, Jagged(zero[:0], np.array([0, 0])), np.zeros(0, dtype=np.float32), zero)
    found = Assembler(schema, users, empty, empty).batch(examples).values.tolist()
    assert found == [int(schema.hash_spec.lookup(f.salt, 1, fingerprint(["a"]))[0, 0]) for f in features]


@given(st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=6))
def test_a_growable_array_is_the_concatenation_of_its_parts(parts: list[list[int]]) -> None:
    grown = Growable(np.zeros(0, dtype=np.int64))
    for part in parts:
        grown.extend(np.array(part, dtype=np.int64))
    assert grown.array.tolist() == [value for part in parts for value in part]


@pytest.mark.parametrize("dim", [0, 6, -4])
def test_a_dim_the_kernel_cannot_hold_is_refused(dim: int) -> None:
    with pytest.raises(BundleError, match=f"dim: expected a multiple of 4 .* got {dim}"):
        Schema((), (), rows=10, dim=dim, history_length=1)


def test_a_name_that_stands_twice_is_refused() -> None:
    feature = Feature("a", "user", "a", "a")
    with pytest.raises(BundleError, match=r"'a'.*twice"):
        Schema((feature, feature), (), rows=10, dim=4, history_length=1)


def test_a_schema_survives_json() -> None:
    assert Schema.from_json(SCHEMA.to_json()) == SCHEMA
    with pytest.raises(BundleError, match="schema"):
        Schema.from_json({"rows": "many"})


def test_what_an_update_replaces_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.table.column_rows._SPARE", 10)
    rows = [(f"i{number}", ["a"], 1.0) for number in range(40)]
    changed = entities("item", frame("item", rows))
    held: list[int] = []
    for update in range(300):
        rows = [(name, [f"t{update}", f"u{update % 3}"][: 1 + update % 2], float(update)) for name, *_ in rows]
        changed.replace(np.arange(40), frame("item", rows))
        held += [column.values + column._lists.room for column in changed._columns.values()]
    # Twice what is in use, and what one update adds before it is looked at.
    assert max(held[-100:]) == max(held[100:200]) <= (2 * 80 + 10) + (2 * 80 + 10)
    same_entities(changed, entities("item", frame("item", rows)), "item")
