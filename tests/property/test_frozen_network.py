"""The gradient that a stream computes without autograd is autograd's, for each shape of the default network."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.ranker.frozen import FrozenNetwork, gradient_of, recorded_gradient
from models.ranker.network import DensePart, NetworkConfig
from models.table.batch import Batch
from models.table.placement import PlacementColumn
from models.table.schema import Feature, Numeric, Schema

FEATURES = (
    Feature(name="item_id", of="item", column="item_id", salt="item_id", chunks=2),
    Feature(name="user_id", of="user", column="user_id", salt="user_id"),
)
ATTENDED = Feature(
    name="history.item_id", of="history", column="item_id", salt="item_id", chunks=2, pooling="attention"
)
SCHEMA = Schema(features=FEATURES, numeric=(), rows=64, dim=4, history_length=3)
PLACES = (PlacementColumn("position", positions=2),)


def frozen(schema: Schema, config: NetworkConfig, seed: int = 0) -> DensePart:
    """Network with biases and a position path that are not zero, as after training."""
    network = DensePart(schema, config, seed=seed, plain=True).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def batch_of(schema: Schema, size: int, seed: int) -> tuple[torch.Tensor, Batch]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    batch = Batch(
        values=torch.zeros(0, dtype=torch.int64),
        lengths=torch.zeros(0, dtype=torch.int64),
        scale=torch.ones(size, len(schema.keys)),
        numeric=drawn(size, len(schema.numeric)),
        labels=(drawn(size) > 0).float(),
        content=drawn(size, schema.content) if schema.content else None,
        placement=torch.randint(0, 3, (size, 1), generator=generator) if schema.placement else None,
    )
    return drawn(size, len(schema.keys) * schema.dim), batch


@given(
    layers=st.integers(1, 4),
    hidden=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    extra=st.fixed_dictionaries(
        {
            "content": st.sampled_from([0, 5]),
            "numeric": st.sampled_from([(), (Numeric("age", "user", "age"), Numeric("price", "item", "price"))]),
            "placement": st.sampled_from([(), PLACES]),
        }
    ),
    size=st.integers(1, 20),
    mean_of=st.integers(1, 300),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_the_gradient_without_autograd_is_autograds(
    layers: int, hidden: list[int], extra: dict[str, Any], size: int, mean_of: int, seed: int
) -> None:
    schema = replace(SCHEMA, **extra)
    network = frozen(schema, NetworkConfig(cross_layers=layers, cross_rank=3, hidden=tuple(hidden), content=4), seed)
    pooled, batch = batch_of(schema, size, seed)
    before = pooled.clone()
    logits, gradient = FrozenNetwork(network).gradient(pooled, batch, mean_of)
    expected_logits, expected = recorded_gradient(network, pooled, batch, mean_of)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient * mean_of, expected * mean_of, rtol=1e-4, atol=1e-5)
    assert torch.equal(pooled, before)
    again = FrozenNetwork(network).gradient(pooled, batch, mean_of)
    assert torch.equal(again[0], logits)
    assert torch.equal(again[1], gradient)


@pytest.mark.parametrize(
    ("schema", "config"),
    [
        (replace(SCHEMA, features=(*FEATURES, ATTENDED)), NetworkConfig()),
        (SCHEMA, NetworkConfig(kind="dlrm")),
    ],
)
def test_another_network_is_left_to_autograd(schema: Schema, config: NetworkConfig) -> None:
    network = frozen(schema, config)
    assert not FrozenNetwork.fits(network)
    pooled, batch = batch_of(schema, 5, 0)
    batch = replace(batch, visits=torch.tensor([0, 1, 2, 3, 3]))
    found, expected = gradient_of(network)(pooled, batch, 7), recorded_gradient(network, pooled, batch, 7)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_a_network_in_training_is_left_to_autograd() -> None:
    network = frozen(SCHEMA, NetworkConfig())
    assert FrozenNetwork.fits(network)
    assert not FrozenNetwork.fits(network.requires_grad_())
