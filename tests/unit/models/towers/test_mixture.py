"""The weight of content beside the towers: lists and their fused ranks against slow twins, and the choice."""

import numpy as np
import pytest

from models.towers import mixture
from models.towers.mixture import WEIGHTS, chosen_weight, fused_ranks
from models.towers.sequences import VALIDATION
from models.towers.validation import top_items
from tessera.bench.retrieval.protocol import leave_last_out
from tests.build import coloured_frame


def _spaces(seed: int) -> tuple:
    questions = leave_last_out(coloured_frame())
    sequences = questions.sequences
    asked = sequences.first_of(VALIDATION)
    rng = np.random.default_rng(seed)
    users, vectors = (rng.integers(-2, 3, (count, 4)).astype(np.float32) for count in (len(asked), 40))
    vectors[7], users[1] = 0, 0
    return questions.frame, sequences, asked, users, vectors


@pytest.mark.parametrize("count", [1, 5, 39, 60])
def test_lists_are_those_of_a_slow_twin(count: int) -> None:
    _, sequences, asked, users, vectors = _spaces(count)
    found = top_items(sequences, asked, users, vectors, count)
    for number, (_, start, end) in enumerate(asked.tolist()):
        visited = set(sequences.items[start:end].tolist())
        scores = {item: float(vectors[item] @ users[number]) for item in range(40) if item not in visited | {7}}
        best = sorted(scores, key=lambda item: (-scores[item], item))[:count] if users[number].any() else []
        # Of items that tie at the end of a list any may stand there.
        assert [scores[item] for item in found[number].tolist()] == [scores[item] for item in best]
        assert len(set(found[number].tolist())) == len(best)
        within = [item for item in best if scores[item] > scores[best[-1]]]
        assert found[number][: len(within)].tolist() == within


def test_without_a_vector_of_any_item_all_lists_are_empty() -> None:
    _, sequences, asked, users, vectors = _spaces(0)
    found = top_items(sequences, asked, users, np.zeros_like(vectors), 5)
    assert [len(one) for one in found] == [0] * len(asked)
    assert fused_ranks(found, found, np.zeros(len(asked), dtype=np.int64), 0.5, last=40).tolist() == [40] * len(asked)


def test_fused_ranks_by_hand() -> None:
    towers, content = [np.array([4, 2, 9])], [np.array([9, 5])]
    ranks = {
        weight: [fused_ranks(towers, content, np.array([goal]), weight, last=40)[0] for goal in (4, 2, 9, 5, 1)]
        for weight in (0.0, 0.25, 1.0)
    }
    # 1/61, 1/62 and 1/63 of the towers, and the weight's 1/61 and 1/62 of content.
    assert ranks == {0.0: [0, 1, 2, 40, 40], 0.25: [1, 2, 0, 3, 40], 1.0: [1, 2, 0, 3, 40]}


def test_the_list_that_finds_more_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    frame, sequences, asked, _, vectors = _spaces(0)
    content = frame.items.with_columns(content_vector=vectors)
    frame = frame.replace(items=content)
    goals = sequences.items[asked[:, 0]]
    good = np.eye(40, dtype=np.float32)
    bad = np.roll(good, 1, axis=0)

    def chosen(towers: np.ndarray, content: np.ndarray) -> float:
        both = {"towers": (good[goals], towers), "content": (good[goals], content)}
        monkeypatch.setattr(mixture, "spaces_of", lambda *_: both)
        return chosen_weight(frame, None, None, sequences, asked)  # type: ignore[arg-type]

    assert chosen(good, bad) == 0
    assert chosen(bad, good) == WEIGHTS[-1]
    assert chosen(good, good) == 0
    assert chosen_weight(frame, None, None, sequences, asked[:0]) == 1  # type: ignore[arg-type]
    without = frame.replace(items=frame.items.drop("content_vector"))
    assert chosen_weight(without, None, None, sequences, asked) == 1  # type: ignore[arg-type]
