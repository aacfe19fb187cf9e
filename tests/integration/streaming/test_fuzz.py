"""Ten thousand hostile messages: nothing crashes, every one is accounted for, and the good ones among them count."""

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.bundle.delta import decode
from streaming.dead_letter import read_dead_letters
from streaming.log.protocol import Message
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from streaming.step import Step
from streaming.step_result import StepResult
from streaming.trainer import Trainer, TrainerOptions
from tessera.demo.synthetic import new_item
from tests.integration.world import World

TOPICS = Topics()
COUNT = 10_000
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2)
)
FIELDS = ("user_id", "item_id", "time", "clicked", "_event_id", "_schema", "_version", "_deleted", "_backfill", "title")


def accounted(outcome: StepResult) -> int:
    parts = (outcome.events, outcome.neutral, outcome.duplicates, outcome.items, outcome.deleted, outcome.stale)
    return sum(parts) + len(outcome.bad)


def _mangled(good: bytes, chance: random.Random) -> bytes:
    data = bytearray(good)
    for _ in range(chance.randint(1, 4)):
        kind = chance.randrange(4)
        place = chance.randrange(len(data)) if data else 0
        if kind == 0 and data:
            data[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[place:place] = bytes([chance.randrange(256)])
        elif kind == 2:
            del data[place : place + chance.randint(1, 5)]
        else:
            message = json.loads(good)
            name = chance.choice(list(message))
            message[name] = chance.choice([None, -1, 1e308, 2**63, 2**70, "", "\ud800", [], {}, [[]], True, "NaN"])
            return json.dumps(message).encode(errors="surrogatepass")
    return bytes(data)


@pytest.mark.slow
def test_ten_thousand_mangled_messages_through_log_step_and_dead_letters(world: World, tmp_path: Path) -> None:
    chance = random.Random(6)
    good = world.messages(500)
    events = [_mangled(chance.choice(good), chance) for _ in range(COUNT - 1_000)] + good
    items = [_mangled(json.dumps(new_item(n)).encode(), chance) for n in range(1_000)]
    chance.shuffle(events)
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        log.create_topics(TOPICS.partitions())
        log.append(TOPICS.events, [(None, message) for message in events])
        log.append(TOPICS.items, [(chance.choice([None, b"", b"\xff"]), message) for message in items])
        options = TrainerOptions(batch=256, lateness_s=1e9, most_bad=1.0)
        with contextlib.closing(Trainer(log, world.bundle, topics=TOPICS, options=options)) as trainer:
            while not trainer.drained():
                trainer.run_once(wait_s=0.2)
            totals = trainer.totals
            assert np.isfinite(trainer.step.ranker.table.weight.numpy()).all()
        applied = totals.events + totals.neutral + totals.duplicates + totals.items + totals.deleted + totals.stale
        assert applied + totals.bad == totals.messages == len(events) + len(items)
        assert len(read_dead_letters(log, TOPICS)) == totals.bad
        assert totals.events >= 500
        assert totals.bad > 1_000
        assert "poison" not in totals.causes, totals.causes


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_json_is_applied_or_set_aside(world: World, data: st.DataObject) -> None:
    step = _STEPS.setdefault(world.bundle.id, Step(world.bundle, TOPICS))
    drawn: list[Any] = data.draw(st.lists(VALUES | st.dictionaries(st.sampled_from(FIELDS), VALUES), max_size=8))
    topics = data.draw(st.lists(st.sampled_from([TOPICS.items, TOPICS.events]), min_size=8, max_size=8))
    messages = [
        Message(topic, 0, n, None, json.dumps(value).encode(), 1_700_000_000_000)
        for n, (topic, value) in enumerate(zip(topics, drawn, strict=False))
    ]
    outcome = step.apply(messages)
    assert accounted(outcome) == len(messages)
    assert all(change.seq == step.seq for change in outcome.deltas)


_STEPS: dict[str, Step] = {}


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_are_no_delta_or_a_sound_one(data: bytes) -> None:
    from features.errors import EventError

    with contextlib.suppress(EventError):
        found = decode(data)
        assert found.vectors.shape == (len(found.row_numbers), found.dim)
