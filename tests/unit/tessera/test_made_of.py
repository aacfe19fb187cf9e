"""A stage runs again if what it reads changed, for a reason that is said, and for no other."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from tessera.pipeline.made_of import MadeOf, differences
from tessera.pipeline.stage import Stages, made_of

BEFORE = MadeOf(
    code="1",
    options={"quantizer": "rqvae", "codes": None},
    descriptor={"events": {"label": {"column": "y"}}},
    files={"items.csv": "a", "events.csv": "b"},
    after={"encode": "k"},
)


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (MadeOf("2", BEFORE.options, BEFORE.descriptor, BEFORE.files, BEFORE.after), "the code or a library changed"),
        (
            MadeOf("1", {"quantizer": "rqvae", "codes": 8}, BEFORE.descriptor, BEFORE.files, BEFORE.after),
            "codes auto → 8",
        ),
        (
            MadeOf("1", BEFORE.options, {"events": {"label": {"column": "z"}}}, BEFORE.files, BEFORE.after),
            "descriptor: events.label.column y → z",
        ),
        (
            MadeOf("1", BEFORE.options, BEFORE.descriptor, {"items.csv": "c", "events.csv": "b"}, BEFORE.after),
            "items.csv changed",
        ),
        (MadeOf("1", BEFORE.options, BEFORE.descriptor, {"items.csv": "a"}, BEFORE.after), "events.csv is gone"),
        (MadeOf("1", BEFORE.options, BEFORE.descriptor, BEFORE.files, {"encode": "l"}), "encode ran again"),
        (MadeOf("1", BEFORE.options, BEFORE.descriptor, BEFORE.files, {}), "there is no encode any more"),
    ],
)
def test_each_part_decides_the_key_and_is_named(now: MadeOf, reason: str) -> None:
    assert BEFORE.changes(now) == [reason]
    assert BEFORE.key("assign") != now.key("assign")


def test_a_file_that_is_only_renamed_decides_nothing() -> None:
    renamed = MadeOf("1", BEFORE.options, BEFORE.descriptor, {"i.csv": "a", "e.csv": "b"}, BEFORE.after)
    assert renamed.key("assign") == BEFORE.key("assign")
    assert BEFORE.key("assign") != BEFORE.key("frame")


def test_equal_values_of_other_types_are_no_difference() -> None:
    assert differences({"a": (1, 2), "b": {}}, {"a": [1, 2], "b": {}}) == []
    assert differences({"a": 1}, {"b": 2}) == ["b not set → 2", "a 1 → not set"]


def test_a_stage_that_is_done_again_says_why(tmp_path: Path) -> None:
    said = io.StringIO()
    run = Stages(tmp_path, Console(file=said, width=200))
    now = MadeOf("1", {"quantizer": "residual-kmeans", "codes": None}, BEFORE.descriptor, BEFORE.files, BEFORE.after)
    run.run("assign", BEFORE.key("assign"), lambda place, advance: None, made_of=BEFORE)
    assert "again" not in said.getvalue()
    assert run.again == {}
    run.run("assign", now.key("assign"), lambda place, advance: None, made_of=now)
    assert "assign: done again, since quantizer rqvae → residual-kmeans" in said.getvalue()
    assert run.again == {"assign": ["quantizer rqvae → residual-kmeans"]}
    assert made_of(tmp_path / "assign") == now


def test_a_stage_of_a_release_that_kept_the_key_alone_is_done_again(tmp_path: Path) -> None:
    (tmp_path / "assign").mkdir()
    (tmp_path / "assign" / "stage.json").write_text('{"key": "old", "files": {}}')
    run = Stages(tmp_path, Console(quiet=True))
    run.run("assign", BEFORE.key("assign"), lambda place, advance: None, made_of=BEFORE)
    assert run.again == {"assign": ["it was made of other inputs, or by an earlier release"]}
