"""How often a follower asks a registry that is a server, and one in a local file."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tessera.follow import release as module
from tessera.follow.release import ReleaseWatch


class Registry:
    """Counts the requests. Its stamp is None for a server."""

    documents = SimpleNamespace(running=lambda *_: [])

    def __init__(self, stamp: tuple[int, ...] | None) -> None:
        self.found, self.requests = stamp, 0

    def resolve(self, *_: str | None) -> Any:
        return SimpleNamespace(model="m")

    def stamp(self) -> tuple[int, ...] | None:
        return self.found

    def pulse(self, model: str) -> tuple[Any, ...]:
        self.requests += 1
        return [], "", str(self.requests)


def watched(stamp: tuple[int, ...] | None) -> tuple[Any, ReleaseWatch]:
    registry: Any = Registry(stamp)
    return registry, ReleaseWatch(registry, Path("unused"), None)


def test_a_server_is_asked_again_after_a_while_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    registry, watch = watched(None)
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    for seconds in (0.0, 0.1, 0.1, 0.1, 0.1, 0.1):
        now[0] += seconds
        watch.changed()
    assert registry.requests == 2


def test_a_file_is_read_when_it_has_changed() -> None:
    registry, watch = watched((1, 1, 1))
    for _ in range(5):
        watch.changed()
    registry.found = (1, 2, 1)
    for _ in range(5):
        watch.changed()
    assert registry.requests == 2
