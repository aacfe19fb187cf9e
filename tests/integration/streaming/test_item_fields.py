"""An encoder of fields in the stream: a streamed item has the vector of its fields alone, and no feature more."""

import json
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from features.content.content import FieldReader
from features.wire.decoder import item_decoder
from models.bundle import record
from models.bundle.bundle import load_bundle
from models.bundle.catalogue import Catalogue
from streaming.inbox import Inbox
from streaming.item_updates import ItemUpdates
from streaming.log.protocol import Message
from streaming.step_result import StepResult
from tessera.demo.synthetic import new_item
from tests.integration.world import World


def streamed(world: World, rows: list[dict[str, Any]], fields: tuple[str, ...]) -> list[record.ItemRecord]:
    """Records that the stream writes of items, with an encoder of some fields in the bundle."""
    bundle = load_bundle(world.bundle.directory)
    items = bundle.dataset.items
    assert items is not None
    assert bundle.encoder is not None
    if fields:
        reader = FieldReader(bundle.encoder, fields)
        bundle = replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, encoder=reader.id))
        bundle.__dict__["encoder"] = reader
    decode = item_decoder(items)
    messages = [Message("items", 0, n, None, json.dumps(row).encode(), 0) for n, row in enumerate(rows)]
    inbox = Inbox()
    for message in messages:
        inbox.add(message, decode(message.value))
    updates = ItemUpdates(bundle, Catalogue(bundle), decode.columns)
    outcome = StepResult()
    written = updates.apply(inbox, outcome)
    assert not outcome.bad
    return [record.decode_item(one.payload) for one in written]


def test_a_streamed_item_has_the_vector_of_its_fields_and_no_other_feature(world: World) -> None:
    rows = [new_item(number) for number in range(5)]
    items = world.bundle.dataset.items
    assert items is not None
    encoder = world.bundle.encoder
    assert encoder is not None
    name = items.text[0]
    plain, found, every = (streamed(world, rows, fields) for fields in ((), (name,), items.text))
    expected = encoder.encode([row[name] or "" for row in rows])
    assert b"".join(one.vector for one in found) == expected.astype("<f4").tobytes()
    assert [one.features for one in found] == [one.features for one in plain]
    # All fields in their order are the text.
    assert [one.vector for one in every] == [one.vector for one in plain]
    assert np.any(np.frombuffer(plain[0].vector, "<f4") != np.frombuffer(found[0].vector, "<f4"))
