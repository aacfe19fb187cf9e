"""A background sender does the newest request of each subject, and says how the last one ended."""

import logging
import threading

import pytest

from features.errors import StorageError
from features.storage.sender import BackgroundSender


def test_the_newest_request_of_each_subject_is_done(caplog: pytest.LogCaptureFixture) -> None:
    # A command that ran before in this process may have silenced the libraries.
    caplog.set_level(logging.WARNING, logger="features.storage.sender")
    done: list[tuple[str, str]] = []
    begun, held = threading.Event(), threading.Event()

    def work(subject: str, request: str) -> None:
        begun.set()
        assert held.wait(20)
        done.append((subject, request))
        if request == "refused":
            raise StorageError(f"{subject}: refused")

    sender = BackgroundSender(work)
    assert sender.wait("a") is None
    sender.ask("a", "first")
    assert begun.wait(20)
    for request in ("second", "third"):
        sender.ask("a", request)
    sender.ask("b", "refused")
    held.set()
    assert sender.wait("a") is None
    assert str(sender.wait("b")) == "b: refused"
    assert done == [("a", "first"), ("a", "third"), ("b", "refused")]
    assert "b: refused" in caplog.text
    sender.ask("b", "again")
    assert sender.wait("b") is None
    assert done[-1] == ("b", "again")


def test_a_fault_of_the_work_lets_nobody_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[type[BaseException]] = []
    told = threading.Event()

    def note(raised: threading.ExceptHookArgs) -> None:
        seen.append(raised.exc_type)
        told.set()

    monkeypatch.setattr(threading, "excepthook", note)

    def work(subject: str, request: str) -> None:
        if request == "fault":
            raise ZeroDivisionError

    sender = BackgroundSender(work)
    sender.ask("a", "fault")
    waiter = threading.Thread(target=sender.wait, args=("a",), daemon=True)
    waiter.start()
    waiter.join(20)
    assert not waiter.is_alive()
    assert told.wait(20)
    assert seen == [ZeroDivisionError]
    sender.ask("a", "next")
    assert sender.wait("a") is None
