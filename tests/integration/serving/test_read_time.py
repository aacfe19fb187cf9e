"""Expressions over the clock read in frame and step the time that the server read when it ranked."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from fastapi.testclient import TestClient

from features.dataset.descriptor import Dataset, load_dataset
from features.dataset.logs.impressions import joined_rows, row_message
from features.dataset.tables import read_events
from features.errors import DatasetError
from features.message import Rows, event_rows
from features.shown.message import Impression, Outcome, decode_impression, encode
from features.wire.decoder import event_decoder
from models.bundle import request_features
from serving.api.app import AppParts, create_app
from serving.ranking.service import RankService
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from serving.traffic.recorder import Recorder
from serving.traffic.router import Router
from tessera.pipeline.options import load_options
from tessera.pipeline.run import run
from tests.integration.pipeline.test_learn_from_shown import EVENTS, Kept, write
from tests.integration.world import quiet

FEATURES = """
[features]
hour = { sql = "EXTRACT(HOUR FROM event.time)", kind = "categorical" }
moment = "EXTRACT(MICROSECOND FROM event.time)"
[run.training]
max_epochs = 1
"""
NAMES = ("hour", "moment")
ASKED = "2021-05-06T07:08:09.123456Z"


def described(directory: Path) -> Dataset:
    path = directory / "shown.toml"
    path.write_text(EVENTS.replace("[split]", FEATURES + "[split]"))
    return load_dataset(path)


def features_of_files(directory: Path, messages: list[Impression]) -> tuple[Dataset, pl.DataFrame]:
    """Returns the features of the impressions' rows, as the frame and, checked to be equal, as the step makes them."""
    directory.mkdir()
    last = Impression("last", "u", messages[-1].time_ms + 10**7, "b", "shown", items=["i1"])
    (directory / "shown.jsonl").write_bytes(b"\n".join(map(encode, [*messages, last])))
    (directory / "done.jsonl").write_bytes(encode(Outcome(messages[0].id, messages[0].items[0], messages[0].time_ms)))
    dataset = described(directory)
    frame = read_events(dataset)[0].select("item_id", "time", *NAMES)
    decode = event_decoder(dataset.events)
    sent = [row_message(row, dataset.events) for row in joined_rows(dataset.events, directory)]
    stepped, bad = event_rows(Rows(decode.columns, [decode(one).row for one in sent]), dataset.events)
    assert not bad
    assert stepped.select(frame.columns).equals(frame)
    return dataset, frame


def test_frame_and_step_read_the_time_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1_200)
    dataset = described(tmp_path)
    bundle = run(
        dataset, tmp_path / "run", load_options(dataset), console=quiet(), registry=None, until="publish"
    ).bundle
    assert bundle is not None
    store, kept, served = MemoryStore(), Kept(), []
    fill_store(store, bundle)
    plain = request_features.request_frame

    def capture(*given: Any, **named: Any) -> pl.DataFrame:
        served.append(plain(*given, **named))
        return served[-1]

    monkeypatch.setattr(request_features, "request_frame", capture)
    parts = AppParts()
    recorder = Recorder(kept, parts.metrics)
    with TestClient(create_app(Router(RankService(bundle, store)), replace(parts, recorder=recorder))) as client:
        for more in ({}, {"at": ASKED}, {}, {"at": "1999-12-31T23:59:59.999999Z"}):
            body = {"user": "u1", "candidates": ["i1", "i2", "i3"], "k": 2, **more}
            assert client.post("/v1/rank", json=body).status_code == 200
    recorder.close()
    shown = [one for one in map(decode_impression, kept.messages) if isinstance(one, Impression)]
    assert [one.read_us for one in shown][1] == 1_620_284_889_123_456
    _, frame = features_of_files(tmp_path / "logs", shown)
    expected = pl.concat([one.select(NAMES).head(1) for one in served for _ in range(2)])
    assert frame.select(NAMES).equals(expected)
    assert frame["hour"].to_list()[2] == "7"
    assert frame["moment"].to_list()[6] == pytest.approx(59_999_999)
    # The order of the rows is that in which items were shown.
    assert frame["time"].to_list() == [1_000 * one.time_ms for one in shown for _ in range(2)]


def test_impressions_of_earlier_releases_read_their_own_time(tmp_path: Path) -> None:
    times = [1_700_000_000_123 + 3_600_000 * hour for hour in range(3)]
    old = [Impression(f"r{at}", "u1", at, "b", "shown", items=["i1"]) for at in times]
    mixed = [*old[:2], replace_read(old[2], 0)]
    _, frame = features_of_files(tmp_path / "logs", mixed)
    assert frame["hour"].to_list() == ["22", "23", "0"]
    assert frame["time"].to_list() == [1_000 * at for at in times]


def test_a_time_beyond_the_calendar_is_refused_by_name(tmp_path: Path) -> None:
    shown = [replace_read(Impression("r", "u1", 1_700_000_000_000, "b", "shown", items=["i1"]), 2**62)]
    with pytest.raises(DatasetError, match=r"shown.jsonl: \[events\] column '_read_us', row 1: .*fix the value"):
        features_of_files(tmp_path / "logs", shown)


def replace_read(shown: Impression, read_us: int) -> Impression:
    return Impression(shown.id, shown.user, shown.time_ms, "b", "shown", items=shown.items, read_us=read_us)
