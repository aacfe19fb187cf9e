"""Quality of the ranker by what it reads: each kind of aggregate, ids, content, history; with trees as a control.

Every arm has all factors but those that its name leaves out. Encoder and codebook are fitted once for a seed.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from features.aggregate.plan import AggregatePlan
from features.aggregate_frame import aggregated_by
from features.dataset.descriptor import Dataset
from features.errors import DatasetError
from features.frame import Frame
from models.ranker.evaluate import by_novelty, novelty, rate_baselines
from models.ranker.loading import assembler, examples
from models.ranker.train import predict, train
from models.table.admission import Admission
from models.table.default_schema import default_schema
from models.table.schema import SEMANTIC_ID, Schema
from tessera.bench.harness.data import remembered
from tessera.bench.harness.result import Claim, at_least
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.made_of import key_of
from tessera.pipeline.options import RunOptions, load_options
from tessera.pipeline.run import run

Kinds = Literal["none", "rates", "crossed", "all"]
LINE, DEFAULT = "running user + item rate", "default (+ decayed rates)"
_GAIN = 0.01
_SHOWN = {"all": "auc", "known_users": "known_users_auc", "unseen_users": "unseen_users_auc"}
_TREES = {"max_iter": 200, "learning_rate": 0.08}


@dataclass(frozen=True)
class AblationArm:
    """Inputs of one arm of the ablation.

    Attributes:
        aggregates: `rates` are the aggregates of one entity without decay, `crossed` adds those of two, `all` the
            decayed ones.
        ids, content, history: True if the ranker reads the ids; the content vector and Semantic ID; the history.
        trees: True for gradient-boosted trees on the columns of the aggregates alone.
    """

    aggregates: Kinds
    ids: bool = True
    content: bool = True
    history: bool = True
    trees: bool = False


ARMS: dict[str, AblationArm] = {
    "no aggregates": AblationArm("none"),
    "user and item rates": AblationArm("rates"),
    "+ crossed rates": AblationArm("crossed"),
    DEFAULT: AblationArm("all"),
    "default without ids": AblationArm("all", ids=False),
    "default without content and Semantic ID": AblationArm("all", content=False),
    "default without history": AblationArm("all", history=False),
    "trees on user and item rates": AblationArm("rates", trees=True),
    "trees, + crossed rates": AblationArm("crossed", trees=True),
    "trees, + decayed rates": AblationArm("all", trees=True),
}


def quality_rows(
    dataset: Dataset, out: Path, *, seed: int, console: Console, overrides: tuple[str, ...] = ()
) -> Iterator[dict[str, Any]]:
    """Yields a row for the running rates and for each arm; finished arms are kept in `out`.

    Raises:
        DatasetError: The dataset has no default aggregates, or no label but positives.
    """
    if dataset.events.time is None or dataset.events.label.implicit:
        raise DatasetError(f"{dataset.source}: quality of aggregates needs a clock and explicit labels")
    options = load_options(dataset, [f"seed={seed}", *overrides])
    run(dataset, out / f"{dataset.split.by}-{seed}", options, console=console, registry=None, until="frame")
    frame = read_frame(out / f"{dataset.split.by}-{seed}" / "frame")
    decided_by = (dataset.model_dump(mode="json", exclude={"source"}), str(options.choices()), seed)
    works: dict[str, Callable[[], dict[str, Any]]] = {
        LINE: lambda: measured(frame, rate_baselines(frame)["user-item-running"])
    }
    for name, arm in ARMS.items():
        if arm.content or dataset.has_content:
            works[name] = partial(_trained, dataset, frame, options, arm)
    for name, work in works.items():
        arm_of = asdict(ARMS[name]) if name in ARMS else {}
        path = out / f"{key_of(name)[:8]}-{seed}.json"
        with console.status(f"seed {seed}: {name}"):
            found = remembered(path, __name__, (*decided_by, arm_of), work)
        yield {"part": "quality", "seed": seed, "model": name} | found


def quality_claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """Returns the claims that the default is above the running rates, in the seed that speaks most against it."""
    found = {(row["model"], row["seed"]): row for row in rows if row["part"] == "quality"}
    seeds = [seed for model, seed in found if model == DEFAULT]
    claims: list[Claim] = []
    for part, words in (("auc", "all test rows"), ("unseen_users_auc", "users unseen in training")):
        pairs = [(found[DEFAULT, seed][part], found[LINE, seed][part]) for seed in seeds]
        gains = [ours - line for ours, line in pairs if ours is not None and line is not None]
        if gains:
            claims.append(at_least(f"{words}: AUC of the default less that of the {LINE}", min(gains), _GAIN))
    return claims


def measured(frame: Frame, probabilities: NDArray[np.floating]) -> dict[str, Any]:
    """Returns the AUC of predictions of the test part: of all rows, of known and of unseen users."""
    labels = frame.part("test")["label"].to_numpy().astype(np.float32)
    parts = by_novelty(labels, probabilities, novelty(frame, "item"), novelty(frame, "user"))
    return {name: parts[part].auc for part, name in _SHOWN.items()} | {"unseen_users_rows": parts["unseen_users"].rows}


def of_kinds(plan: AggregatePlan, kinds: Kinds) -> AggregatePlan:
    """Returns the plan with the aggregates of some kinds."""
    kept = [
        one
        for one in plan.aggregations
        if kinds == "all" or (kinds != "none" and not one.half_lives and (kinds == "crossed" or len(one.by) == 1))
    ]
    return replace(plan, aggregations=tuple(kept))


def read_by(schema: Schema, arm: AblationArm) -> Schema:
    """Returns the schema with the features that an arm reads. Without ids, histories are read by the other columns."""
    features = [
        feature
        for feature in schema.features
        if (arm.ids or feature.column not in ("user_id", "item_id"))
        and (arm.content or feature.column != SEMANTIC_ID)
        and (arm.history or feature.of != "history")
    ]
    numeric = [one for one in schema.numeric if arm.history or one.of != "history"]
    return replace(
        schema, features=tuple(features), numeric=tuple(numeric), content=schema.content if arm.content else 0
    )


def _trained(dataset: Dataset, frame: Frame, options: RunOptions, arm: AblationArm) -> dict[str, Any]:
    own = aggregated_by(frame, of_kinds(frame.aggregates, arm.aggregates))
    if arm.trees:
        return measured(own, _of_trees(own, options.seed))
    schema = default_schema(dataset, own, options.shape, history_length=options.history_length)
    schema, test = read_by(schema, arm), own.part("test")
    model = train(schema, own, options.train_config())
    source = assembler(schema, own, test, Admission(model.sketch, schema.admission))
    return measured(own, predict(model.ranker, source, examples(test)))


def _of_trees(frame: Frame, seed: int) -> NDArray[np.float64]:
    """Returns probabilities of the test part by trees that read the columns of the aggregates."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    (known, labels), (asked, _) = (
        (part.select(frame.aggregates.columns).to_numpy(), part["label"].to_numpy())
        for part in (frame.part("train"), frame.part("test"))
    )
    model = HistGradientBoostingClassifier(**_TREES, random_state=seed).fit(known, labels)
    found: NDArray[np.float64] = model.predict_proba(asked)[:, 1]
    return found
