"""Packed blocks give the batches of the assembler, their rows hashed on the device by the contract."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from features.device import CPU
from features.errors import DatasetError
from features.frame import Frame
from features.frame_blocks import held_blocks
from features.hashing import HashSpec, fingerprint
from models.ranker.loading import LoadedBlocks, assembler, examples, sighted
from models.ranker.order import EpochOrder
from models.ranker.resident_steps import StreamedSteps
from models.ranker.train import new_ranker, snapshot
from models.table.admission import Admission, Sketch
from models.table.batch import Batch
from models.table.device import hashing
from models.table.device.block import of_examples
from models.table.device.columns import Dimensions
from models.table.device.packed import open_packed, pack
from models.table.device.stream import BlockStream
from models.table.schema import Feature, Numeric, Schema
from models.table.unified import UnifiedTable
from tests.build import SMALL_TRAIN, coloured_frame, coloured_schema


@given(
    prints=arrays(np.uint64, st.integers(0, 200), elements=st.integers(0, 2**64 - 1)),
    rows=st.integers(1, 2**32 - 1),
    chunks=st.integers(1, 4),
    salt=st.text(max_size=8),
)
def test_a_device_hashes_to_the_rows_of_the_contract(prints: np.ndarray, rows: int, chunks: int, salt: str) -> None:
    spec = HashSpec(rows)
    found = hashing.lookup(spec, salt, chunks, torch.from_numpy(prints.view(np.int64)))
    assert np.array_equal(found.numpy(), spec.lookup(salt, chunks, prints))


def frame_of(events: int, *, lists: bool) -> pl.DataFrame:
    rng = np.random.default_rng(events)
    tags = [[f"t{t}" for t in rng.integers(0, 9, rng.integers(0, 4))] or None for _ in range(events)]
    return pl.DataFrame(
        {
            "event": np.arange(events),
            "user": np.zeros(events, dtype=np.uint32),
            "item": np.zeros(events, dtype=np.uint32),
            "label": rng.integers(0, 2, events).astype(np.int8),
            "history": [[0] * int(n) for n in rng.integers(0, 3, events)],
            "place": [None if n % 7 == 0 else f"p{n % 5}" for n in range(events)],
            "size": [f"s{n % 3}" for n in rng.integers(0, 30, events)],
            "exact": [f"e{n}" for n in rng.integers(0, 4, events)],
            "tags": tags if lists else [["t1"]] * events,
            "price": [None if n % 11 == 0 else float(n) ** 1.5 for n in range(events)],
            "stock": rng.random(events, dtype=np.float32),
        },
        schema_overrides={"history": pl.List(pl.UInt32), "tags": pl.List(pl.String)},
    )


def schema_of(*, lists: bool) -> Schema:
    features = [
        Feature("size", "event", "size", "size", 2),
        Feature("item.kind", "item", "kind", "kind", 1),
        Feature("history.kind", "history", "kind", "kind", 1),
    ]
    if lists:
        features += [
            Feature("tags", "event", "tags", "tags", 2, "mean"),
            Feature("place", "event", "place", "place", 1),
            Feature("exact", "event", "exact", "exact", 1, "mean", ("e0", "e2", "e9")),
        ]
    numeric = (
        Numeric("price", "event", "price", 2.0, 1.5),
        Numeric("stock", "event", "stock", 0.3, 0.2),
        Numeric("item.weight", "item", "weight"),
        Numeric("history.length", "history", "history", 0.1, 0.7),
    )
    return Schema(tuple(features), numeric, rows=89, dim=4, history_length=2)


@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("admitted", [False, True])
def test_a_packed_block_reads_what_the_assembler_reads(tmp_path: Path, lists: bool, admitted: bool) -> None:
    schema, part = schema_of(lists=lists), frame_of(50, lists=lists)
    one = pl.DataFrame({"user_id": ["u"]})
    frame = Frame(one, pl.DataFrame({"item_id": ["i"], "kind": ["k"], "weight": [3.0]}), part)
    sketch = Sketch.sized(100)
    admission = Admission.off() if admitted else Admission(sketch, 9)
    source, rows = assembler(schema, frame, part, admission), examples(part)
    if not admitted:
        sketch.add(*source.sightings(rows))
        source.admit(Admission(sketch, 9))
    pack(schema, part, rows, tmp_path / "block")
    dimensions = Dimensions(schema, source.users, source.items, None, CPU)
    stream = BlockStream(dimensions, source.admission, tmp_path, lambda _, path: (tmp_path / "block").rename(path), CPU)
    found, expected = stream.take(0), of_examples(source, rows, CPU)
    stream.close()
    index = torch.from_numpy(np.random.default_rng(1).permutation(50)[:33])
    table = UnifiedTable(schema, learning_rate=0.1)
    mine, theirs = found.batch(index), expected.batch(index)
    assert torch.allclose(table(mine), table(theirs), atol=1e-6)
    assert torch.allclose(mine.numeric, theirs.numeric, atol=1e-6)
    assert torch.equal(mine.labels, theirs.labels)
    twin = source.batch(rows.take(index.numpy()))
    assert torch.allclose(table(mine), table(twin), atol=1e-6)


def test_a_block_takes_the_place_of_another(tmp_path: Path) -> None:
    frame = coloured_frame(events=200)
    schema = replace(coloured_schema(frame), admission=0)
    part = frame.part("train")
    blocks = [
        of_examples(assembler(schema, frame, one, Admission.off()), examples(one), CPU)
        for one in (part.head(90), part.tail(70), part.tail(71))
    ]
    assert not blocks[1].take_over(blocks[2])
    place = blocks[1].roomy(71)
    held = place.inputs[1]
    assert place.take_over(blocks[2])
    assert place.inputs[1] is held
    index = torch.arange(71)
    found, expected = place.batch(index), blocks[2].batch(index)
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.numeric, expected.numeric)
    assert place.size == 71


def test_a_damaged_block_is_named(tmp_path: Path) -> None:
    schema, part = schema_of(lists=True), frame_of(20, lists=True)
    path = tmp_path / "block"
    pack(schema, part, examples(part), path)
    packed = open_packed(path)
    assert np.array_equal(packed.prints("exact"), fingerprint(part["exact"].unique(maintain_order=True).to_list()))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DatasetError, match=r"ends after .* packs it again"):
        packed.read(torch.empty(packed.size, dtype=torch.uint8))
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(DatasetError, match="holds no packed block"):
        open_packed(path)


def test_streamed_steps_train_as_steps_on_the_assemblers_batches(tmp_path: Path) -> None:
    frame = coloured_frame(events=400)
    schema = coloured_schema(frame)
    source = sighted(schema, frame, held_blocks(frame.part("train")))
    loaded = LoadedBlocks(source, {"train": held_blocks(frame.part("train"), 3)})
    heights = loaded.parts["train"].heights
    rankers = [new_ranker(schema, SMALL_TRAIN) for _ in range(2)]
    optimizers = [torch.optim.Adam(ranker.network.parameters(), lr=0.01) for ranker in rankers]

    def step(place: int, batch: Batch) -> None:
        loss = torch.nn.functional.binary_cross_entropy_with_logits(rankers[place](batch), batch.labels)
        optimizers[place].zero_grad()
        loss.backward()
        optimizers[place].step()
        rankers[place].table.step()

    dimensions = Dimensions(schema, source.users, source.items, source.vectors, CPU)
    stream = BlockStream(dimensions, source.admission, tmp_path, partial(loaded.pack, "train"), CPU)
    steps = StreamedSteps(stream, partial(step, 0), 16, CPU, room=max(heights), hides=False)
    for epoch in range(2):
        order = EpochOrder(heights, 16, seed=1, epoch=epoch)
        for draw in order.draws():
            steps.ask(draw.block)
            assert steps(draw.block, draw.rows, None)
            own, rows = loaded.load("train", draw.block)
            step(1, own.batch(rows.take(draw.rows)))
    stream.close()
    found, expected = (snapshot(ranker) for ranker in rankers)
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=2e-5), name
    assert not torch.equal(expected["table.weight"], snapshot(new_ranker(schema, SMALL_TRAIN))["table.weight"])
    assert len(list(tmp_path.iterdir())) == 3
