"""The contrastive loss against a slow twin, and each option against the plain loss."""

import numpy as np
import pytest
import torch

from features.errors import TesseraError
from models.encoder.losses import LossOptions, PairBatch, contrastive


@pytest.fixture
def batch() -> PairBatch:
    rng = np.random.default_rng(0)
    vectors = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(2, 6, 4)).astype(np.float32)), dim=2)
    alike = torch.eye(6) * 0.5
    alike[0, 1], alike[3, 2] = 0.4, 0.1
    same = torch.zeros(6, 6, dtype=torch.bool)
    same[4, 5] = True
    return PairBatch(vectors[0], vectors[1], alike, same)


def slow(batch: PairBatch, options: LossOptions) -> float:
    """The definition, one pair after the other."""
    total = 0.0
    for first, second, alike, same in (
        (batch.first, batch.second, batch.alike, batch.same),
        (batch.second, batch.first, batch.alike.T, batch.same.T),
    ):
        for i in range(len(first)):
            targets, exponents = {}, {}
            for j in range(len(first)):
                if i != j and (same[i, j] or (options.labels == "hard" and alike[i, j] > 0)):
                    continue
                exponents[j] = float(first[i] @ second[j]) / options.temperature
                soft = float(alike[i, j]) ** options.sharpness
                targets[j] = soft if options.labels == "soft" else float(i == j)
            whole = np.log(np.sum(np.exp(list(exponents.values()))))
            norm = sum(targets.values())
            total -= sum(targets[j] / norm * (exponents[j] - whole) for j in targets)
    return total / (2 * len(batch.first))


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_the_loss_is_that_of_the_definition(batch: PairBatch, labels: str) -> None:
    options = LossOptions(labels=labels)  # type: ignore[arg-type]
    assert float(contrastive(batch, options)) == pytest.approx(slow(batch, options), rel=1e-5)


def test_hard_labels_push_no_alike_pair_apart(batch: PairBatch) -> None:
    losses = []
    for alike in (batch.alike, torch.eye(6)):
        first = batch.first.clone().requires_grad_()
        contrastive(
            PairBatch(first, batch.second, alike, batch.same), LossOptions(labels="hard", temperature=0.5)
        ).backward()
        assert first.grad is not None
        losses.append(first.grad)
    masked, unmasked = losses
    # Without the mask, first 0 is pushed away from second 1.
    pushed = (unmasked[0] - masked[0]) @ batch.second[1]
    assert float(pushed) > 1e-3


def test_focal_weights_lower_the_loss_and_harder_negatives_raise_it(batch: PairBatch) -> None:
    plain = float(contrastive(batch, LossOptions(temperature=0.2)))
    assert float(contrastive(batch, LossOptions(temperature=0.2, focal=1.0))) < plain
    assert float(contrastive(batch, LossOptions(temperature=0.2, mixed=3))) > plain
    assert float(contrastive(batch, LossOptions(temperature=0.2, progressive=1.0), 0.0)) == pytest.approx(plain)
    assert float(contrastive(batch, LossOptions(temperature=0.2, progressive=1.0), 1.0)) > plain


@pytest.mark.parametrize(
    ("name", "value"), [("labels", "firm"), ("temperature", 0), ("sharpness", -1), ("focal", -1), ("mixed", -2)]
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(TesseraError, match=name):
        LossOptions(**{name: value})  # type: ignore[arg-type]
