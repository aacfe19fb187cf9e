"""Texts that a device reads in batches of like length have the vectors of the library."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.content.encoder import unit
from features.content.transformer import batches
from features.content.transformer.tokens import tokens_of
from features.device import CPU
from tests.small_bert import small_bert

WORDS = (
    "red",
    "a",
    "unbelievably",
    "shoe",
    "läufer",
    "42",
    "…",
    "x" * 30,
    "",
    "[SEP]",
    "ΟΔΟΣ",
    "new\tline",
    "a\u0301",
    "(x)",
)


@pytest.fixture(scope="module")
def model() -> Any:
    found = small_bert(2)
    found.max_seq_length = 24
    return found


@given(texts=st.lists(st.lists(st.sampled_from(WORDS), max_size=30).map(" ".join), min_size=1, max_size=40))
def test_vectors_are_those_of_the_library(model: Any, texts: list[str]) -> None:
    expected = model.encode(texts, show_progress_bar=False)
    assert np.allclose(batches.read(model, texts, CPU), unit(expected), atol=1e-5)


@given(
    texts=st.lists(st.text(max_size=60) | st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join), max_size=20),
    most=st.integers(3, 40),
)
def test_tokens_are_those_of_the_tokenizer(model: Any, texts: list[str], most: int) -> None:
    ids, lengths = tokens_of(model.tokenizer, texts, most)
    expected = model.tokenizer(texts, truncation=True, max_length=most)["input_ids"] if texts else []
    ends = np.cumsum(lengths)
    assert [ids[end - length : end].tolist() for end, length in zip(ends, lengths, strict=True)] == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_hold_each_text_once_and_no_more_tokens_than_they_may(
    model: Any, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.tokenizer, "padding_side", side)
    monkeypatch.setattr(batches, "_TOKENS", 40)
    texts = [" ".join(["red"] * count) for count in (1, 9, 3, 20, 2, 2, 0)]
    ids, lengths = batches.read_tokens(model, texts)
    seen, padded = [], 0
    for rows, inputs in batches.batches(model.tokenizer, (ids, lengths), CPU):
        held = inputs["attention_mask"].numpy().astype(bool)
        assert held.size <= max(40, held.shape[1])
        assert np.array_equal(held.sum(axis=1), lengths[rows])
        assert held[:, -1 if side == "left" else 0].all()
        ends = np.cumsum(lengths)
        for row, own, mask in zip(rows, inputs["input_ids"].numpy(), held, strict=True):
            assert np.array_equal(own[mask], ids[ends[row] - lengths[row] : ends[row]])
        seen += rows.tolist()
        padded += held.size - int(held.sum())
    assert sorted(seen) == list(range(len(texts)))
    assert padded <= len(ids)


def test_a_model_with_a_prompt_is_read_by_the_library(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert batches.reads_tokens(model)
    monkeypatch.setattr(model, "default_prompt_name", "query")
    assert not batches.reads_tokens(model)
