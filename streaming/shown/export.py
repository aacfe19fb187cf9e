"""Writes the messages of a topic to a file, each with the time of its append."""

import contextlib
import os
from pathlib import Path

from features.dataset.logs.impressions import APPENDED
from streaming.log.protocol import BLANK, EventLog


def export_topic(log: EventLog, topic: str, path: Path) -> int:
    """Writes all kept messages of a topic as JSON lines. The file is complete or absent.

    Args:
        log: Log of the topic.
        topic: Topic of JSON objects.
        path: File to write. An existing file is replaced.

    Returns:
        Number of messages.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, count = path.with_name(path.name + ".partial"), 0
    oldest = log.offsets_at(topic, 0)
    try:
        with partial.open("wb") as file:
            for part, end in sorted(log.end_offsets(topic).items()):
                for message in log.read(topic, part, oldest[part], end):
                    body = message.value.strip()
                    if body != BLANK and body.startswith(b"{") and body.endswith(b"}") and b"\n" not in body:
                        stamp = b'"%s":%d' % (APPENDED.encode(), message.timestamp_ms)
                        file.write(b"{" + stamp + (b"," if body[1:-1].strip() else b"") + body[1:] + b"\n")
                        count += 1
        os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
    return count
