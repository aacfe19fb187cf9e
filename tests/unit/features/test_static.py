"""Static encoder: its table comes from a transformer, and its weights from the catalogue."""

from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers

from features.content import static
from features.errors import DatasetError

WORDS = ["?", "the", "robot", "ocean", "##s", "love"]
VECTORS = np.random.default_rng(0).normal(size=(len(WORDS), 5))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformer that has one vector for each word."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()

    def encode(words: list[str], **_: object) -> NDArray[np.float64]:
        return VECTORS[[WORDS.index(word) if word in WORDS else WORDS.index(f"##{word}") for word in words]]

    model = SimpleNamespace(tokenizer=SimpleNamespace(backend_tokenizer=tokenizer), encode=encode)
    monkeypatch.setattr(static, "open_model", lambda name: model)


@pytest.mark.usefixtures("opened")
def test_a_text_is_the_mean_of_its_tokens_and_a_frequent_token_weighs_little() -> None:
    texts = ["the the the the robot", "the the the ocean"]
    encoder = static.fit(texts, dim=5, seed=0, model="any")
    assert encoder.dim == 5
    shares = np.array([0, 7, 1, 1, 0, 0]) / 9
    weights = 1e-3 / (1e-3 + shares)
    centred = VECTORS - VECTORS.mean(axis=0)
    wanted = weights[1] * centred[1] + weights[2] * centred[2]
    other = weights[3] * centred[3]
    found = encoder.encode(["the robot", "ocean"])
    # Principal axes turn the space and keep every cosine.
    cosine = wanted @ other / np.linalg.norm(wanted) / np.linalg.norm(other)
    assert float(found[0] @ found[1]) == pytest.approx(cosine, abs=1e-5)
    assert float(encoder.encode(["robot"])[0] @ found[0]) > 0.99


@pytest.mark.usefixtures("opened")
def test_the_table_keeps_the_asked_width() -> None:
    assert static.fit(["robot"], dim=2, seed=0, model="any").dim == 2
    assert static.fit(["robot"], dim=50, seed=0, model="any").dim == 5


def test_a_fit_without_a_model_is_refused() -> None:
    with pytest.raises(DatasetError, match="encoder_model"):
        static.fit(["robot"], dim=2, seed=0)
