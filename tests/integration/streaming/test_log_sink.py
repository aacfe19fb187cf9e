"""Messages sent over HTTP while the log does not answer are refused, and no caller waits."""

import contextlib
import sqlite3
import threading
import time
from pathlib import Path

import pytest

from features.errors import LogError
from serving.api.log_sink import LogSink
from tessera.settings import Settings

ONE = [(b"key", b"{}")]


def test_while_one_caller_waits_for_the_log_the_others_are_refused_and_soon_after_it_all_are_taken(
    tmp_path: Path,
) -> None:
    settings = Settings(home=tmp_path)
    with contextlib.closing(LogSink(settings.open_log, settings.topics)) as sink:
        sink.append("events", ONE)
        with contextlib.closing(sqlite3.connect(tmp_path / "log.db", isolation_level=None)) as stranger:
            stranger.execute("BEGIN IMMEDIATE")
            first = threading.Thread(target=sink.append, args=("events", ONE))
            first.start()
            time.sleep(0.1)
            with pytest.raises(LogError, match="takes too long"):
                sink.append("events", ONE)
            began = time.monotonic()
            for _ in range(20):
                with pytest.raises(LogError, match="did not answer a moment ago"):
                    sink.append("events", ONE)
            assert time.monotonic() - began < 0.5
            stranger.execute("ROLLBACK")
        first.join(20)
        assert not first.is_alive()
        time.sleep(1.1)
        sink.append("events", ONE)
    with contextlib.closing(settings.open_log()) as log:
        assert log.end_offsets("events")[0] == 3
