"""`labels`: the tasks that a rule becomes, the frame of a task alone, and what is judged."""

import polars as pl
import pytest

from features.dataset.label import TASK
from features.errors import DatasetError
from tessera.bench.rankers.labels import alone, claims, with_tasks_of_rule
from tests.build import coloured_dataset, coloured_frame


def test_a_rule_over_numbers_becomes_three_tasks() -> None:
    dataset = coloured_dataset()
    rated = dataset.events.label.model_copy(update={"column": "stars", "positive": ">= 4"})
    several = with_tasks_of_rule(
        dataset.model_copy(update={"events": dataset.events.model_copy(update={"label": rated})})
    )
    assert {name: task.positive for name, task in several.events.labels.items()} == {
        "at_least_3": ">= 3",
        "at_least_4": ">= 4",
        "at_least_5": ">= 5",
    }
    assert several.events.judge == "at_least_4"
    assert with_tasks_of_rule(several) is several
    with pytest.raises(DatasetError, match=r"labels needs \[events.labels\]"):
        with_tasks_of_rule(dataset)


def test_a_task_alone_has_the_rows_that_know_its_label() -> None:
    frame = coloured_frame()
    known = pl.Series(
        [None if number % 3 == 0 else number % 2 for number in range(frame.examples.height)], dtype=pl.Int8
    )
    several = frame.replace(examples=frame.examples.with_columns(known.alias(f"{TASK}buy")))
    found = alone(several, "buy").examples
    assert found["label"].to_list() == known.drop_nulls().to_list()
    assert not [name for name in found.columns if name.startswith(TASK)]


def test_the_mean_over_seeds_is_judged_for_each_task_and_kind() -> None:
    rows = [
        {"model": model, "task": task, "seed": seed, "test_auc": auc + seed / 100}
        for seed in (0, 1)
        for model, task, auc in (
            ("alone", "a", 0.7), ("alone", "b", 0.8),
            ("dcn-v2", "a", 0.699), ("dcn-v2", "b", 0.81),
            ("mmoe", "a", 0.697), ("mmoe", "b", 0.8),
        )
    ]  # fmt: skip
    assert [claim.holds for claim in claims(rows)] == [True, False, True, True]
