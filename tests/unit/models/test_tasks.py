"""Laws of several tasks: the loss adds up over parts, an unknown label adds nothing, and bytes keep labels."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.networks.tasks import TaskLosses, mean_loss, summed_log_loss, summed_loss
from models.ranker.evaluate import quality
from models.table.device.packed import packed_labels, unpacked_labels

WEIGHTS = {"buy": 2.0, "click": 1.0, "like": 0.5}
LABELS = st.lists(st.tuples(*(st.sampled_from([0.0, 1.0, math.nan]) for _ in WEIGHTS)), min_size=1, max_size=30)


def tasks(*, uncertainty: bool = False) -> TaskLosses:
    made = TaskLosses(WEIGHTS, "click", uncertainty=uncertainty)
    if made.log_variances is not None:
        with torch.no_grad():
            made.log_variances.copy_(torch.tensor([0.3, -0.2, 1.0]))
    return made


def by_hand(logits: torch.Tensor, labels: torch.Tensor, spreads: list[float]) -> float:
    """The slow twin: example by example, task by task."""
    total = 0.0
    for row, wanted in zip(logits.tolist(), labels.tolist(), strict=True):
        for logit, label, weight, spread in zip(row, wanted, WEIGHTS.values(), spreads, strict=True):
            if not math.isnan(label):
                loss = math.log1p(math.exp(-logit)) if label else math.log1p(math.exp(logit))
                total += weight * (math.exp(-spread) * loss + spread / 2)
    return total


@given(LABELS, st.booleans())
def test_the_loss_is_the_weighted_sum_over_known_labels_and_adds_up_over_parts(
    rows: list[tuple[float, ...]], uncertainty: bool
) -> None:
    labels = torch.tensor(rows)
    logits = torch.randn(labels.shape, generator=torch.Generator().manual_seed(len(rows)), requires_grad=True)
    own, spreads = tasks(uncertainty=uncertainty), [0.3, -0.2, 1.0] if uncertainty else [0.0] * 3
    whole = summed_loss(own, logits, labels)
    assert whole.item() == pytest.approx(by_hand(logits, labels, spreads), rel=1e-5, abs=1e-5)
    assert mean_loss(own, logits, labels).item() == pytest.approx(whole.item() / len(rows), rel=1e-5, abs=1e-6)
    cut = len(rows) // 2
    parts = summed_loss(own, logits[:cut], labels[:cut]) + summed_loss(own, logits[cut:], labels[cut:])
    assert parts.item() == pytest.approx(whole.item(), rel=1e-5, abs=1e-5)
    shares = torch.arange(len(rows), dtype=torch.float32)
    weighed = sum(summed_loss(own, logits[n : n + 1], labels[n : n + 1]).item() * n for n in range(len(rows)))
    assert summed_loss(own, logits, labels, shares).item() == pytest.approx(weighed, rel=1e-4, abs=1e-4)
    whole.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad == 0, torch.isnan(labels))


@given(LABELS)
def test_epochs_are_compared_by_the_declared_weights(rows: list[tuple[float, ...]]) -> None:
    labels = np.array(rows, dtype=np.float32)
    logits = torch.randn(labels.shape, generator=torch.Generator().manual_seed(3))
    found = summed_log_loss(tasks(uncertainty=True), torch.sigmoid(logits).numpy(), labels)
    assert found == pytest.approx(by_hand(logits, torch.from_numpy(labels), [0.0] * 3), rel=1e-5, abs=1e-6)


def test_one_label_has_the_bits_of_the_plain_log_loss() -> None:
    made = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, generator=made), (torch.rand(50, generator=made) < 0.3).float()
    plain = torch.nn.functional.binary_cross_entropy_with_logits
    assert torch.equal(mean_loss(None, logits, labels), plain(logits, labels))
    assert torch.equal(summed_loss(None, logits, labels), plain(logits, labels, reduction="sum"))


@given(LABELS)
def test_bytes_on_a_device_keep_labels_and_unknown_ones(rows: list[tuple[float, ...]]) -> None:
    labels = np.array(rows, dtype=np.float32)
    for own in (labels, labels[:, 0]):
        np.testing.assert_array_equal(unpacked_labels(torch.from_numpy(packed_labels(own))).numpy(), own)


def test_quality_leaves_unknown_labels_out() -> None:
    labels = np.array([0, 1, math.nan, 1, 0, math.nan, 1], dtype=np.float32)
    predicted = np.array([0.1, 0.6, 0.9, 0.4, 0.5, 0.0, 0.8])
    known = ~np.isnan(labels)
    assert quality(labels, predicted) == quality(labels[known], predicted[known])
    assert quality(labels[2:3], predicted[2:3]).rows == 0


def test_the_judged_column_is_that_of_its_name() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert tasks().judged(values).tolist() == [1, 4]
