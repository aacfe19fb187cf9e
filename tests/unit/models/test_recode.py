"""Another codebook under a trained ranker."""

from dataclasses import replace

import numpy as np
import polars as pl
import torch

from features.frame import Frame
from features.hashing import fingerprint
from models.ranker.loading import assembler, examples
from models.ranker.network import Ranker
from models.ranker.recode import recode
from models.ranker.train import TrainConfig, new_ranker, predict
from models.table.admission import Admission
from models.table.default_schema import TableOptions, default_schema
from models.table.schema import SEMANTIC_ID, Schema
from tests.build import SMALL_NETWORK, coloured_dataset, coloured_frame


def named(frame: Frame, tokens: list[list[str]]) -> Frame:
    return frame.replace(items=frame.items.with_columns(pl.Series(SEMANTIC_ID, tokens, dtype=pl.List(pl.String))))


FRAME = coloured_frame(items=40)
COUNT = FRAME.items.height
OLD = [[f"{row % 4}", f"{row % 4}.{row % 8}"] for row in range(COUNT)]
# The same groups under other names.
RENAMED = [[f"{(row + 1) % 4 + 7}", f"{(row + 1) % 4 + 7}.{row % 8}"] for row in range(COUNT)]


def world(tokens: list[list[str]]) -> tuple[Schema, Frame, Ranker]:
    frame = named(FRAME, tokens)
    options = TableOptions(dim=4, exact=(), chunks={SEMANTIC_ID: 2})
    # So many rows that hardly two values meet.
    schema = replace(default_schema(coloured_dataset(), frame, options, history_length=5), rows=1 << 20, admission=0)
    ranker = new_ranker(schema, TrainConfig(network=SMALL_NETWORK))
    ranker.table.accumulator.copy_(torch.rand(schema.rows, generator=torch.Generator().manual_seed(1)))
    return schema, frame, ranker


def before(frame: Frame) -> pl.DataFrame:
    return frame.items.select("item_id", SEMANTIC_ID)


def scores(schema: Schema, frame: Frame, ranker: Ranker) -> np.ndarray:
    part = frame.part("test")
    return predict(ranker.eval(), assembler(schema, frame, part, Admission.off()), examples(part))


def test_the_same_groups_under_other_names_score_as_before() -> None:
    schema, frame, ranker = world(OLD)
    expected = scores(schema, frame, ranker)
    renamed = named(FRAME, RENAMED)
    assert not np.allclose(scores(schema, renamed, ranker), expected, atol=1e-6)
    recode(schema, ranker, renamed, before(frame))
    # Items that training never shows tell nothing of their tokens; these groups are all shown.
    assert np.allclose(scores(schema, renamed, ranker), expected, atol=1e-6)


def test_the_same_tokens_change_no_row() -> None:
    schema, frame, ranker = world(OLD)
    weight, accumulator = ranker.table.weight.clone(), ranker.table.accumulator.clone()
    recode(schema, ranker, frame, before(frame))
    assert torch.allclose(ranker.table.weight, weight, atol=1e-7)
    assert torch.allclose(ranker.table.accumulator, accumulator, atol=1e-6)


def test_a_token_of_two_old_ones_starts_from_their_mean_by_impressions() -> None:
    schema, frame, ranker = world(OLD)
    halves = [[f"half {row % 2}", "rest"] for row in range(COUNT)]
    after = named(FRAME, halves)
    old_rows = schema.hash_spec.lookup(SEMANTIC_ID, 2, fingerprint(["0", "2"]))
    old = [ranker.table.weight[torch.from_numpy(rows)].clone() for rows in old_rows]
    states = [ranker.table.accumulator[torch.from_numpy(rows)].clone() for rows in old_rows]
    shown = np.bincount(after.part("train")["item"].to_numpy(), minlength=COUNT)
    share = [float(shown[kind::4].sum()) for kind in (0, 2)]
    recode(schema, ranker, after, before(frame))
    rows = torch.from_numpy(schema.hash_spec.lookup(SEMANTIC_ID, 2, fingerprint(["half 0"]))[0])
    expected = (share[0] * old[0] + share[1] * old[1]) / sum(share)
    assert torch.allclose(ranker.table.weight[rows], expected, atol=1e-6)
    state = (share[0] * states[0] + share[1] * states[1]) / sum(share)
    assert torch.allclose(ranker.table.accumulator[rows], state, atol=1e-6)


def test_a_row_that_another_feature_reads_keeps_a_share_of_itself() -> None:
    schema, frame, ranker = world(OLD)
    schema = replace(schema, rows=1)  # all values meet in one row
    ranker = new_ranker(schema, TrainConfig(network=SMALL_NETWORK))
    weight = ranker.table.weight.clone()
    recode(schema, ranker, named(FRAME, RENAMED), before(frame))
    assert torch.allclose(ranker.table.weight, weight, atol=1e-7)


def test_items_that_the_old_coding_did_not_know_change_nothing() -> None:
    schema, _, ranker = world(OLD)
    weight = ranker.table.weight.clone()
    strangers = pl.DataFrame({"item_id": ["x"], SEMANTIC_ID: pl.Series([["1", "1.1"]], dtype=pl.List(pl.String))})
    recode(schema, ranker, named(FRAME, RENAMED), strangers)
    assert torch.equal(ranker.table.weight, weight)
