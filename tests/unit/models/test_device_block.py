"""Batches that are gathered on a device are the assembler's batches, and captured steps are its steps."""

from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from features.device import CPU, Device, DeviceError, resolve
from features.history import Jagged
from models.ranker.network import DensePart, NetworkConfig, Ranker
from models.ranker.resident_steps import ResidentSteps
from models.ranker.train import dense_logits, new_ranker, snapshot
from models.semantic_id.codebook import rqvae
from models.table.admission import Admission, Sketch
from models.table.batch import Assembler, Batch, Entities, Examples
from models.table.device.block import of_examples
from models.table.reference import ReferenceTable
from models.table.schema import Feature, Numeric, Schema
from models.table.unified import UnifiedTable
from tests.build import SMALL_TRAIN

USERS, ITEMS, EVENTS, LENGTH = 9, 14, 60, 4


def schema_of(*, history: str = "mean", content: int = 0) -> Schema:
    features = [
        Feature("event.place", "event", "place", "event.place", 1),
        Feature("user_id", "user", "user_id", "user_id", 2),
        Feature("item.tags", "item", "tags", "item.tags", 2, "mean"),
        Feature("item.codes", "item", "codes", "item.codes", 1, "sum"),
        Feature("history.item.tags", "history", "tags", "item.tags", 2, history),  # type: ignore[arg-type]
        Feature("history.item.codes", "history", "codes", "item.codes", 1, "mean"),
    ]
    numeric = (Numeric("item.price", "item", "price", 0.5, 2.0), Numeric("history.length", "history", "history"))
    return Schema(tuple(features), numeric, rows=97, dim=4, history_length=LENGTH, admission=2, content=content)


def shop(schema: Schema, *, admitted: bool = True) -> tuple[Assembler, Examples]:
    """Entities with lists of 0 to 3 values, nulls, and histories of 0 to 4 items."""
    rng = np.random.default_rng(0)
    sketch = Sketch.sized(100)
    admission = Admission.off() if admitted else Admission(sketch, 2)
    users = pl.DataFrame({"user_id": [None if n == 3 else f"u{n}" for n in range(USERS)]})
    items = pl.DataFrame(
        {
            "tags": [[f"t{t}" for t in rng.integers(0, 6, rng.integers(0, 4))] for _ in range(ITEMS)],
            "codes": [[f"{n % 3}", f"{n % 3}-{n}"] for n in range(ITEMS)],
            "price": rng.random(ITEMS),
        },
        schema_overrides={"tags": pl.List(pl.String)},
    )
    events = pl.DataFrame({"place": [None if n % 7 == 0 else f"p{n % 4}" for n in range(EVENTS)]})
    vectors = rng.normal(size=(ITEMS, 3)).astype(np.float32)
    source = Assembler(
        schema,
        Entities(schema, "user", users, admission),
        Entities(schema, "item", items, admission),
        Entities(schema, "event", events, admission),
        vectors,
    )
    visits = rng.integers(0, LENGTH + 1, EVENTS)
    offsets = np.concatenate([[0], np.cumsum(visits)])
    examples = Examples(
        rng.integers(0, USERS, EVENTS),
        rng.integers(0, ITEMS, EVENTS),
        Jagged(rng.integers(0, ITEMS, offsets[-1]), offsets),
        rng.integers(0, 2, EVENTS).astype(np.float32),
        np.arange(EVENTS),
    )
    if not admitted:
        keys, times = source.sightings(examples)
        sketch.add(keys, times)
        source.admit(Admission(sketch, 9))
    return source, examples


def limits_of(schema: Schema, size: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(1)
    found = rng.choice([0, 1, 255], (size, len(schema.features)), p=[0.3, 0.3, 0.4]).astype(np.uint8)
    # Histories are never limited.
    found[:, [place for place, one in enumerate(schema.features) if one.of == "history"]] = 255
    return found


@pytest.mark.parametrize("history", ["mean", "attention"])
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("admitted", [False, True])
def test_a_batch_of_a_block_reads_what_the_assembler_reads(history: str, limited: bool, admitted: bool) -> None:
    schema = schema_of(history=history, content=3)
    source, examples = shop(schema, admitted=admitted)
    block = of_examples(source, examples, CPU)
    rows = np.random.default_rng(2).permutation(EVENTS)[:33]
    limits = limits_of(schema, len(rows)) if limited else None
    expected = source.batch(examples.take(rows), limits=limits)
    found = block.batch(torch.from_numpy(rows), None if limits is None else torch.from_numpy(limits))
    for kind in (ReferenceTable, UnifiedTable):
        table = kind(schema, learning_rate=0.1)
        assert torch.allclose(table(found), table(expected), atol=1e-6), kind
    assert torch.equal(found.numeric, expected.numeric)
    assert torch.equal(found.labels, expected.labels)
    assert found.content is not None
    assert torch.equal(found.content, expected.content if expected.content is not None else found.content[:0])
    if history == "attention":
        assert found.visits is not None
        assert expected.visits is not None
        assert torch.equal(found.visits, expected.visits)


def test_single_values_take_no_weights_and_the_rows_of_the_contract() -> None:
    features = tuple(Feature(name, "event", name, name, 2) for name in ("a", "b"))
    schema = Schema(features, (), rows=31, dim=4, history_length=0)
    events = pl.DataFrame({name: [f"{name}{n % 5}" for n in range(20)] for name in ("a", "b")})
    nothing = Entities(schema, "user", pl.DataFrame({"n": [0]}), Admission.off())
    source = Assembler(schema, nothing, nothing, Entities(schema, "event", events, Admission.off()))
    zeros = np.zeros(20, dtype=np.int64)
    examples = Examples(
        zeros, zeros, Jagged(zeros[:0], np.zeros(21, dtype=np.int64)), zeros.astype("f4"), np.arange(20)
    )
    found = of_examples(source, examples, CPU).batch(torch.arange(20))
    assert found.weights is None
    expected = source.batch(examples)
    assert torch.equal(found.values.view(20, 4).T.reshape(-1), expected.values)


def test_resident_steps_train_as_steps_on_the_assemblers_batches() -> None:
    schema = replace(schema_of(), content=3)
    source, examples = shop(schema)
    config = replace(SMALL_TRAIN, network=NetworkConfig(cross_layers=1, cross_rank=4, hidden=(8,)))
    rankers = [new_ranker(schema, config) for _ in range(2)]

    def step(place: int, batch: Batch) -> None:
        ranker = rankers[place]
        optimizer = optimizers[place]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(ranker(batch), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ranker.table.step()

    optimizers = [torch.optim.Adam(ranker.network.parameters(), lr=0.01) for ranker in rankers]
    steps = ResidentSteps(of_examples(source, examples, CPU), lambda batch: step(0, batch), 16, CPU, hides=True)
    order = np.random.default_rng(3).permutation(EVENTS)
    for start in range(0, EVENTS, 16):
        rows = order[start : start + 16]
        limits = limits_of(schema, len(rows))
        steps(rows, limits)
        step(1, source.batch(examples.take(rows), limits=limits))
    found, expected = (snapshot(ranker) for ranker in rankers)
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=2e-5), name
    assert not torch.equal(expected["table.weight"], snapshot(new_ranker(schema, config))["table.weight"])


def test_columns_of_the_dense_part_move_with_it_and_are_not_stored() -> None:
    schema = schema_of(history="attention")
    dense = DensePart(schema, NetworkConfig(hidden=(4,)))
    assert not [name for name in dense.state_dict() if "items_" in name or "plain" in name]
    wide = dense.double()
    assert {own.dtype for own in wide._columns.values()} == {torch.int64}
    assert {own.device.type for own in dense.to("meta")._columns.values()} == {"meta"}


def test_a_device_that_is_not_there_is_refused_by_its_missing_part() -> None:
    assert resolve("cpu") is CPU
    with pytest.raises(DeviceError, match="expected auto, cpu or cuda"):
        resolve("gpu")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        assert resolve("auto") is CPU
        with pytest.raises(DeviceError, match="torch"):
            resolve("cuda")
    with pytest.raises(DeviceError, match="float16 rows need a GPU"):
        UnifiedTable(schema_of(), learning_rate=0.1, precision="float16")


def test_a_table_beyond_the_card_names_both_sizes_and_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Device("cuda", {})
    monkeypatch.setattr(Device, "free_bytes", lambda self: 3_000_000_000)
    card.require(1_000_000_000, "the table")
    with pytest.raises(DeviceError, match=r"needs 2,500,000,000 bytes and the card has 3,000,000,000 free.*float16"):
        card.require(2_500_000_000, "the table")


class NoWaiting(TorchDispatchMode):
    """Refuses operators that wait for a device, or whose result's shape depends on values: no graph can hold them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in {
            "_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "equal", "is_nonzero",
        }, func  # fmt: skip
        if func.overloadpacket.__name__ in {"index", "index_put_", "index_put"}:
            assert all(one is None or one.dtype != torch.bool for one in args[1]), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("history", ["mean", "attention"])
@pytest.mark.parametrize("limited", [False, True])
def test_a_step_never_waits_for_the_device(history: str, limited: bool) -> None:
    schema = schema_of(history=history, content=3)
    source, examples = shop(schema, admitted=False)
    block = of_examples(source, examples, CPU)
    table = ReferenceTable(schema, learning_rate=0.1)
    dense = DensePart(schema, NetworkConfig(cross_layers=1, cross_rank=4, hidden=(8,)))
    ranker = Ranker(table, dense)
    limits = torch.from_numpy(limits_of(schema, 16)) if limited else None
    index = torch.arange(16)
    with NoWaiting():
        for precision in ("float32", "bfloat16"):
            batch = block.batch(index, limits)
            logits = dense_logits(ranker, table(batch), batch, precision)  # type: ignore[arg-type]
            torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels).backward()
    with pytest.raises(AssertionError), NoWaiting():
        int(index[3])


def test_a_step_of_the_codebook_never_waits_for_the_device() -> None:
    model = rqvae.RqVae(8, rqvae.RqVaeConfig(levels=2, codes=4, latent=4, hidden=(8,)))
    inputs, used = torch.randn(32, 8), torch.zeros(2, 4, dtype=torch.int64)
    rows = torch.arange(16)
    with NoWaiting():
        loss, codes = model(inputs[rows])
        used[0].index_add_(0, codes[:, 0], torch.ones_like(rows))
        loss.backward()
    assert int(used.sum()) == len(rows)
    assert model.codebooks.grad is not None
