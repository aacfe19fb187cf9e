"""A message about an item with the text that the item had does not reach the encoder, and changes everything else."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.bundle import record
from models.bundle.bundle import Bundle, load_bundle
from streaming.log.protocol import Message
from streaming.log.topics import Topics
from streaming.step import Step
from streaming.step_state import restore_step, snapshot_of
from tessera.demo.synthetic import new_item
from tests.integration.world import World

ITEMS = [new_item(number) for number in range(6)]


class Recorded:
    """Encoder that keeps the texts it read."""

    def __init__(self, encoder: Any) -> None:
        self.base, self.id, self.dim, self.read = encoder, encoder.id, encoder.dim, list[str]()

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.read += texts
        found: NDArray[np.float32] = self.base.encode(texts)
        return found


@pytest.fixture
def bundle(world: World) -> Bundle:
    found = load_bundle(world.bundle.directory)
    found.__dict__["encoder"] = Recorded(found.encoder)
    return found


def sent(rows: Sequence[dict[str, Any]], first: int = 0) -> list[Message]:
    return [Message("items", 0, first + n, None, json.dumps(row).encode(), 0) for n, row in enumerate(rows)]


def texts_read(bundle: Bundle) -> list[str]:
    encoder = bundle.encoder
    assert isinstance(encoder, Recorded)
    found, encoder.read = encoder.read, []
    return found


def with_text(row: dict[str, Any], bundle: Bundle, text: str) -> dict[str, Any]:
    items = bundle.dataset.items
    assert items is not None
    return row | {items.text[0]: text}


def test_a_text_is_encoded_once_and_the_records_are_those_of_a_step_that_encodes_all(bundle: Bundle) -> None:
    step, slow = Step(bundle, Topics()), Step(bundle, Topics())
    changed = [with_text(ITEMS[0], bundle, "another text"), *ITEMS[1:], new_item(7)]
    for number, (rows, count) in enumerate([(ITEMS, 6), (changed, 2), (changed, 0), (ITEMS, 1)]):
        batch = sent(rows, 10 * number)
        texts_read(bundle)
        fast = step.apply(batch)
        assert len(texts_read(bundle)) == count
        slow.items.texts.clear()
        assert fast.payloads == slow.apply(batch).payloads
        assert np.array_equal(step.catalogue.vectors, slow.catalogue.vectors)


def test_features_change_without_the_text(bundle: Bundle) -> None:
    items = bundle.dataset.items
    assert items is not None
    feature = next(iter(name for name in items.categorical if name not in items.text))
    step = Step(bundle, Topics())
    step.apply(sent(ITEMS[:1]))
    texts_read(bundle)
    step.apply(sent([ITEMS[0] | {feature: "another"}], 10))
    assert texts_read(bundle) == []
    (found,) = step.items.records.values()
    assert "another" in str(record.decode_item(found).features)


def test_a_deleted_item_is_encoded_again(bundle: Bundle) -> None:
    step = Step(bundle, Topics())
    step.apply(sent(ITEMS[:1]))
    step.apply(sent([ITEMS[0] | {"_deleted": True}], 10))
    texts_read(bundle)
    step.apply(sent(ITEMS[:1], 20))
    assert len(texts_read(bundle)) == 1


def test_a_restored_step_encodes_the_same_texts(bundle: Bundle) -> None:
    step, restored = Step(bundle, Topics()), Step(bundle, Topics())
    step.apply(sent(ITEMS[:4]))
    snapshot = snapshot_of(step, deltas=(0,), inputs={})
    restore_step(restored, snapshot)
    texts_read(bundle)
    expected = step.apply(sent(ITEMS, 10)).payloads
    read = texts_read(bundle)
    assert len(read) == 2
    assert restored.apply(sent(ITEMS, 10)).payloads == expected
    assert texts_read(bundle) == read
    # A snapshot of an earlier release knows no texts.
    older = Step(bundle, Topics())
    restore_step(older, replace(snapshot, memory=type(snapshot.memory)(**_without_texts(snapshot.memory))))
    texts_read(bundle)
    assert older.apply(sent(ITEMS, 10)).payloads == expected
    assert len(texts_read(bundle)) == 6


def _without_texts(memory: Any) -> dict[str, Any]:
    return {name: getattr(memory, name) for name in memory.__struct_fields__ if name != "item_texts"}
