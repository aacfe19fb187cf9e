"""The table, the ranker and the codebook on a real card. Without a card these tests are skipped, and say so."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from features import frame_blocks
from features.content.sentence import SentenceEncoder
from features.device import CPU, Device, DeviceError, missing_part, resolve
from features.hashing import HashSpec, fingerprint
from models.ranker.network import NetworkConfig
from models.ranker.resident_steps import ResidentSteps
from models.ranker.train import Checkpointing, new_ranker, snapshot, train
from models.semantic_id.codebook import residual_kmeans, rqvae, rqvae_fit
from models.semantic_id.codebook.residual_kmeans import ResidualKMeansConfig
from models.table.device import hashing
from models.table.device.block import of_examples
from models.table.unified import UnifiedTable
from tessera.bench.device.encoders import texts_of, write_model
from tests.build import SMALL_TRAIN, coloured_frame, coloured_schema
from tests.unit.models.test_device_block import EVENTS, limits_of, schema_of, shop

MISSING = missing_part()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"no card: {MISSING}")


@pytest.fixture(scope="module")
def card() -> Device:
    return resolve("cuda")


@pytest.mark.parametrize("history", ["mean", "attention"])
@pytest.mark.parametrize("limited", [False, True])
def test_a_batch_on_the_card_reads_what_the_processor_reads(card: Device, history: str, limited: bool) -> None:
    schema = schema_of(history=history, content=3)
    source, examples = shop(schema, admitted=False)
    rows = np.random.default_rng(2).permutation(EVENTS)[:33]
    limits = limits_of(schema, len(rows)) if limited else None
    expected = of_examples(source, examples, CPU).batch(
        torch.from_numpy(rows), None if limits is None else torch.from_numpy(limits)
    )
    found = of_examples(source, examples, card).batch(card.put(rows), None if limits is None else card.put(limits))
    assert torch.equal(found.values.cpu(), expected.values)
    assert found.weights is not None
    assert expected.weights is not None
    assert torch.equal(found.weights.cpu(), expected.weights)
    there, here = UnifiedTable(schema, learning_rate=0.1, device=card), UnifiedTable(schema, learning_rate=0.1)
    there.weight.copy_(here.weight)
    assert torch.allclose(there(found).cpu(), here(expected), atol=1e-6)
    # The list of lists of the assembler takes the other way through the table.
    whole = source.batch(examples.take(rows), limits=limits)
    assert torch.allclose(there(whole.to(card)).cpu(), here(whole), atol=1e-6)


def trained_by(card: Device, *, graph: bool) -> dict[str, torch.Tensor]:
    schema = replace(schema_of(history="attention"), content=3)
    source, examples = shop(schema, admitted=False)
    config = replace(SMALL_TRAIN, network=NetworkConfig(cross_layers=1, cross_rank=4, hidden=(8,)))
    ranker = new_ranker(schema, config, card)
    optimizer = torch.optim.Adam(ranker.network.parameters(), lr=0.01, fused=True, capturable=True)

    def step(batch: torch.Tensor) -> None:
        loss = torch.nn.functional.binary_cross_entropy_with_logits(ranker(batch), batch.labels)  # type: ignore[attr-defined]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    steps = ResidentSteps(of_examples(source, examples, card), step, 16, card, hides=True, graph=graph)  # type: ignore[arg-type]
    rng = np.random.default_rng(3)
    for _ in range(12):
        rows = rng.permutation(EVENTS)[:16]
        steps(rows, limits_of(schema, 16))
    steps(rng.permutation(EVENTS)[:5], limits_of(schema, 5))
    card.synchronize()
    return snapshot(ranker)


def test_a_graph_trains_as_eager_steps_and_twice_to_the_same_bits(card: Device) -> None:
    graph, again, eager = (trained_by(card, graph=one) for one in (True, True, False))
    for name, tensor in graph.items():
        assert torch.equal(tensor, again[name]), name
        assert torch.allclose(tensor, eager[name], atol=1e-5), name


def test_a_training_on_the_card_ends_on_the_processor_as_good(card: Device) -> None:
    frame = coloured_frame(events=1_500)
    schema = coloured_schema(frame)
    losses = {}
    for name in ("cpu", "cuda"):
        trained = train(schema, frame, replace(SMALL_TRAIN, device=name))  # type: ignore[arg-type]
        losses[name] = min(trained.epochs)
        assert trained.ranker.table.weight.device.type == "cpu"
        assert trained.device["device"] == name
    assert abs(losses["cuda"] - losses["cpu"]) < 0.05
    again = train(schema, frame, replace(SMALL_TRAIN, device="cuda"))
    assert again.epochs == train(schema, frame, replace(SMALL_TRAIN, device="cuda")).epochs


def test_rows_of_16_bits_train_and_come_back_as_floats(card: Device) -> None:
    frame = coloured_frame(events=600)
    schema = coloured_schema(frame)
    trained = train(schema, frame, replace(SMALL_TRAIN, device="cuda", row_precision="float16"))
    assert trained.ranker.table.weight.dtype == torch.float32
    assert np.isfinite(trained.epochs).all()


def test_a_table_beyond_the_card_is_refused_before_it_is_made(card: Device) -> None:
    schema = replace(schema_of(), rows=2**32 - 1, dim=64)
    with pytest.raises(DeviceError, match="the card has"):
        UnifiedTable(schema, learning_rate=0.1, device=card)


def test_a_codebook_codes_equally_on_both_devices_and_fits_twice_to_the_same_bits(card: Device) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((50_000, 64), dtype=np.float32)
    config = rqvae.RqVaeConfig(steps=200, codes=64)
    book, again = (rqvae_fit.fit(vectors[:5_000], config, device=card) for _ in range(2))
    assert book.id == again.id
    there = book.encode(vectors)
    book.device = CPU
    assert np.array_equal(there, book.encode(vectors))


def test_a_k_means_codebook_codes_equally_on_both_devices(card: Device) -> None:
    vectors = np.random.default_rng(0).standard_normal((50_000, 64), dtype=np.float32)
    config = ResidualKMeansConfig(codes=64)
    book, again = (residual_kmeans.fit(vectors[:5_000], config, device=card) for _ in range(2))
    assert book.id == again.id
    there = book.encode(vectors)
    book.device = CPU
    assert np.array_equal(there, book.encode(vectors))


def test_no_row_of_100_million_lookups_differs(card: Device) -> None:
    rng = np.random.default_rng(1)
    looked_up = 0
    salts = ("user_id", "item_id", "item.tags", "event.place", "semantic_id", "event.device / item.format", "läufer")
    while looked_up < 100_000_000:
        for place, salt in enumerate(salts):
            spec, chunks = HashSpec(int(rng.integers(1, 2**32))), 1 + place % 4
            prints = rng.integers(0, 2**64, 1_000_000, dtype=np.uint64)
            found = hashing.lookup(spec, salt, chunks, card.put(prints.view(np.int64)))
            expected = spec.lookup(salt, chunks, prints)
            looked_up += expected.size
            assert torch.equal(found, card.put(expected)), salt
    words = [f"value {number}" for number in range(50_000)]
    vocabulary, prints = fingerprint(words[:1_000]), fingerprint(words)
    exact = hashing.exact_lookup(vocabulary, card.put(prints.view(np.int64)), 7, 2, 2).cpu().numpy()
    expected = np.where(np.arange(50_000)[:, None] < 1_000, 7 + 2 * np.arange(50_000)[:, None] + np.arange(2), -1)
    assert np.array_equal(exact, expected)


def test_blocks_that_pass_through_the_card_train_as_the_processor_does(
    card: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(frame_blocks, "BLOCK_ROWS", 300)
    frame = coloured_frame(events=1_500)
    schema = coloured_schema(frame)
    assert len(frame.blocks("train")) > 2
    halfway = Checkpointing(tmp_path / "halfway")
    found = train(schema, frame, replace(SMALL_TRAIN, device="cuda"), checkpointing=halfway)
    expected = train(schema, frame, replace(SMALL_TRAIN, device="cpu"))
    assert abs(min(found.epochs) - min(expected.epochs)) < 0.05
    assert not halfway.path.with_suffix(".blocks").exists()
    # Without a checkpoint the files lie aside.
    assert train(schema, frame, replace(SMALL_TRAIN, device="cuda")).epochs == found.epochs


def test_bytes_on_their_way_arrive_in_order(card: Device) -> None:
    staging, rng = card.staging(), np.random.default_rng(0)
    sent = [rng.standard_normal(int(size), dtype=np.float32) for size in rng.integers(1, 2_000_000, 20)]
    for array, there in zip(sent, [staging.put_array(array) for array in sent], strict=True):
        assert np.array_equal(there.cpu().numpy(), array)


def test_an_encoder_in_half_precision_agrees_with_the_processor(card: Device, tmp_path: Path) -> None:
    write_model(tmp_path)
    texts = [*texts_of(300, 12, 0), "", " "]
    plain, encoder = (SentenceEncoder(str(tmp_path / "model")) for _ in range(2))
    encoder.device = card
    assert encoder.id == plain.id
    found, expected = encoder.encode(texts), plain.encode(texts)
    assert (found * expected).sum(axis=1)[:-2].min() > 0.999
    assert not found[-2:].any()
