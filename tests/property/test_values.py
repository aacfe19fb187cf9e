"""A value means the same in a file, a message and a request, whatever its type and the kind of file.

`TESSERA_DRAWS` sets how many tables are drawn.
"""

import datetime
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features.dataset.descriptor import Dataset, Events
from features.dataset.label import Label
from features.dataset.source import Categorical
from features.dataset.split import Split
from features.dataset.tables import load_events, message_columns, read_events
from features.errors import DatasetError, EventError
from features.jobs.messages import encode_rows
from features.message import Rows, event_rows
from features.value.canonical import VERSION, canonical, cells
from features.wire.decoder import event_decoder
from serving.api.bodies import EventsRequest
from serving.api.ingest import Intake
from tests.unit.features.test_canonical import COLUMNS

DRAWS = int(os.environ.get("TESSERA_DRAWS", "150"))
# Text of every plane, and what other types look like as text.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(
    ["5.0", "5.10", "0108775015", "1e3", "True", "nan", "NaN", "-0.0", "null", "[1]", '"', "a,b", "a\nb", "\0"]
)
VALUES: dict[Any, st.SearchStrategy[Any]] = COLUMNS | {
    pl.String: TEXTS,
    pl.Float32: st.floats(width=32),
    pl.Int8: st.integers(-128, 127),
    pl.Datetime("ns", "Europe/Berlin"): st.datetimes(
        datetime.datetime(1900, 1, 1), datetime.datetime(2200, 1, 1), timezones=st.just(datetime.UTC)
    ),
    pl.Categorical: st.sampled_from(["a", "5.0", "ü"]),
    pl.List(pl.Int64): st.lists(st.integers(-5, 2**60), max_size=3),
    pl.List(pl.Float64): st.lists(st.none() | st.floats(), max_size=3),
    pl.List(pl.String): st.lists(TEXTS, max_size=3),
}
LISTS = (pl.List(pl.Int64), pl.List(pl.Float64), pl.List(pl.String))


class Kept:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []

    def append(self, kind: str, messages: Any) -> None:
        self.messages += [message for _, message in messages]


@st.composite
def tables(draw: st.DrawFn) -> tuple[pl.DataFrame, str]:
    """A table of events: a user of one type, a category of another, a numeric column; and a kind of file."""
    kind = draw(st.sampled_from(["parquet", "jsonl", "csv"]))
    size = draw(st.integers(1, 4))
    single = [dtype for dtype in VALUES if dtype not in LISTS]
    user = draw(st.sampled_from(single))
    category = draw(st.sampled_from(single if kind == "csv" else list(VALUES)))
    sizes = st.none() | st.floats(-1e6, 1e6) | st.integers(-9, 9).map(float)
    columns = {
        "user": pl.Series(draw(st.lists(VALUES[user], min_size=size, max_size=size)), dtype=user),
        "kind": pl.Series(draw(st.lists(st.none() | VALUES[category], min_size=size, max_size=size)), dtype=category),
        "size": draw(st.lists(sizes, min_size=size, max_size=size)),
        "label": [place % 2 for place in range(size)],
    }
    return pl.DataFrame(columns, schema_overrides={"size": pl.Float64}), kind


def write(frame: pl.DataFrame, kind: str, path: Path) -> None:
    if kind == "parquet":
        frame.write_parquet(path)
    elif kind == "csv":
        # As Tessera's messages and most writers have times; a csv of polars has its own.
        frame.select(canonical(own) if own.dtype.is_temporal() else own for own in frame).write_csv(path)
    else:
        path.write_bytes(b"\n".join(msgspec.json.encode(row) for row in frame.to_dicts()))


def shaped(messages: list[bytes], events: Events) -> tuple[pl.DataFrame, list[str]]:
    """Messages as the stream reads them, and why some cannot be."""
    decode = event_decoder(events)
    rows: list[tuple[Any, ...]] = []
    bad: list[str] = []
    for message in messages:
        try:
            rows.append(decode(message).row)
        except EventError as error:
            bad.append(str(error))
    frame, wrong = event_rows(Rows(decode.columns, rows), events)
    return frame, bad + list(wrong.values())


@settings(max_examples=DRAWS, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
# The long run of many draws takes as long as it takes.
@pytest.mark.timeout(600 + DRAWS)
@given(tables())
def test_a_value_is_the_same_in_a_file_a_message_and_a_request(drawn: tuple[pl.DataFrame, str]) -> None:
    frame, kind = drawn
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / f"events.{kind}"
        write(frame, kind, path)
        label = Label(column="label")
        events = Events(
            path=path.name, user="user", categorical={"kind": Categorical()}, numeric=("size",), label=label
        )
        dataset = Dataset(name="d", source=Path(place) / "d.toml", events=events, split=Split(by="random"))
        try:
            offline, _ = read_events(dataset)
        except DatasetError:
            if kind == "parquet":
                _, bad = shaped(encode_rows(message_columns(load_events(dataset), events)), events)
                assert bad
            return
        messages = encode_rows(message_columns(load_events(dataset), events))
    online, bad = shaped(messages, events)
    assert bad == []
    expected = offline.with_columns(own if own.dtype == pl.List else _listed(own) for own in [offline["kind"]])
    assert online.equals(expected)
    if kind == "parquet":
        assert offline["user_id"].equals(canonical(frame["user"]).alias("user_id"))
    elif kind == "csv" and frame["user"].dtype == pl.String:
        assert offline["user_id"].equals(canonical(cells(frame["user"])).alias("user_id"))

    sink = Kept()
    request = EventsRequest.model_validate_json(
        msgspec.json.encode({"events": [msgspec.json.decode(m) for m in messages]})
    )
    bundle: Any = SimpleNamespace(dataset=dataset, canonical=VERSION)
    Intake(sink).events(bundle, request.events)
    assert shaped(sink.messages, events)[0].equals(expected)


def _listed(values: pl.Series) -> pl.Series:
    return pl.Series(values.name, [None if value is None else [value] for value in values], dtype=pl.List(pl.String))
