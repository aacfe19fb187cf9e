"""Tuned heads on data whose right answer is planted: what items are alike is written into a few of the dimensions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from features.content.chain import apply_steps
from features.content.encoder import unit
from features.errors import TesseraError
from models.encoder.measure import recall
from models.encoder.pairs import Task, item_task
from models.encoder.tune import Tuned, tune
from models.encoder.tuning.layers import LayerOptions
from models.encoder.tuning.options import TuneOptions, chosen
from models.encoder.tuning.rows import most_alike

ITEMS, DIM, GROUPS = 400, 12, 40
OPTIONS = TuneOptions(batch=64, rounds=6, patience=3, rank=6, temperatures=(0.07,))


@pytest.fixture(scope="module")
def task() -> Task:
    """Items of a group are alike. The first four dimensions tell the groups, the other eight are noise as loud."""
    rng = np.random.default_rng(0)
    group = rng.integers(0, GROUPS, ITEMS)
    signal = rng.normal(size=(GROUPS, 4))[group] + 0.1 * rng.normal(size=(ITEMS, 4))
    vectors = unit(np.concatenate([signal, rng.normal(size=(ITEMS, DIM - 4))], axis=1))
    first, second = np.triu_indices(ITEMS, 1)
    alike = group[first] == group[second]
    weights = np.full(int(alike.sum()), 0.5, dtype=np.float32)
    return item_task("groups", vectors, first[alike], second[alike], weights)


def found(tuned: Tuned, task: Task) -> float:
    wanted = most_alike(task.alike, 20)
    return recall(apply_steps(tuned.steps, task.vectors), wanted, np.ones(ITEMS, dtype=bool), count=20)


@pytest.mark.parametrize("head", ["linear", "low-rank"])
@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_a_head_finds_what_the_noise_hides(task: Task, head: str, labels: str) -> None:
    options = replace(OPTIONS, head=head, loss=replace(OPTIONS.loss, labels=labels))  # type: ignore[arg-type]
    tuned = tune([task], options)
    assert max(tuned.recalls) > 1.2 * tuned.recalls[0]
    assert found(tuned, task) > 1.3 * found(Tuned((), (), 0, 0.07), task)


def test_trained_prefixes_put_the_groups_first(task: Task) -> None:
    turned = replace(task, vectors=np.ascontiguousarray(task.vectors[:, ::-1]))
    options = replace(OPTIONS, rounds=12, patience=12)
    wanted, every = most_alike(task.alike, 20), np.ones(ITEMS, dtype=bool)
    plain, trained = (
        recall(unit(apply_steps(tune([turned], one).steps, turned.vectors)[:, :4]), wanted, every, count=20)
        for one in (options, replace(options, prefixes=(4,)))
    )
    assert trained > plain + 0.05
    with pytest.raises(TesseraError, match="prefixes: expected widths of 1 or more, got 4, 0"):
        replace(OPTIONS, prefixes=(4, 0))


def test_permuted_pairs_give_no_gain(task: Task) -> None:
    tuned = tune([task.permuted(0)], OPTIONS)
    assert found(tuned, task) < 1.1 * found(Tuned((), (), 0, 0.07), task)


def test_a_strong_pull_gives_the_identity(task: Task) -> None:
    tuned = tune([task], replace(OPTIONS, pull=1e4, rounds=2))
    for step in tuned.steps:
        np.testing.assert_allclose(step.tensors["matrix"], np.eye(DIM), atol=0.05)


def test_a_fit_that_is_stopped_after_any_round_goes_on_to_the_same_bits(task: Task, tmp_path: Path) -> None:
    options = replace(OPTIONS, rounds=3, temperatures=(2.0, 0.07))
    whole = tune([task], options)
    assert whole.temperature == 2.0

    class Stopped(Exception):
        pass

    rounds = 6 + whole.rounds
    for stop in range(1, rounds):
        state = tmp_path / f"{stop}.state"

        def stopped(done: int, total: int, stop: int = stop) -> None:
            if done == stop:
                raise Stopped

        with pytest.raises(Stopped):
            tune([task], options, checkpoint=state, progress=stopped)
        again = tune([task], options, checkpoint=state)
        assert [step.id for step in again.steps] == [step.id for step in whole.steps]
        assert again.recalls == whole.recalls


def test_the_state_of_another_fit_and_a_damaged_state_are_not_used(task: Task, tmp_path: Path) -> None:
    state = tmp_path / "state"
    options = replace(OPTIONS, rounds=1)
    tune([task], replace(options, seed=1), checkpoint=state)
    wanted = tune([task], options)
    assert tune([task], options, checkpoint=state).recalls == wanted.recalls
    state.write_bytes(state.read_bytes()[:100])
    assert tune([task], options, checkpoint=state).recalls == wanted.recalls


def test_the_temperature_that_finds_most_held_out_items_is_the_only_one_of_the_second_phase(task: Task) -> None:
    options = replace(OPTIONS, rounds=2, temperatures=(5.0, 0.07))
    found = tune([task], options)
    alone = tune([task], replace(options, temperatures=(0.07,)))
    assert (found.temperature, found.recalls) == (0.07, alone.recalls)
    assert [step.id for step in found.steps] == [step.id for step in alone.steps]


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (["rounds"], "--set rounds: expected NAME=VALUE"),
        (["ronds=3"], "unknown name; the nearest is 'rounds'"),
        (["seed=3"], "unknown name"),
        (["loss=3"], "unknown name"),
        (["temperature=3"], "unknown name; the nearest is 'temperatures'"),
        (["rounds=three"], "--set rounds=three: Expected `int`"),
        (["labels=firm"], "--set labels=firm: Invalid enum value"),
        (["focal=-1"], "focal: expected 0 or more"),
    ],
)
def test_a_value_that_cannot_be_set_is_refused_by_name(given: list[str], fault: str) -> None:
    with pytest.raises(TesseraError, match=fault):
        chosen(TuneOptions, given, seed=0)


def test_values_are_set_by_name_in_the_fit_and_in_its_loss() -> None:
    found = chosen(TuneOptions, ["rounds=3", "focal=0.5", "temperatures=0.1, 0.2", "prefixes=16", "rounds=4"], seed=2)
    expected = TuneOptions(rounds=4, temperatures=(0.1, 0.2), prefixes=(16,), seed=2)
    assert found == replace(expected, loss=replace(expected.loss, focal=0.5))
    layers = chosen(LayerOptions, ["exits=5,6", "pool=latent", "temperature=0.1"], layers=1, seed=0)
    assert (layers.exits, layers.pool, layers.layers, layers.loss.temperature) == ((5, 6), "latent", 1, 0.1)


def test_tasks_of_two_widths_and_tasks_without_a_pair_are_refused(task: Task) -> None:
    narrow = replace(task, vectors=np.ascontiguousarray(task.vectors[:, :5]))
    with pytest.raises(TesseraError, match="widths 5, 12"):
        tune([task, narrow], OPTIONS)
    empty = replace(task, name="nothing", alike=task.alike * 0)
    empty.alike.eliminate_zeros()
    with pytest.raises(TesseraError, match="nothing"):
        tune([empty], OPTIONS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("head", "deep"),
        ("rank", 0),
        ("rounds", 0),
        ("pull", -1),
        ("batch", 1),
        ("temperatures", ()),
        ("temperatures", (0.1, 0.0)),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(TesseraError, match=name):
        TuneOptions(**{name: value})  # type: ignore[arg-type]
