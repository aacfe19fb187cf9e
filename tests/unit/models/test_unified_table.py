"""The fused table and its plain twin, for features of several values, pooled by mean and by sum."""

import numpy as np
import pytest
import torch
from torch import Tensor

from models.table.batch import Batch
from models.table.reference import EmbeddingTable, ReferenceTable
from models.table.unified import UnifiedTable
from tests.build import pooled_batch, pooled_schema

STEPS, SIZE, RATE = 100, 16, 0.05
SCHEMA = pooled_schema()
WIDTH = len(SCHEMA.keys) * SCHEMA.dim


def batches(count: int = STEPS) -> list[Batch]:
    rng = np.random.default_rng(3)
    return [pooled_batch(SCHEMA, SIZE, rng) for _ in range(count)]


def loss_of(pooled: Tensor) -> Tensor:
    """A loss whose gradient is of one size all the way."""
    direction = torch.linspace(-1, 1, WIDTH)
    return torch.nn.functional.softplus(pooled @ direction).sum()


def step(table: EmbeddingTable, batch: Batch) -> Tensor:
    pooled = table(batch)
    loss_of(pooled).backward()
    if isinstance(table, ReferenceTable):
        table.step()
    return pooled.detach()


def trained(seed: int = 5) -> UnifiedTable:
    table = UnifiedTable(SCHEMA, learning_rate=RATE, seed=seed)
    for batch in batches(20):
        step(table, batch)
    return table


def test_the_fused_table_is_the_reference_over_a_hundred_steps() -> None:
    fused, plain = UnifiedTable(SCHEMA, learning_rate=RATE, seed=5), ReferenceTable(SCHEMA, learning_rate=RATE, seed=5)
    assert torch.equal(fused.weight, plain.weight)
    start = fused.weight.clone()
    for batch in batches():
        torch.testing.assert_close(step(fused, batch), step(plain, batch), rtol=0, atol=1e-6)
    torch.testing.assert_close(fused.weight, plain.weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(fused.accumulator, plain.accumulator, rtol=1e-5, atol=1e-6)
    assert (fused.weight - start).abs().max() > 0.1


def test_a_set_learning_rate_is_the_rate_of_the_next_step() -> None:
    fused, plain = UnifiedTable(SCHEMA, learning_rate=9.0, seed=5), ReferenceTable(SCHEMA, learning_rate=RATE, seed=5)
    fused.set_learning_rate(RATE)
    for batch in batches(5):
        step(fused, batch)
        step(plain, batch)
    torch.testing.assert_close(fused.weight, plain.weight, rtol=0, atol=1e-6)


def test_only_rows_of_the_batch_move() -> None:
    table = UnifiedTable(SCHEMA, learning_rate=RATE, seed=5)
    before, batch = table.weight.clone(), batches(1)[0]
    untouched = ~torch.isin(torch.arange(SCHEMA.rows), batch.values[:20])
    small = Batch(batch.values[:20], torch.tensor([20] + [0] * (len(batch.lengths) - 1)), *_rest(batch))
    step(table, small)
    assert torch.equal(table.weight[untouched], before[untouched])
    assert torch.equal(table.accumulator[untouched], torch.zeros(int(untouched.sum())))
    assert (table.weight[~untouched] != before[~untouched]).any(dim=1).all()


def _rest(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.scale, batch.numeric, batch.labels


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    first, second, other = trained(), trained(), trained(seed=6)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.accumulator, second.accumulator)
    assert not torch.equal(first.weight, other.weight)


def test_writing_to_the_live_rows_changes_what_the_next_batch_reads() -> None:
    table, batch = trained(), batches(1)[0]
    table.weight.zero_()
    assert torch.equal(table(batch), torch.zeros(SIZE, WIDTH))


def test_an_example_without_values_reads_zeros() -> None:
    table, empty = trained(), torch.zeros(len(SCHEMA.keys) * 2, dtype=torch.int64)
    batch = Batch(empty[:0], empty, torch.ones(2, len(SCHEMA.keys)), torch.zeros(2, 0), torch.zeros(2))
    assert torch.equal(table(batch), torch.zeros(2, WIDTH))


@pytest.mark.parametrize("kind", [UnifiedTable, ReferenceTable])
def test_permuting_the_features_changes_the_order_of_the_output_alone(
    kind: type[UnifiedTable] | type[ReferenceTable],
) -> None:
    turned = pooled_schema(permuted=True)
    place = [SCHEMA.keys.index(key) for key in turned.keys]
    one, two = kind(SCHEMA, learning_rate=RATE, seed=5), kind(turned, learning_rate=RATE, seed=5)
    columns = np.concatenate([np.arange(SCHEMA.dim) + SCHEMA.dim * key for key in place])
    for batch in batches(20):
        rows = batch.values.split(batch.lengths.view(-1, SIZE).sum(dim=1).tolist())
        permuted = Batch(
            torch.cat([rows[key] for key in place]),
            batch.lengths.view(-1, SIZE)[place].flatten(),
            batch.scale[:, place],
            batch.numeric,
            batch.labels,
        )
        before, after = one(batch), two(permuted)
        torch.testing.assert_close(after, before[:, columns], rtol=0, atol=1e-6)
        loss_of(before).backward()
        direction = torch.linspace(-1, 1, WIDTH)[columns]
        torch.nn.functional.softplus(after @ direction).sum().backward()
        for table in (one, two):
            if isinstance(table, ReferenceTable):
                table.step()
    torch.testing.assert_close(one.weight, two.weight, rtol=0, atol=1e-6)
