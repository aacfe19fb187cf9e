"""Reads texts through a transformer on a device: tokens ahead of the device, batches of texts of like length.

A batch is padded to its longest text, so texts are sorted by their number of tokens first, and a batch has as many
texts as fit a number of tokens. The tokens of many texts go to the device at once, and batches are laid out there. The
tokenizer works in a thread of its own, and vectors come back once at the end.

Shape letters: N texts, n tokens in all, B texts of a batch, T tokens of its longest text, D dim.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.content.transformer.tokens import Tokens, tokens_of
from features.device import Device

# Texts that are tokenised at once, and padded tokens of a batch.
_SLICE, _TOKENS = 1 << 15, 1 << 16


def reads_tokens(model: Any) -> bool:
    """Returns whether a sentence-transformers model reads plain tokens: no prompt, and a tokenizer of the fast kind."""
    tokenizer: Any = getattr(model, "tokenizer", None)
    plain = not getattr(model, "default_prompt_name", None) and not getattr(model[0], "do_lower_case", False)
    return bool(plain and getattr(tokenizer, "is_fast", False) and tokenizer.pad_token_id is not None)


@torch.inference_mode()
def read(model: Any, texts: Sequence[str], device: Device) -> NDArray[np.float32]:
    """Returns the vectors, (N, D) float32 of unit length, of N > 0 texts.

    Args:
        model: Opened sentence-transformers model on `device`, for which `reads_tokens` is true.
        texts: Texts.
        device: Device.
    """
    # Texts of like length share a slice, so that its batches pad little.
    order = np.argsort(np.fromiter(map(len, texts), dtype=np.int64, count=len(texts)), kind="stable")[::-1]
    slices = [order[start : start + _SLICE] for start in range(0, len(order), _SLICE)]
    found: list[Tensor] = []
    place: list[NDArray[np.int64]] = []
    with ThreadPoolExecutor(1) as ahead:
        pending = [ahead.submit(read_tokens, model, [texts[i] for i in own]) for own in slices[:2]]
        for number, own in enumerate(slices):
            tokens = pending.pop(0).result()
            if number + 2 < len(slices):
                pending.append(ahead.submit(read_tokens, model, [texts[i] for i in slices[number + 2]]))
            for rows, batch in batches(model.tokenizer, tokens, device):
                vectors = model(batch)["sentence_embedding"].double()
                found.append((vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-300)).float())
                place.append(own[rows])
    out = torch.empty((len(texts), found[0].shape[1]), dtype=torch.float32, device=device.torch)
    out[device.put(np.concatenate(place))] = torch.cat(found)
    vectors_of_texts: NDArray[np.float32] = out.cpu().numpy()
    return vectors_of_texts


def read_tokens(model: Any, texts: Sequence[str]) -> Tokens:
    """Returns the tokens of texts that a model reads."""
    return tokens_of(model.tokenizer, texts, model.max_seq_length or model.tokenizer.model_max_length)


def batches(tokenizer: Any, tokens: Tokens, device: Device) -> Iterator[tuple[NDArray[np.int64], dict[str, Tensor]]]:
    """Yields the rows (B,) of each batch among N texts, and its padded inputs (B, T) on the device.

    Texts of like length are together, the longest first.
    """
    flat, lengths = tokens
    ids = device.put(flat) if len(flat) else torch.zeros(1, dtype=torch.int32, device=device.torch)
    order = np.argsort(-lengths, kind="stable")
    placed = device.put(np.stack([(np.cumsum(lengths) - lengths)[order], lengths[order]]))
    first = 0
    while first < len(order):
        longest = max(int(lengths[order[first]]), 1)
        last = min(first + max(1, _TOKENS // longest), len(order))
        starts, own = placed[:, first:last].unsqueeze(2)
        columns = torch.arange(longest, device=ids.device)
        if tokenizer.padding_side == "left":
            columns = columns - (longest - own)
        held = (columns >= 0) & (columns < own)
        at = (starts + columns).clamp(0, len(ids) - 1)
        inputs = {
            "input_ids": torch.where(held, ids[at].long(), tokenizer.pad_token_id),
            "attention_mask": held.long(),
        }
        if "token_type_ids" in tokenizer.model_input_names:
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        yield order[first:last], inputs
        first = last
