"""Fixtures of the tests of the stream: a log of each kind, and topics that no other test uses."""

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from streaming.log.kafka import KafkaLog
from streaming.log.protocol import EventLog
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics


@pytest.fixture(params=["embedded", "kafka"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EventLog]:
    """The embedded log, and then the log on Kafka."""
    opened: EventLog = (
        LocalLog(tmp_path / "log.db")
        if request.param == "embedded"
        else KafkaLog(request.getfixturevalue("kafka_address"))
    )
    with contextlib.closing(opened):
        yield opened


@pytest.fixture
def topics() -> Topics:
    """Topics of one test."""
    return Topics(f"t{uuid.uuid4().hex[:8]}-")
