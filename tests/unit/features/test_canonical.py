"""A value alone decides its canonical form: not its column, not its batch, not its file."""

import datetime
import math
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.dataset.descriptor import Events, Users
from features.dataset.files import load
from features.dataset.label import Label
from features.dataset.source import Categorical
from features.message import Rows, event_rows
from features.value.canonical import VERSION, canonical, canonical_values, cell, cells, scalar
from features.value.mixed_column import column_of, joined
from features.wire.decoder import event_decoder
from models.bundle.embedding import _canonical_column

BIG = 9007199254740993
BERLIN = datetime.timezone(datetime.timedelta(hours=1))
NOON = datetime.datetime(2026, 1, 31, 12, 0, 0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5, "5"),
        (5.0, "5"),
        (Decimal("5.00"), "5"),
        (BIG, "9007199254740993"),
        (Decimal("9007199254740993.000"), "9007199254740993"),
        (2.0**53, "9007199254740992"),
        (1e20, "100000000000000000000"),
        (-0.0, "0"),
        (0.1, "0.1"),
        (1e-7, "1e-07"),
        (Decimal("5.10"), "5.1"),
        (True, "true"),
        ("5.10", "5.10"),
        ("0108775015", "0108775015"),
        ("1e3", "1e3"),
        ("5.0", "5.0"),
        ("True", "True"),
        ("e\u0301", "e\u0301"),
        (" x", " x"),
        ("", None),
        (math.nan, None),
        (None, None),
        (NOON, "2026-01-31T12:00:00"),
        (NOON.replace(tzinfo=BERLIN), "2026-01-31T11:00:00Z"),
        (NOON.replace(microsecond=5), "2026-01-31T12:00:00.000005"),
        (NOON.date(), "2026-01-31"),
        (NOON.time(), "12:00:00"),
        (datetime.timedelta(days=1, hours=2, milliseconds=5), "P1DT2H0.005S"),
    ],
)
def test_the_canonical_forms_of_version_2_stand(value: Any, text: str | None) -> None:
    assert VERSION == 2
    assert scalar(value) == text
    assert canonical(pl.Series([value])).to_list() == [text]


@pytest.mark.parametrize(
    ("value", "text"),
    [(5.0, "5"), (2**53, "9007199254740992"), (1e16, "1e+16"), (1e-5, "0.00001"), (True, "true"), ("x", "x")],
)
def test_the_canonical_forms_of_version_1_stand(value: Any, text: str) -> None:
    assert canonical_values("x", [value, "beside", 0.5, True, 2**60], version=1)[0] == text


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=True, allow_infinity=False)
    | st.floats(width=32, allow_nan=False, allow_infinity=False)
    | st.integers(-100, 100).map(float)
    | st.text(max_size=8)
    | st.sampled_from(["5.0", "True", "nan", "1e3", "007.0", BIG, 0.5, 2.0**53])
)


@settings(max_examples=300, deadline=None)
@given(st.lists(scalars | st.lists(scalars, max_size=3), max_size=8), st.booleans(), st.sampled_from([1, 2]))
def test_a_batch_is_its_values_one_by_one(values: list[Any], of_csv: bool, version: int) -> None:
    together = canonical_values("x", values, version=version, of_csv=of_csv).to_list()
    alone = [canonical_values("x", [value], version=version, of_csv=of_csv)[0] for value in values]
    for found, expected in zip(together, alone, strict=True):
        expected = expected.to_list() if isinstance(expected, pl.Series) else expected
        found = found.to_list() if isinstance(found, pl.Series) else found
        assert found == expected or found == [expected]


COLUMNS: dict[Any, st.SearchStrategy[Any]] = {
    pl.Int64: st.integers(-(2**63), 2**63 - 1),
    pl.UInt64: st.integers(0, 2**64 - 1),
    pl.Float64: st.floats(),
    pl.Boolean: st.booleans(),
    pl.String: st.text(max_size=8),
    pl.Decimal(38, 9): st.decimals(-(10**20), 10**20, places=9),
    pl.Date: st.dates(),
    pl.Time: st.times(),
    pl.Datetime("us"): st.datetimes(),
    pl.Datetime("us", "UTC"): st.datetimes(timezones=st.just(datetime.UTC)),
    pl.Duration("us"): st.timedeltas(datetime.timedelta(days=-(10**6)), datetime.timedelta(days=10**6)),
}


@pytest.mark.parametrize("dtype", COLUMNS, ids=str)
def test_a_column_is_its_values_one_by_one(dtype: Any) -> None:
    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.none() | COLUMNS[dtype], min_size=1, max_size=12))
    def check(values: list[Any]) -> None:
        column = pl.Series(values, dtype=dtype)
        expected = [scalar(value) for value in column.to_list()]
        assert canonical(column).to_list() == expected
        lists = canonical(pl.Series([values, None, []], dtype=pl.List(dtype))).to_list()
        assert lists == [[text for text in expected if text is not None], None, []]

    check()


def test_a_float32_has_the_text_of_its_shortest_decimal_and_the_digits_if_it_is_whole() -> None:
    values = pl.Series([0.1, 123456789, 1e-7], dtype=pl.Float32)
    assert canonical(values).to_list() == ["0.1", "123456792", "1e-07"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.none() | st.text(max_size=4) | st.from_regex(r"-?0?[0-9]{1,3}\.0{0,3}|True|NaN", fullmatch=True)))
def test_csv_text_is_read_cell_by_cell(texts: list[str | None]) -> None:
    found = canonical(cells(pl.Series(texts, dtype=pl.String))).to_list()
    assert found == [None if text is None else cell(text) for text in texts]


def test_a_csv_cell_is_an_integer_a_boolean_or_missing_in_few_spellings_and_else_itself() -> None:
    read = {"5.0": "5", "-12.000": "-12", "-0.0": "0", "True": "true", "FALSE": "false", "nan": None, "NaN": None}
    same = ["5.10", "0108775015", "007.0", "1e3", "5.", "None", "tRUE", "N/A"]
    assert {text: cell(text) for text in [*read, *same]} == read | {text: text for text in same}


def test_a_mixed_column_keeps_each_value() -> None:
    assert column_of("x", [1, 2.5]).to_list() == [1.0, 2.5]
    assert column_of("x", [BIG, 0.5, None]).to_list() == [str(BIG), "0.5", None]
    assert column_of("x", [True, 5]).to_list() == ["true", "5"]
    assert column_of("x", ["tea", ["green", "tea"], "a|b"], split="|").to_list() == [
        ["tea"],
        ["green", "tea"],
        ["a", "b"],
    ]
    parts = [pl.Series([1.0, 2.5]), pl.Series(["1", "x"]), pl.Series([BIG])]
    assert joined(parts).to_list() == ["1", "2.5", "1", "x", str(BIG)]
    assert joined([pl.Series([1]), pl.Series([0.5])]).dtype == pl.Float64


def test_a_message_never_depends_on_its_neighbours() -> None:
    events = Events(
        path="e.parquet",
        user="u",
        categorical={"c": Categorical()},
        numeric=("n",),
        label=Label(column="y", positive="> 3"),
    )
    decode = event_decoder(events)
    wires = [
        b'{"u": 0.5, "c": 5, "n": 1, "y": 4}',
        b'{"u": 9007199254740993, "c": true, "n": 0.5, "y": "4"}',
        b'{"u": "x", "c": ["a", 1.5], "n": true, "y": 4.5}',
        b'{"u": true, "c": 1.5, "n": "2", "y": "no number"}',
    ]
    rows = [decode(wire).row for wire in wires]
    together, bad = event_rows(Rows(decode.columns, rows), events)
    alone = [event_rows(Rows(decode.columns, [row]), events) for row in rows]
    # Without a clock, the time is the position in the batch.
    apart = pl.concat([frame for frame, _ in alone if frame.height])
    assert together.drop("event", "time").equals(apart.drop("event", "time"))
    assert list(bad) == [place for place, (_, own) in enumerate(alone) if own] == [3]
    assert together["user_id"].to_list() == ["0.5", "9007199254740993", "x"]
    assert together["c"].to_list() == [["5"], ["true"], ["a", "1.5"]]


def test_embeddings_are_asked_value_by_value() -> None:
    assert _canonical_column([0.5, BIG, True, 5]).to_list() == ["0.5", str(BIG), "true", "5"]


def test_canonical_text_of_a_column_costs_no_loop() -> None:
    numbers = pl.Series(np.arange(200_000))
    loop = _seconds(lambda: [scalar(value) for value in numbers.to_list()])
    assert _seconds(lambda: canonical(numbers)) < loop / 2
    texts = numbers.cast(pl.String)
    assert _seconds(lambda: canonical(texts)) < loop / 2


def _seconds(work: Callable[[], object]) -> float:
    """The fastest of five runs."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def test_tables_of_two_parts_meet(tmp_path: Path) -> None:
    pl.DataFrame({"id": [1.0, 2.0]}).write_parquet(tmp_path / "a.parquet")
    pl.DataFrame({"id": ["1", "x"]}).write_parquet(tmp_path / "b.parquet")
    table = load(Users(path="*.parquet", id="id"), tmp_path, table="users")
    assert table.column("id").to_list() == ["1", "2", "1", "x"]
