"""A silent store of Google's protocol is named in time, although its client tries six times."""

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest

from features.errors import StorageError
from features.storage import patience
from features.storage.location import Remote


@contextlib.contextmanager
def _silent_server() -> Iterator[str]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(50)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_a_silent_store_is_named_after_the_limit_and_not_after_all_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    # The client reads the first when it is imported; without it, it asks for the bucket's kind with real credentials.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    monkeypatch.setattr(patience, "_ANSWER_S", 0.5)
    monkeypatch.setattr(patience, "_SILENT_S", 1.0)
    with _silent_server() as address:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        from gcsfs import GCSFileSystem

        GCSFileSystem.clear_instance_cache()
        try:
            began = time.monotonic()
            with pytest.raises(StorageError, match=r"^gs://shop/a: the store failed .*; it answers too slowly"):
                Remote("gs://shop/a").read_bytes()
            # Six tries have pauses of 31 s and more between them.
            assert time.monotonic() - began < 25
        finally:
            GCSFileSystem.clear_instance_cache()


def test_options_that_the_user_sets_are_left_alone() -> None:
    assert set(patience.patience("gs", ())) == {"requests_timeout", "session_kwargs"}
    assert set(patience.patience("gs", ("session_kwargs",))) == {"requests_timeout"}
    assert patience.patience("memory", ()) == {}
    # One object, so that fsspec keeps one client.
    assert patience.patience("gs", ())["session_kwargs"] == patience.patience("gcs", ())["session_kwargs"]
