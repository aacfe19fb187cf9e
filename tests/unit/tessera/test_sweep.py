"""Sweeps before training: the space, its errors, what is pasted, and the draws of a study that was killed."""

import tomllib
from pathlib import Path

import msgspec
import polars as pl
import pytest

from features.dataset.descriptor import Dataset, load_dataset
from features.errors import TesseraError
from features.frame import Frame
from models.networks.kinds import DEFAULT, KINDS, reads_sequence
from tessera.pipeline.options import load_options
from tessera.sweep.best import as_toml, best_of, run_table
from tessera.sweep.space import Base, Choices, Range, applies, check_space, default_space, read_space, text_of
from tessera.sweep.study import Study, TrialReport
from tessera.sweep.trial import without_test

DESCRIPTOR = """
name = "shop"
[items]
path = "items.parquet"
id = "item"
categorical = ["kind"]
[events]
path = "events.parquet"
user = "user"
item = "item"
time = { column = "time", unit = "s" }
label = { column = "label" }
[split]
by = "time"
train = 0.8
validation = 0.1
test = 0.1
"""


def dataset(directory: Path, more: str = "") -> Dataset:
    path = directory / "shop.toml"
    path.write_text(DESCRIPTOR + more)
    return load_dataset(path)


def test_the_descriptor_and_over_name_lists_and_ranges(tmp_path: Path) -> None:
    described = """
[sweep]
table.dim = [8, 16]
training.network_rate = "1e-4..1e-2"
training.dropout.item = "0.1..0.3"
ranker.kind = ["dcn-v2", "deepfm"]
ranker.options.hidden = [[8], [16, 8]]
table.chunks = { "item.kind" = [1, 2] }
"""
    base = Base(dataset(tmp_path, described))
    space = read_space(base, ["table.dim=4,8", "table.budget=1MB..4MB", "ranker.hidden=[8, 4],[16]"])

    assert space == {
        "table.dim": Choices(("4", "8")),
        "training.network_rate": Range(1e-4, 1e-2, whole=False, log=True),
        "training.dropout.item": Range(0.1, 0.3, whole=False, log=False),
        "ranker.kind": Choices(("dcn-v2", "deepfm")),
        "ranker.options.hidden": Choices(("[8]", "[16,8]")),
        "table.chunks.item.kind": Choices(("1", "2")),
        "table.budget": Range(1_000_000, 4_000_000, whole=True, log=False),
        "ranker.hidden": Choices(("[8, 4]", "[16]")),
    }


@pytest.mark.parametrize(
    ("described", "words"),
    [
        ("table.dims = [8]", "[sweep] table.dims: 8: unknown key; the nearest valid name is 'table.dim'"),
        ("table.dim = [6]", "[sweep] table.dim: 6: expected a multiple of 4"),
        ("table.dim = 8", "[sweep] table.dim: expected a list of values, or a range"),
        ('table.dim = "8..64"', "list the values instead of a range"),
        ('training.table_rate = "0.3..0.1"', "expected LOW below HIGH"),
        ('training.table_rate = "a..b"', "[sweep] training.table_rate: a: expected a number"),
        ('tokens = "prefix..full"', "[sweep] tokens: full"),
        ("seed = [1, 2]", "[sweep] seed: a sweep cannot try seed"),
        ("gates.auc = [0.1]", "a sweep cannot try gates.auc"),
        ('ranker.kind = ["dcm"]', "[sweep] ranker.kind: dcm: ranker 'dcm' is unknown"),
        ("ranker.options.heads = [2]", "[sweep] ranker.options.heads: 2: ranker.options: dcn-v2 has none"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_by_file_and_key(tmp_path: Path, described: str, words: str) -> None:
    base = Base(dataset(tmp_path, f"[sweep]\n{described}\n"))
    with pytest.raises(TesseraError) as found:
        read_space(base)
    assert words in str(found.value), found.value
    assert str(tmp_path / "shop.toml") in str(found.value)


def test_a_choice_is_given_once(tmp_path: Path) -> None:
    base = Base(dataset(tmp_path), ("table.dim=8",))
    with pytest.raises(TesseraError, match=r"--over table\.dim=8,16: --set gives table\.dim one value"):
        read_space(base, ["table.dim=8,16"])
    for pair in ("table.dim", "=8", "table.dim="):
        with pytest.raises(TesseraError, match="expected NAME=VALUE"):
            read_space(base, [pair])


def test_the_default_space_passes_the_checks_and_keeps_to_the_bound(tmp_path: Path) -> None:
    base = Base(dataset(tmp_path), ("training.table_rate=0.2",))
    space = default_space(base, 1_000_000, 700_000)
    check_space(base, space)
    assert space["table.budget"] == Choices(("250000", "500000", "700000"))
    assert "training.table_rate" not in space
    assert space["ranker.kind"] == Choices((DEFAULT, *KINDS))
    pooled = default_space(Base(base.dataset, ("table.history=mean",)), 1_000_000, None)
    assert pooled["ranker.kind"] == Choices(tuple(kind for kind in (DEFAULT, *KINDS) if not reads_sequence(kind)))
    assert applies("ranker.cross_layers", "dcn-v2")
    assert not applies("ranker.cross_layers", "din")
    assert [kind for kind in ("dcn-v2", "dlrm", "self-attention") if applies("ranker.options.blocks", kind)] == [
        "self-attention"
    ]


def test_options_of_another_network_do_not_stay(tmp_path: Path) -> None:
    run = '[run.ranker]\nkind = "din"\noptions = { attention = [8] }\n[run.table]\nchunks = { "item.kind" = 2 }\n'
    base = Base(dataset(tmp_path, run), ("quantizer=residual-kmeans",))
    chosen = {"ranker.kind": "dlrm", "ranker.options.top": "[16, 8]", "training.table_rate": "1e-05"}
    options = base.options_with(chosen)

    assert dict(options.training.network.options) == {"top": [16, 8]}
    pasted = run_table(base, TrialReport(3, "finished", chosen, log_loss=0.5), ("id", "metadata"))
    again = load_options(dataset(tmp_path, pasted))
    assert again.choices() == {**options.choices(), "reads": ("id", "metadata")}


def test_toml_of_odd_names_and_values_reads_back() -> None:
    values = {"table.chunks.item.kind": 2, "encoder_options.lsa.fields": ["a.b", '"q"'], "table.budget": None}
    found = tomllib.loads(as_toml("run", values))["run"]
    assert found["table"] == {"chunks": {"item.kind": 2}, "budget": "auto"}
    assert found["encoder_options"] == {"lsa": {"fields": ["a.b", '"q"']}}
    assert text_of(True) == "true"


def test_the_best_finished_and_none_else() -> None:
    def report(number: int, state: str, loss: float | None) -> TrialReport:
        return TrialReport(number, state, {}, log_loss=loss)  # type: ignore[arg-type]

    reports = [report(0, "finished", 0.5), report(1, "pruned", 0.1), report(2, "finished", 0.4)]
    assert best_of(reports) == reports[2]
    assert best_of(reports[1:2]) is None


SPACE = {"table.dim": Choices(("8", "16")), "training.table_rate": Range(0.03, 0.3, whole=False, log=True)}


def trials(path: Path, *, stop: int | None = None, count: int = 10) -> list[TrialReport]:
    """Makes trials whose loss is the rate; at `stop` a process ends between the draw and the result."""
    study = Study(path, seed=3, default_kind="dcn-v2")
    study.identify({"space": 1}, path.parent)
    while len(study.reports) < count:
        drawn = study.draw(SPACE)
        if drawn.number == stop:
            break
        if drawn.number == 5:
            study.record(drawn, TrialReport(5, "infeasible", drawn.choices, why="too many bytes"))
            continue
        loss = 9.0 if drawn.number == 6 else float(drawn.choices.get("training.table_rate", "0.2"))
        pruned = drawn.is_pruned((loss, loss))
        study.record(drawn, TrialReport(drawn.number, "pruned" if pruned else "finished", drawn.choices, log_loss=loss))
    found = study.reports
    study.close()
    return found


def test_a_study_that_was_killed_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    straight = trials(tmp_path / "one" / "sweep.db")
    assert len(trials(tmp_path / "two" / "sweep.db", stop=7)) == 7
    assert trials(tmp_path / "two" / "sweep.db") == straight
    assert [one.number for one in straight] == list(range(10))
    assert straight[0].choices == {}
    assert straight[6].state == "pruned"
    assert len({one.choices["training.table_rate"] for one in straight[1:]}) == 9
    assert {one.state for one in straight if one.number != 6} >= {"finished", "infeasible"}


def test_a_result_that_a_killed_process_recorded_is_not_made_again(tmp_path: Path) -> None:
    study = Study(tmp_path / "sweep.db", seed=3, default_kind="dcn-v2")
    report = TrialReport(0, "finished", {}, log_loss=0.5, epochs=(0.6, 0.5), run="r1")
    study.draw(SPACE).trial.set_user_attr("report", msgspec.to_builtins(report))
    study.close()

    study = Study(tmp_path / "sweep.db", seed=3, default_kind="dcn-v2")
    assert study.reports == []
    left = study.draw(SPACE)
    assert left.report == report
    study.record(left, report)
    assert study.reports == [report]
    assert study.draw(SPACE).number == 1
    study.close()


def test_trials_that_are_not_comparable_are_refused(tmp_path: Path) -> None:
    trials(tmp_path / "sweep.db", count=1)
    study = Study(tmp_path / "sweep.db", seed=3, default_kind="dcn-v2")
    with pytest.raises(TesseraError, match="were made with another space, and would not be comparable"):
        study.identify({"space": 2}, tmp_path)
    study.close()


def test_a_trials_frame_has_no_test_part() -> None:
    parts = ("train", "validation", "test")
    examples = pl.DataFrame({"event": [0, 1, 2], "label": [0, 1, 1], "split": list(parts)})
    frame = without_test(Frame(pl.DataFrame(), pl.DataFrame(), examples))
    assert frame.all_blocks().whole()["event"].to_list() == [0, 1]
    with pytest.raises(KeyError):
        frame.blocks("test")
