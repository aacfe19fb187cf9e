"""`encoders --device`: texts a second through a transformer on a device, beside its bare forward pass on ready tokens.

The model has the shape of MiniLM (6 layers of 384 dimensions) and random weights, since speed does not depend on them.
Both ways have the same texts, model, precision and batches.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console

from features.content.sentence import SentenceEncoder
from features.content.transformer import batches
from features.device import Device, DeviceChoice, resolve
from tessera.bench.harness.result import BenchResult, Claim, at_least
from tessera.bench.harness.rows import measured_rows
from tessera.terminal import err_console

_LETTERS = "aeioubdfgklmnprst"
_WORDS, _PIECES, _TOKENS = 20_000, 12_000, 256
_SAMPLE = 512


def texts_of(count: int, words: float, seed: int) -> list[str]:
    """Returns texts of words from a Zipf law; their lengths spread around a number of words as titles and texts do."""
    rng = np.random.default_rng(seed)
    vocabulary = np.array(_words(_WORDS, seed=0))
    lengths = np.clip(rng.lognormal(np.log(words), 0.6, count), 1, 400).astype(int)
    drawn = vocabulary[np.minimum(rng.zipf(1.2, int(lengths.sum())) - 1, _WORDS - 1)].tolist()
    ends = np.cumsum(lengths)
    return [" ".join(drawn[end - length : end]) for end, length in zip(ends, lengths, strict=True)]


def write_model(directory: Path) -> None:
    """Writes a model of MiniLM's shape with random weights, and a WordPiece tokenizer over the texts' words."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_LETTERS, *(f"##{letter}" for letter in _LETTERS)]
    pieces += _words(_WORDS, seed=0)[:_PIECES]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = BertWordPieceTokenizer(vocabulary)
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, model_max_length=_TOKENS, **special)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30_522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1_536
    )
    base = directory / "base"
    BertModel(config).save_pretrained(base)
    own.save_pretrained(base)
    transformer = Transformer(str(base), max_seq_length=_TOKENS)
    SentenceTransformer(modules=[transformer, Pooling(384, "mean")], device="cpu").save(str(directory / "model"))


def encoders_device(
    choice: DeviceChoice, *, seeds: int, console: Console, texts: int = 200_000, words: float = 40.0
) -> BenchResult:
    """Measures texts a second on one device.

    Args:
        choice: Device.
        seeds: Number of seeds of the texts.
        console: Shows each row.
        texts: Number of texts.
        words: Median of their words.
    """
    device = resolve(choice, fused=False)
    rows = measured_rows()
    with TemporaryDirectory() as aside:
        write_model(Path(aside))
        model = str(Path(aside) / "model")
        for seed in range(seeds):
            for row in _of_seed(device, model, texts_of(texts, words, seed)):
                rows.append({**row, "seed": seed, "card": device.about.get("card", "cpu")})
                console.print(f"encoders: {rows[-1]}")
    return BenchResult("encoders", f"synthetic-{texts}", seeds, list(rows), claims(list(rows)))


def _of_seed(device: Device, model: str, texts: list[str]) -> Iterator[dict[str, Any]]:
    plain, encoder = SentenceEncoder(model), SentenceEncoder(model)
    encoder.device = device
    sample = texts[:_SAMPLE]
    expected, seconds = _timed(lambda: plain.encode(sample), device)
    cosine = float((encoder.encode(sample) * expected).sum(axis=1).min())
    ready = [
        batch
        for start in range(0, len(texts), 50_000)
        for _, batch in batches.batches(
            encoder.model.tokenizer, batches.read_tokens(encoder.model, texts[start : start + 50_000]), device
        )
    ]
    tokens = sum(int(one["attention_mask"].sum()) for one in ready)

    @torch.inference_mode()
    def bare() -> None:
        for batch in ready:
            encoder.model(batch)

    bare()
    about = {"texts": len(texts), "tokens_of_a_text": tokens / len(texts)}
    yield {"part": "encode", "device": "cpu", **about, "texts_per_second": len(sample) / seconds}
    forward = min(_timed(bare, device)[1] for _ in range(2))
    yield {"part": "bare forward", "device": device.name, **about, "texts_per_second": len(texts) / forward}
    _, tokenised = _timed(lambda: batches.read_tokens(encoder.model, texts), device)
    yield {"part": "tokenizer", "device": "cpu", **about, "texts_per_second": len(texts) / tokenised}
    whole = min(_timed(lambda: encoder.encode(texts), device)[1] for _ in range(2))
    yield {
        "part": "encode",
        "device": device.name,
        **about,
        "texts_per_second": len(texts) / whole,
        "least_cosine": cosine,
    }


def _timed(act: Callable[[], Any], device: Device) -> tuple[Any, float]:
    device.synchronize()
    began = time.perf_counter()
    found = act()
    device.synchronize()
    return found, time.perf_counter() - began


def _words(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    letters = np.array(list(_LETTERS))
    return ["".join(letters[rng.integers(0, len(letters), length)]) for length in rng.integers(2, 9, count)]


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """Returns the claims, judged in the seed with the worst result."""
    whole = [row for row in rows if row["part"] == "encode" and "least_cosine" in row]
    bare = [row["texts_per_second"] for row in rows if row["part"] == "bare forward"]
    shares = [row["texts_per_second"] / own for row, own in zip(whole, bare, strict=True)]
    return [
        at_least("texts a second over those of a bare forward pass on ready tokens", min(shares), 0.7),
        at_least("cosine to the processor's vectors, the least", min(row["least_cosine"] for row in whole), 0.999),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measures an encoder on a device by itself.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--texts", type=int, default=200_000)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    result = encoders_device(given.device, seeds=1, console=err_console, texts=given.texts)
    (given.out / "encoders-device.json").write_text(json.dumps(asdict(result)))
    for claim in result.claims:
        print(json.dumps(asdict(claim)))
