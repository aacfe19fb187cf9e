"""The stream of a followed bundle begins again where its files vanished, and nowhere else."""

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from features.errors import BundleError, StreamError
from models.table.row_files import read_weight
from streaming.metrics import StreamMetrics
from tessera.follow import stream as module
from tessera.follow.stream import FollowedStream
from tests.servers import until


class Service:
    """Ends with each of the errors in turn, then runs until it is stopped."""

    def __init__(self, errors: list[Exception]) -> None:
        self.errors, self.runs = errors, 0

    def run(self, stop: threading.Event) -> None:
        self.runs += 1
        if self.errors:
            stop.set()
            raise self.errors.pop(0)
        stop.wait()


def followed(service: Any, opened: Callable[[], Any]) -> FollowedStream:
    wanted: Any = SimpleNamespace(release=SimpleNamespace(bundle="b-1"), roles=("challenger",))
    return FollowedStream(wanted, opened, lambda bundle: service, StreamMetrics())


def test_a_stream_whose_files_vanish_is_opened_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_AGAIN_S", 0.01)
    with pytest.raises(BundleError, match=f"{tmp_path}: neither table.safetensors nor files of table/") as missing:
        read_weight(tmp_path)
    service, opened = Service([missing.value, FileNotFoundError("gone")]), []
    stream = followed(service, lambda: opened.append(1) or SimpleNamespace(id="b-1"))
    stream.start()
    stream.train()
    until(lambda: service.runs == 3, 20)
    assert len(opened) == 3
    assert stream.state().state == "training"
    stream.stop()
    stream.join()
    assert stream.error is None


def test_a_stream_that_would_harm_stays_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AGAIN_S", 0.01)
    service = Service([StreamError("another topic")])
    stream = followed(service, lambda: SimpleNamespace(id="b-1"))
    stream.start()
    stream.train()
    stream.join()
    assert (service.runs, stream.state().state, str(stream.error)) == (1, "paused", "another topic")


def test_a_stream_that_is_stopped_while_it_waits_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service([BundleError("vanished")])
    stream = followed(service, lambda: SimpleNamespace(id="b-1"))
    stream.start()
    stream.train()
    until(lambda: stream.state().state == "paused", 20)
    stream.stop()
    stream.join()
    assert (service.runs, stream.error) == (1, None)


def test_a_stream_opens_its_bundle_and_takes_the_table_when_it_is_told() -> None:
    service, opened = Service([]), threading.Event()
    stream = followed(service, lambda: opened.set() or SimpleNamespace(id="b-1"))
    stream.start()
    assert opened.wait(20)
    until(lambda: stream.bundle is not None, 20)
    assert (service.runs, stream.state().state) == (0, "opening")
    stream.train()
    until(lambda: service.runs == 1, 20)
    stream.stop()
    stream.join()
    assert stream.error is None


def test_a_stream_that_is_stopped_before_it_may_train_takes_no_table() -> None:
    service = Service([])
    stream = followed(service, lambda: SimpleNamespace(id="b-1"))
    stream.start()
    until(lambda: stream.bundle is not None, 20)
    stream.stop()
    stream.join()
    assert (service.runs, stream.error) == (0, None)
