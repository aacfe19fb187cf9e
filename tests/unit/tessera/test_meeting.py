"""TESSERA_MEET_S is how long the processes of a stream wait for each other, and TESSERA_REQUIRE what must be set."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from features.errors import StreamError, TesseraError
from streaming.trainer import TrainerOptions
from tessera.settings import Settings
from tessera.stream_processes import peers_of
from tests.servers import free_port


def test_a_process_that_does_not_come_is_named_after_the_seconds_that_are_set() -> None:
    settings = Settings.from_environment({"TESSERA_MEET_S": "1.5"})
    bundle = cast(Any, SimpleNamespace(id="b-1"))
    began = time.monotonic()
    with pytest.raises(StreamError, match="process 1"):
        peers_of(settings, bundle, TrainerOptions(), (0, 2, f"127.0.0.1:{free_port()}"))
    assert 1 < time.monotonic() - began < 40


@pytest.mark.parametrize("text", ["x", "0", "-1", "inf", "nan", "86401"])
def test_a_time_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(TesseraError, match=f"^TESSERA_MEET_S={text}: expected seconds"):
        Settings(home=Path(), meet_s=text).seconds_to_meet(45)
    assert Settings(home=Path()).seconds_to_meet(45) == 45


def test_each_variable_that_must_be_set_and_is_not_is_named() -> None:
    required = {"TESSERA_REQUIRE": "TESSERA_KAFKA TESSERA_REDIS  AWS_PROFILE"}
    with pytest.raises(TesseraError, match=r"^TESSERA_REDIS, AWS_PROFILE: not set, but TESSERA_REQUIRE names it; set"):
        Settings.from_environment(required | {"TESSERA_KAFKA": "k:1", "AWS_PROFILE": ""})
    assert Settings.from_environment(required | {"TESSERA_KAFKA": "k:1", "TESSERA_REDIS": "r", "AWS_PROFILE": "p"})
