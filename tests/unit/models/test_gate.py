"""The gates refuse what is worse beyond a threshold, and nothing else."""

from dataclasses import replace

import numpy as np
import pytest

from models.ranker.evaluate import Quality, quality
from models.registry.gate import LEAST_ROWS, BundleQuality, Gates, Verdict, judge
from models.registry.paired_test import Drop, Drops, auc_drop, drops

GOOD = Quality(5_000, 0.3, 0.75, 0.5, 0.02, 0.85)
BASE = BundleQuality("old", {"all": GOOD, "new items": replace(GOOD, rows=300, auc=0.65)}, 4.0, 1_000_000)
# Errors so small that the bounds are the differences.
SHARP = 1e-6


def drops_of(new: BundleQuality, error: float = SHARP, base: BundleQuality = BASE) -> dict[str, Drops | None]:
    found: dict[str, Drops | None] = {}
    for part, old in base.quality.items():
        now = new.quality[part]
        worse = (
            (old.auc or 0) - (now.auc or 0),
            (now.normalized_entropy or 0) - (old.normalized_entropy or 0),
            (now.calibration_error or 0) - (old.calibration_error or 0),
        )
        found[part] = Drops(*(Drop(one, error) for one in worse))
    return found


def failed(challenger: BundleQuality, gates: Gates = Gates(), error: float = SHARP) -> list[str]:  # noqa: B008 - frozen
    checks = judge(BASE, challenger, gates, drops_of(challenger, error))
    return [check.name for check in checks if not check.passed]


def changed(part: str, **fields: float) -> BundleQuality:
    return replace(BASE, quality=BASE.quality | {part: replace(BASE.quality[part], **fields)})


def test_an_equal_bundle_passes_every_gate() -> None:
    assert failed(replace(BASE, bundle="new")) == []


@pytest.mark.parametrize(
    ("challenger", "name"),
    [
        (changed("all", auc=0.747), "all: AUC"),
        (changed("all", normalized_entropy=0.86), "all: NE"),
        (changed("all", calibration_error=0.04), "all: calibration error"),
        (changed("new items", auc=0.62), "new items: AUC"),
        (replace(BASE, latency_ms=6.1), "latency ms, 500 candidates"),
        (replace(BASE, bytes=2_100_000), "bytes"),
    ],
)
def test_each_gate_refuses_what_is_beyond_it_alone(challenger: BundleQuality, name: str) -> None:
    assert failed(challenger) == [name]


@pytest.mark.parametrize(
    "challenger",
    [
        changed("all", auc=0.7485),
        changed("all", auc=0.9, normalized_entropy=0.5, calibration_error=0.0),
        changed("new items", normalized_entropy=0.9),
        replace(BASE, latency_ms=1.0, bytes=1),
    ],
)
def test_what_is_better_or_within_the_thresholds_passes(challenger: BundleQuality) -> None:
    assert failed(challenger) == []


def test_a_small_slice_is_shown_and_decides_nothing() -> None:
    few = replace(GOOD, rows=LEAST_ROWS - 1)
    old = replace(BASE, quality={"all": GOOD, "new users": few})
    new = replace(old, quality={"all": GOOD, "new users": replace(few, auc=0.1)})
    checks = {check.name: check for check in judge(old, new, Gates(), drops_of(new, base=old))}
    assert checks["new users: AUC"].passed
    assert checks["new users: AUC"].limit is None
    assert checks["new users: AUC"].challenger == 0.1
    assert checks["new users: AUC"].rows == LEAST_ROWS - 1


def test_what_is_within_the_noise_is_neither_refused_nor_passed() -> None:
    worse = changed("all", auc=0.74)
    answers = {
        error: Verdict("old", "new", judge(BASE, worse, Gates(), drops_of(worse, error))).answer
        for error in (1e-4, 0.002, 0.01)
    }
    assert answers == {1e-4: "worse", 0.002: "worse", 0.01: "cannot tell"}
    same = replace(BASE, bundle="new")
    assert Verdict("old", "new", judge(BASE, same, Gates(), drops_of(same, 0.005))).answer == "passed"
    assert Verdict("old", "new", judge(BASE, same, Gates(), drops_of(same, 0.05))).answer == "cannot tell"
    assert Verdict("old", "new", judge(BASE, same, Gates(sure=0.2), drops_of(same, 0.05))).answer == "passed"
    # Too few rows that neither was trained on.
    few = replace(BASE, quality={"all": replace(GOOD, rows=LEAST_ROWS - 1)})
    found = Verdict("old", "new", judge(few, few, Gates(), drops_of(few, base=few)))
    assert (found.answer, found.passed, found.to_json()["answer"]) == ("cannot tell", False, "cannot tell")


def rankers(seed: int, rows: int, *, worse: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Labels, two rankers' probabilities and users; the second ranker has so much more noise."""
    rng = np.random.default_rng(seed)
    users = rng.integers(0, rows // 4, rows)
    taste = rng.standard_normal(rows // 4)[users]
    labels = (rng.random(rows) < 0.55).astype(np.float64)
    base = rng.standard_normal(rows) + 1.45 * labels + 0.3 * taste
    scores = [base + (0.35 + more) * rng.standard_normal(rows) for more in (0.0, worse)]
    one, two = (1 / (1 + np.exp(-(1.2 * score - 0.7))) for score in scores)
    return labels, one, two, users


def test_the_variance_of_a_drop_is_delongs_to_the_last_digits() -> None:
    labels, one, two, _ = rankers(0, 300)
    two = np.round(two, 1)
    found = auc_drop(labels, one, two, np.arange(300))
    positive, negative = labels > 0, labels == 0
    m, n = positive.sum(), negative.sum()
    # DeLong's equations, with all pairs written out.
    kernel = [
        (score[positive][:, None] > score[negative]) + 0.5 * (score[positive][:, None] == score[negative])
        for score in (one, two)
    ]
    aucs = [pairs.mean() for pairs in kernel]
    v10, v01 = np.array([pairs.mean(axis=1) for pairs in kernel]), np.array([pairs.mean(axis=0) for pairs in kernel])
    s = np.cov(v10, ddof=0) / m + np.cov(v01, ddof=0) / n
    assert found.worse == pytest.approx(aucs[0] - aucs[1], rel=1e-12)
    assert found.error**2 == pytest.approx((s[0, 0] + s[1, 1] - 2 * s[0, 1]) * 300 / 299, rel=1e-12)


def test_the_errors_of_drops_are_those_of_drawing_users_again() -> None:
    labels, one, two, users = rankers(1, 2_000, worse=0.4)
    found = drops(labels, one, two, users)
    assert found is not None
    rng, rows_of = np.random.default_rng(0), [np.flatnonzero(users == user) for user in range(500)]
    drawn = []
    for _ in range(200):
        rows = np.concatenate([rows_of[user] for user in rng.integers(0, 500, 500)])
        auc = auc_drop(labels[rows], one[rows], two[rows], users[rows]).worse
        entropy = [quality(labels[rows], score[rows]).normalized_entropy or 0.0 for score in (one, two)]
        drawn.append((auc, entropy[1] - entropy[0]))
    assert found.auc.error == pytest.approx(np.std([auc for auc, _ in drawn]), rel=0.2)
    assert found.entropy.error == pytest.approx(np.std([entropy for _, entropy in drawn]), rel=0.2)
    assert found.auc.worse > 0
    assert drops(np.ones(10), np.ones(10), np.ones(10), np.arange(10)) is None


def test_a_handful_of_rows_is_compared_too() -> None:
    # Draws of few users may be empty.
    found = drops(np.array([0.0, 1.0]), np.array([0.2, 0.6]), np.array([0.3, 0.5]), np.array([0, 1]))
    assert found is not None
    assert np.isfinite([found.auc.error, found.entropy.error, found.calibration.error]).all()


@pytest.mark.parametrize("rows", [200, 2_000])
def test_equal_rankers_are_refused_no_more_often_than_alpha_and_worse_ones_are(rows: int) -> None:
    def answer(seed: int, worse: float) -> str:
        labels, one, two, users = rankers(seed, rows, worse=worse)
        measured = [
            BundleQuality(name, {"all": quality(labels, found)}, 1.0, 1) for name, found in (("a", one), ("b", two))
        ]
        checks = judge(*measured, Gates(sure=0.05), {"all": drops(labels, one, two, users)})
        return Verdict("a", "b", checks).answer

    equal = [answer(seed, 0.0) for seed in range(30)]
    assert equal.count("worse") / 30 <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 30)
    if rows == 2_000:
        assert equal.count("passed") >= 27
        assert [answer(seed, 1.0) for seed in range(5)] == ["worse"] * 5


def test_a_wider_threshold_lets_a_drop_pass() -> None:
    assert failed(changed("all", auc=0.5), Gates(auc=0.3)) == []
