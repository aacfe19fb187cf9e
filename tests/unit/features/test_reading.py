"""Options of a transformer: each does what its name says, is a part of the id, and treats each text by itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from features.content import sentence
from features.content.encoder import unit
from features.content.kinds import load_encoder
from features.content.passages import passages
from features.content.sentence import SentenceEncoder
from features.errors import DatasetError
from tests.small_bert import small_bert

TEXTS = ["a robot on the ocean", "love", "murder in the kitchen of the king. the horse saw it and ran. war began then."]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a transformer of three small layers with random weights, behind the tokenizer of MiniLM."""
    opened = small_bert(3)
    made = tmp_path_factory.mktemp("small") / "model"
    opened.save(str(made), create_model_card=False)
    return made


def states(directory: Path, layer: int) -> list[np.ndarray[Any, Any]]:
    """States (L, D) of each text's tokens at a layer, text by text."""
    import torch

    model = sentence.open_model(str(directory))
    found = []
    for text in TEXTS:
        read = model.tokenizer([text], return_tensors="pt")
        with torch.inference_mode():
            found.append(model[0].auto_model(**read, output_hidden_states=True).hidden_states[layer][0].numpy())
    return found


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("pool", ["mean", "cls", "last", "max"])
def test_a_pool_at_an_exit_layer_is_that_function_of_the_layers_states(directory: Path, pool: Any, layer: int) -> None:
    functions = {"mean": lambda x: x.mean(0), "cls": lambda x: x[0], "last": lambda x: x[-1], "max": lambda x: x.max(0)}
    expected = unit(np.stack([functions[pool](own) for own in states(directory, layer)]))
    encoder = SentenceEncoder(str(directory), pool=pool, layer=layer)
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-5)
    assert encoder.id.startswith(f"st-{pool}-layer{layer}-")


def test_a_long_text_is_the_mean_of_its_chunks(directory: Path, tmp_path: Path) -> None:
    plain, encoder = SentenceEncoder(str(directory)), SentenceEncoder(str(directory), chunks=7)
    parts = passages(TEXTS[2], 7)
    assert len(parts) == 3
    expected = unit(plain.encode(parts).sum(axis=0, keepdims=True, dtype=np.float64))
    np.testing.assert_allclose(encoder.encode(TEXTS)[2:], expected, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(TEXTS)[:2], plain.encode(TEXTS)[:2], atol=1e-5)
    assert encoder.id.replace("-chunks7", "") == plain.id


@pytest.mark.parametrize("chosen", [{"pool": "max", "layer": 1}, {"chunks": 3, "tokens": 8}, {"pool": "latent"}])
def test_each_text_is_read_by_itself_and_a_saved_encoder_is_the_same(
    directory: Path, tmp_path: Path, chosen: dict[str, Any]
) -> None:
    from features.content.transformer.latent import LatentPooling, save_latent

    save_latent(LatentPooling(16, latents=4, seed=1), directory)
    encoder = SentenceEncoder(str(directory), **chosen)
    batch = encoder.encode([*TEXTS, ""])
    alone = np.concatenate([encoder.encode([text]) for text in [*TEXTS, ""]])
    np.testing.assert_allclose(batch, alone, atol=1e-5)
    assert not batch[-1].any()
    encoder.save(tmp_path)
    loaded = load_encoder(tmp_path)
    assert loaded.id == encoder.id
    assert loaded.encode(TEXTS).tobytes() == encoder.encode(TEXTS).tobytes()


def test_untrained_latent_attention_is_the_mean_and_trained_weights_are_a_part_of_the_id(directory: Path) -> None:
    import torch

    from features.content.transformer.latent import LatentPooling, save_latent

    pooling = LatentPooling(16, latents=4)
    save_latent(pooling, directory)
    first = SentenceEncoder(str(directory), pool="latent")
    np.testing.assert_allclose(first.encode(TEXTS), SentenceEncoder(str(directory)).encode(TEXTS), atol=1e-5)
    with torch.no_grad():
        pooling.second.add_(0.1)
    save_latent(pooling, directory)
    other = SentenceEncoder(str(directory), pool="latent")
    assert other.id != first.id
    assert np.abs(other.encode(TEXTS) - first.encode(TEXTS)).max() > 1e-3


def test_choices_that_the_model_does_not_have_are_refused_by_name(directory: Path) -> None:
    with pytest.raises(DatasetError, match="layer: expected 0 to 3, the layers of the model, got 4"):
        SentenceEncoder(str(directory), layer=4)
    (directory / "latent.safetensors").unlink(missing_ok=True)
    with pytest.raises(DatasetError, match=r"pool latent: .* carries no latent attention of width 16"):
        SentenceEncoder(str(directory), pool="latent")
    from features.content.transformer.latent import LatentPooling, save_latent

    save_latent(LatentPooling(8), directory)
    with pytest.raises(DatasetError, match="pool latent"):
        SentenceEncoder(str(directory), pool="latent")
