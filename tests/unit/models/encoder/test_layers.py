"""Top layers on cached states compute what the whole model computes, and learn pairs that the frozen model misses."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from features.content.encoder import unit
from features.content.sentence import SentenceEncoder
from features.content.transformer.reading import TransformerOptions, apply_reading
from features.errors import DatasetError, TesseraError
from models.encoder.measure import recall
from models.encoder.pairs import Task, item_task
from models.encoder.tuning.layer_fit import tune_layers
from models.encoder.tuning.layers import LayerOptions, TokenStates, TopLayers, save_tuned, token_states, top_layers
from models.encoder.tuning.rows import most_alike
from tests.small_bert import small_bert

SIGNS = ("robot", "ocean", "love", "murder", "kitchen", "war", "music", "garden", "horse", "space", "king", "train")
NOISE = ("red", "old", "new", "big", "cold", "long", "small", "dark", "high", "late")
RNG = np.random.default_rng(0)
GROUP = RNG.integers(0, 6, 120)
# Two words tell each group; the others are noise.
TEXTS = [
    " ".join([SIGNS[2 * group + RNG.integers(2)], *(NOISE[place] for place in RNG.integers(0, 10, 1 + row % 4))])
    for row, group in enumerate(GROUP)
]
OPTIONS = LayerOptions(layers=2, tokens=8, rounds=6, patience=6, batch=32, rate=3e-3)


@pytest.fixture(scope="module")
def model() -> Any:
    """A transformer of three small layers with random weights, behind the tokenizer of MiniLM."""
    return small_bert(3)


@pytest.fixture(scope="module")
def task(model: Any) -> Task:
    first, second = np.triu_indices(len(TEXTS), 1)
    alike = GROUP[first] == GROUP[second]
    weights = np.full(int(alike.sum()), 0.5, dtype=np.float32)
    return item_task("groups", model.encode(TEXTS), first[alike], second[alike], weights)


@pytest.fixture(scope="module")
def read(model: Any, tmp_path_factory: pytest.TempPathFactory) -> TokenStates:
    return token_states(model, TEXTS, tmp_path_factory.mktemp("states") / "states.npy", OPTIONS)


def test_top_layers_on_cached_states_give_the_models_own_vectors_at_each_exit(model: Any, read: TokenStates) -> None:
    assert read.states.dtype == np.float16
    found = TopLayers(model, replace(OPTIONS, exits=(3, 2))).encode(read)
    # The states are rounded to half precision.
    np.testing.assert_allclose(found[3], model.encode(TEXTS), atol=5e-3)
    cut = copy.deepcopy(model)
    apply_reading(cut, TransformerOptions(layer=2), "")
    np.testing.assert_allclose(found[2], cut.encode(TEXTS), atol=5e-3)


def test_tuned_layers_find_pairs_of_held_out_items_and_load_as_a_model(
    model: Any, read: TokenStates, task: Task, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    before = model.encode(TEXTS)
    tuned, recalls = tune_layers(model, read, [task], OPTIONS)
    assert max(recalls) > 1.05 * recalls[0]
    np.testing.assert_array_equal(model.encode(TEXTS), before)
    save_tuned(model, tuned, tmp_path / "tuned")
    loaded = SentenceTransformer(str(tmp_path / "tuned"), device="cpu")
    np.testing.assert_allclose(loaded.encode(TEXTS), tuned.encode(read)[3], atol=5e-3)
    assert (tmp_path / "tuned" / "model.safetensors").exists()


def test_latent_attention_alone_learns_and_is_read_back(model: Any, task: Task, tmp_path: Path) -> None:
    options = replace(OPTIONS, layers=0, pool="latent", rounds=3, rate=1e-2)
    states = token_states(model, TEXTS, tmp_path / "states.npy", options)
    tuned, recalls = tune_layers(model, states, [task], options)
    assert max(recalls) > 1.02 * recalls[0]
    save_tuned(model, tuned, tmp_path / "tuned")
    encoder = SentenceEncoder(str(tmp_path / "tuned"), pool="latent")
    np.testing.assert_allclose(encoder.encode(TEXTS), tuned.encode(states)[3], atol=5e-3)


def test_a_ladder_trains_each_exit_and_each_prefix(model: Any, read: TokenStates, task: Task) -> None:
    options = replace(OPTIONS, exits=(2, 3), prefixes=(4,), rounds=3)
    every, wanted = np.ones(len(TEXTS), dtype=bool), most_alike(task.alike, 20)

    def found(layers: TopLayers) -> list[float]:
        vectors = layers.encode(read).values()
        return [recall(unit(own[:, :width]), wanted, every, count=20) for own in vectors for width in (4, 16)]

    before, (tuned, _) = found(TopLayers(model, options)), tune_layers(model, read, [task], options)
    assert all(after > 1.05 * plain for after, plain in zip(found(tuned), before, strict=True))


@pytest.mark.parametrize("pool", ["mean", "latent"])
def test_a_fit_that_is_stopped_after_any_round_goes_on_to_the_same_bits(
    model: Any, read: TokenStates, task: Task, tmp_path: Path, pool: Any
) -> None:
    options = replace(OPTIONS, rounds=2, pool=pool, batch=64, exits=(2,))
    whole, recalls = tune_layers(model, read, [task], options)
    state = tmp_path / "state"

    def stopped(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            tune_layers(model, read, [task], options, checkpoint=state, progress=stopped)
    again, same = tune_layers(model, read, [task], options, checkpoint=state)
    assert same == recalls
    for name, tensor in whole.state_dict().items():
        assert tensor.numpy().tobytes() == again.state_dict()[name].numpy().tobytes()
    # The state of another fit is not used.
    _, others = tune_layers(model, read, [task], replace(options, seed=1, rounds=1), checkpoint=state)
    assert others[0] != recalls[0]


def test_a_model_of_another_kind_and_too_many_layers_are_refused(model: Any, read: TokenStates, task: Task) -> None:
    with pytest.raises(DatasetError, match="at most 3, got 4"):
        top_layers(model, 4)

    class Other:
        auto_model = object()

    with pytest.raises(DatasetError, match="object"):
        top_layers([Other()], 1)
    with pytest.raises(DatasetError, match="exits: expected 1 to 3, got 4"):
        TopLayers(model, replace(OPTIONS, exits=(4,)))
    with pytest.raises(DatasetError, match="exits: nothing is tuned up to layer 1"):
        TopLayers(model, replace(OPTIONS, exits=(1,)))
    with pytest.raises(TesseraError, match="layers: 0 with the pool mean tunes nothing"):
        replace(OPTIONS, layers=0)
    narrow = replace(task, name="pieces", item=task.item[:5])
    with pytest.raises(TesseraError, match=r"pairs pieces: .* expected pairs of the 120 items"):
        tune_layers(model, read, [narrow], OPTIONS)
