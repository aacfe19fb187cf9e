"""Item encoders: unit vectors that do not depend on the batch, kept under the id of what computes them."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.feature_extraction.text import TfidfVectorizer

from features.content import lsa
from features.content.encoder import Encoder, content_id, unit
from features.content.kinds import KINDS, kind, load_encoder
from features.errors import BundleError, DatasetError

WORDS = ("space", "ocean", "robot", "love", "murder", "kitchen", "war", "music", "garden", "horse")
TEXTS = [
    " ".join(WORDS[(number * step) % len(WORDS)] for step in range(1, 2 + number % 4)) + f" tale{number % 5}"
    for number in range(60)
]
ODD = ["", "   ", "the of and", "wholly unheard-of", "space", "SPACE Ocean", "war " * 500, "Жизнь", "\x00\n🎬"]


@pytest.fixture(scope="module")
def encoder() -> lsa.LsaEncoder:
    return lsa.fit(TEXTS, dim=8, seed=0)


def norms(encoder: Encoder, texts: list[str]) -> list[float]:
    return [float(norm) for norm in np.linalg.norm(encoder.encode(texts), axis=1)]


def test_a_text_has_the_same_bits_alone_and_in_any_batch(encoder: lsa.LsaEncoder) -> None:
    texts = [*TEXTS, *ODD]
    batch = encoder.encode(texts)
    assert batch.shape == (len(texts), encoder.dim)
    assert batch.dtype == np.float32
    for place, text in enumerate(texts):
        assert encoder.encode([text])[0].tobytes() == batch[place].tobytes()
    assert encoder.encode(texts[::-1])[::-1].tobytes() == batch.tobytes()


def test_vectors_are_of_unit_length_and_texts_without_a_known_word_are_zero(encoder: lsa.LsaEncoder) -> None:
    np.testing.assert_allclose(norms(encoder, TEXTS), 1, atol=1e-6)
    assert norms(encoder, ["", "   ", "the of and", "wholly unheard-of", "Жизнь"]) == [0] * 5
    assert encoder.encode([]).shape == (0, encoder.dim)


def test_texts_of_the_same_words_are_nearer_than_others(encoder: lsa.LsaEncoder) -> None:
    left, right, other = encoder.encode(["space robot", "robot in space", "love garden"])
    assert left @ right > 0.99
    assert left @ other < 0.9


def test_a_fit_is_decided_by_its_seed_and_its_texts(encoder: lsa.LsaEncoder) -> None:
    assert lsa.fit(TEXTS, dim=8, seed=0).id == encoder.id
    assert lsa.fit(TEXTS, dim=7, seed=0).id != encoder.id
    assert lsa.fit([*TEXTS, "horse"], dim=8, seed=0).id != encoder.id


def test_a_loaded_encoder_is_the_saved_one_bit_for_bit(encoder: lsa.LsaEncoder, tmp_path: Path) -> None:
    encoder.save(tmp_path)
    loaded = load_encoder(tmp_path)
    assert (loaded.id, loaded.dim) == (encoder.id, encoder.dim)
    assert loaded.encode([*TEXTS, *ODD]).tobytes() == encoder.encode([*TEXTS, *ODD]).tobytes()
    again = tmp_path / "again"
    again.mkdir()
    loaded.save(again)
    assert all((again / name.name).read_bytes() == name.read_bytes() for name in tmp_path.iterdir() if name.is_file())


def test_an_encoder_from_before_other_scripts_keeps_its_id_its_file_and_its_vectors(tmp_path: Path) -> None:
    terms, idf = ["space", "robot", "茶杯"], np.array([1.0, 2.0, 3.0])
    components = np.eye(3, dtype=np.float32)
    first = lsa.LsaEncoder(terms, idf, components, 1)
    first.save(tmp_path)
    assert first.id == content_id("lsa", "\n".join(terms).encode(), idf.tobytes(), components.tobytes())
    assert set(json.loads((tmp_path / "encoder.json").read_bytes())) == {"kind", "id", "terms"}
    loaded = load_encoder(tmp_path)
    assert loaded.id == first.id
    assert np.flatnonzero(loaded.encode(["茶杯"])[0]).tolist() == [2]
    assert not loaded.encode(["绿茶杯", "wifi茶杯"]).any()
    description = json.loads((tmp_path / "encoder.json").read_bytes()) | {"tokens": 3}
    (tmp_path / "encoder.json").write_text(json.dumps(description))
    with pytest.raises(BundleError, match="terms of version 3"):
        load_encoder(tmp_path)


def test_texts_of_spaced_words_have_the_terms_and_weights_that_they_had(encoder: lsa.LsaEncoder) -> None:
    old = TfidfVectorizer(sublinear_tf=True, stop_words="english")
    weights = old.fit_transform(TEXTS)
    new = lsa.fit(TEXTS, dim=64, seed=0)
    projected = unit(weights.toarray() @ new._components.T.astype(np.float64))
    assert list(old.get_feature_names_out()) == new._terms
    np.testing.assert_allclose(new.encode(TEXTS), projected, atol=1e-6)


def test_an_encoder_with_other_weights_than_its_id_says_is_refused(encoder: lsa.LsaEncoder, tmp_path: Path) -> None:
    encoder.save(tmp_path)
    data = bytearray((tmp_path / "lsa.safetensors").read_bytes())
    data[-3] ^= 1
    (tmp_path / "lsa.safetensors").write_bytes(data)
    with pytest.raises(BundleError, match=encoder.id):
        load_encoder(tmp_path)


@pytest.mark.parametrize("texts", [["space robot"], ["lonely"], ["twin twin", "twin"], ["space robot", "space robot"]])
def test_the_smallest_catalogues_are_encoded(texts: list[str]) -> None:
    assert norms(lsa.fit(texts, dim=64, seed=0), texts) == pytest.approx([1.0] * len(texts))


@pytest.mark.parametrize("texts", [["", " "], ["the", "of and"], []])
def test_a_catalogue_without_a_usable_word_is_refused(texts: list[str]) -> None:
    with pytest.raises(DatasetError, match=rf"the {len(texts)} texts hold no usable word"):
        lsa.fit(texts, dim=4, seed=0)


def test_an_unknown_encoder_is_refused_by_name() -> None:
    with pytest.raises(DatasetError, match="'word2vec' is unknown; choose one of: lsa, sentence-transformers"):
        kind("word2vec")


def test_a_directory_without_an_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"encoder\.json is missing"):
        load_encoder(tmp_path)


def test_lsa_takes_no_model_and_sentence_transformers_need_one() -> None:
    with pytest.raises(DatasetError, match=r"'x\.bin'.*takes no model"):
        kind("lsa").fit(TEXTS, dim=4, seed=0, model="x.bin")
    with pytest.raises(DatasetError, match="no model given"):
        kind("sentence-transformers").fit(TEXTS, dim=4, seed=0, model=None)


@pytest.mark.parametrize("name", KINDS)
def test_every_registered_kind_can_be_fitted_and_loaded(name: str) -> None:
    assert callable(kind(name).fit)
    assert callable(kind(name).load)


@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(-(2.0**60), 2.0**60, width=32)))
def test_scaling_to_unit_length_knows_no_batch(vectors: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> None:
    scaled = unit(vectors)
    assert scaled.tobytes() == b"".join(unit(vector[None]).tobytes() for vector in vectors)
    zero = (vectors == 0).all(axis=1)
    np.testing.assert_allclose(np.linalg.norm(scaled.astype(np.float64), axis=1), np.where(zero, 0, 1), atol=1e-6)


def test_an_id_tells_the_bounds_of_its_parts() -> None:
    assert content_id("x", b"ab", b"c") != content_id("x", b"a", b"bc")
    assert content_id("x", b"ab").startswith("x-")


def test_a_model_that_is_not_there_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DatasetError, match="cannot be loaded"):
        kind("sentence-transformers").fit([], dim=0, seed=0, model=str(tmp_path / "no-such-model"))
