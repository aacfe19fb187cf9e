"""The contract of `RankerNetwork`, held against every kind. A kind joins by one entry in `OPTIONS`."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from features.errors import BundleError, DatasetError
from models.networks import kinds
from models.networks.inputs import NetworkInputs, NetworkReads
from models.networks.kinds import DEFAULT, KINDS

# Kind → options that make it small.
OPTIONS: dict[str, dict[str, Any]] = {
    "dlrm": {"bottom": [8], "top": [16]},
    "deepfm": {"hidden": [16]},
    "din": {"attention": [6], "hidden": [16]},
    "mmoe": {"experts": 3, "expert": [16], "tower": [8]},
    "self-attention": {"inner": 8, "hidden": [16]},
}
BUILT_IN = set(KINDS)
READS = NetworkReads(fields=5, dim=4, numbers=3)
PAST = NetworkReads(fields=3, dim=4, numbers=3, width=8, history=6)
B = 12


def inputs_of(reads: NetworkReads, seed: int = 0, size: int = B) -> NetworkInputs:
    made = torch.Generator().manual_seed(seed)
    fields = torch.randn(size, reads.fields, reads.dim, generator=made)
    numbers = torch.randn(size, reads.numbers, generator=made)
    if not reads.width:
        return NetworkInputs(fields, numbers)
    return NetworkInputs(
        fields,
        numbers,
        torch.randn(size, reads.width, generator=made),
        torch.randn(size, reads.history, reads.width, generator=made),
        torch.arange(size) % (reads.history + 1),
    )


def fresh(kind: str, reads: NetworkReads, seed: int = 0) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kinds.new_network(kind, reads, OPTIONS.get(kind, {}))


def reads_of(kind: str) -> list[NetworkReads]:
    """Shapes that a kind may get: with numbers and without, with a history and without."""
    bare = NetworkReads(fields=4, dim=4, numbers=0)
    return [READS, bare, PAST] if kinds.wants_sequence(kinds.network_class(kind)) else [READS, bare]


@pytest.fixture(params=sorted(OPTIONS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_kind_of_this_repository_joins_the_suite() -> None:
    assert set(OPTIONS) == BUILT_IN


def test_an_example_has_one_logit_that_depends_on_no_other_example(kind: str) -> None:
    for reads in reads_of(kind):
        network, inputs = fresh(kind, reads).eval(), inputs_of(reads)
        logits = network(inputs)
        assert (logits.shape, logits.dtype) == ((B,), torch.float32)
        assert len(logits.unique()) == B
        order = torch.randperm(B, generator=torch.Generator().manual_seed(1))[:5]
        some = network(NetworkInputs(*(None if one is None else one[order] for one in inputs)))
        torch.testing.assert_close(some, logits[order], rtol=1e-5, atol=1e-5)
        assert network(NetworkInputs(*(None if one is None else one[:1] for one in inputs))).shape == (1,)


def test_several_tasks_have_a_logit_each(kind: str) -> None:
    for reads in (replace(one, tasks=3) for one in reads_of(kind)):
        network, inputs = fresh(kind, reads).eval(), inputs_of(reads)
        logits = kinds.check_logits(kind, network(inputs), B, 3)
        assert all(len(own.unique()) == B for own in logits.T)
        assert not torch.equal(logits[:, 0], logits[:, 1])
        one = network(NetworkInputs(*(None if part is None else part[:1] for part in inputs)))
        torch.testing.assert_close(one, logits[:1], rtol=1e-5, atol=1e-5)


def test_slots_behind_the_newest_item_mean_nothing(kind: str) -> None:
    if PAST not in reads_of(kind):
        return
    network, inputs = fresh(kind, PAST).eval(), inputs_of(PAST)
    assert inputs.history is not None
    assert inputs.visits is not None
    behind = torch.arange(PAST.history) >= inputs.visits.unsqueeze(1)
    other = inputs._replace(history=inputs.history.masked_fill(behind.unsqueeze(2), 1e3))
    torch.testing.assert_close(network(other), network(inputs), rtol=1e-5, atol=1e-5)
    within = inputs._replace(history=inputs.history.masked_fill(~behind.unsqueeze(2), 1e3))
    changed = network(within) != network(inputs)
    assert torch.equal(changed, inputs.visits > 0)


def test_every_input_and_every_parameter_has_a_gradient(kind: str) -> None:
    for reads in reads_of(kind):
        network, inputs = fresh(kind, reads), inputs_of(reads)
        floats = [one.requires_grad_() for one in inputs if one is not None and one.is_floating_point()]
        network(inputs).square().sum().backward()
        assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in floats if one.numel())
        missing = [name for name, own in network.named_parameters() if own.grad is None]
        assert missing == []


def test_the_seed_decides_the_weights(kind: str) -> None:
    for reads in reads_of(kind):
        one, same, other = (fresh(kind, reads, seed).state_dict() for seed in (3, 3, 4))
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert any(not torch.equal(one[name], other[name]) for name in one)


def test_it_learns_what_a_pair_of_fields_says(kind: str) -> None:
    network, inputs = fresh(kind, READS), inputs_of(READS, size=512)
    labels = ((inputs.fields[:, 0] * inputs.fields[:, 1]).sum(dim=1) > 0).float()
    loss_of = torch.nn.functional.binary_cross_entropy_with_logits
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(250):
        optimizer.zero_grad()
        loss_of(network(inputs), labels).backward()
        optimizer.step()
    with torch.no_grad():
        assert loss_of(network(inputs), labels) < 0.5 < math.log(2)


def test_it_learns_a_task_and_its_opposite(kind: str) -> None:
    network, inputs = fresh(kind, replace(READS, tasks=2)), inputs_of(READS, size=256)
    liked = (inputs.fields[:, 0, 0] > 0).float()
    labels = torch.stack([liked, 1 - liked], dim=1)
    loss_of = torch.nn.functional.binary_cross_entropy_with_logits
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss_of(network(inputs), labels).backward()
        optimizer.step()
    with torch.no_grad():
        assert loss_of(network(inputs), labels) < 0.3


def test_an_unknown_kind_or_option_is_named(kind: str) -> None:
    with pytest.raises(DatasetError, match=rf"{kind} has no such option; valid: "):
        kinds.check(kind, {"nonsense": 1})
    with pytest.raises(DatasetError, match=r"ranker 'dlmr' is unknown; the nearest is 'dlrm'"):
        kinds.check("dlmr", {})
    with pytest.raises(DatasetError, match="has none; set cross_layers"):
        kinds.check(DEFAULT, {"hidden": [1]})
    with pytest.raises(DatasetError, match=rf"ranker {kind}: .*\[run\.ranker\.options\]"):
        kinds.new_network(kind, READS, {"nonsense": 1})


def test_a_class_of_ones_own_is_refused_by_name() -> None:
    with pytest.raises(DatasetError, match=r"ranker nowhere:X: it cannot be imported \(No module named 'nowhere'\)"):
        kinds.check("nowhere:X", {})
    with pytest.raises(DatasetError, match="has no attribute 'X'"):
        kinds.check("json:X", {})
    with pytest.raises(DatasetError, match=r"JSONDecoder is no class of torch\.nn\.Module"):
        kinds.check("json:JSONDecoder", {})
    own = f"{__name__}:Own"
    assert len(kinds.source_of(own)) == 64
    with pytest.raises(BundleError, match=r"the bundle was trained with 0000"):
        kinds.new_network(own, READS, {}, source="0" * 64)
    with pytest.raises(DatasetError, match=r"of shape \(12, 1\), expected floats of shape \(12,\)"):
        kinds.check_logits(own, kinds.new_network(own, READS, {})(inputs_of(READS)), B)


class Own(torch.nn.Module):
    """A network whose logits have a wrong shape."""

    def __init__(self, reads: NetworkReads) -> None:
        super().__init__()
        self.head = torch.nn.Linear(reads.flat, 1)

    def forward(self, inputs: NetworkInputs) -> torch.Tensor:
        found: torch.Tensor = self.head(torch.cat([inputs.fields.flatten(1), inputs.numbers], dim=1))
        return found
