"""A benchmark checks its needs before it measures, says how to get what is missing, and keeps what it has measured."""

import inspect
import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from features.dataset.descriptor import load_dataset
from features.errors import TesseraError
from tessera.bench.benches import BENCHES, Bench
from tessera.bench.harness import peer
from tessera.bench.harness.needs import (
    CTR,
    FEAST,
    RETRIEVAL,
    RQ,
    Needs,
    Peers,
    build_peers,
    check_datasets,
    check_servers,
)
from tessera.bench.harness.result import BenchResult
from tessera.bench.harness.rows import keep_rows, measured_rows
from tessera.bench.offline import semantic_ids, training_speed
from tessera.bench.online import serving_reads
from tessera.cli.main import app
from tessera.demo.synthetic import write_synthetic
from tessera.settings import Settings

QUIET = Console(quiet=True)
NO_PEERS = Peers({}, {FEAST: "uv is missing", CTR: "uv is missing", RQ: "uv is missing"})


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run(name: str, *options: str) -> Any:
    return CliRunner().invoke(app, ["bench", name, *options])


def test_servers_that_are_not_set_are_named_with_the_remedy() -> None:
    settings = Settings(home=Path("unused"))
    with pytest.raises(TesseraError, match=r"TESSERA_KAFKA is not set; TESSERA_REDIS is not set; .*`make up`"):
        check_servers("stream", Needs(servers=True), settings)
    check_servers("growth", Needs(), settings)


def test_servers_that_do_not_answer_are_named_with_their_address() -> None:
    kafka, redis = f"127.0.0.1:{closed_port()}", f"redis://127.0.0.1:{closed_port()}/0"
    settings = Settings(home=Path("unused"), kafka=kafka, redis=redis)
    with pytest.raises(TesseraError) as refused:
        check_servers("soak", Needs(servers=True), settings)
    for words in (
        "bench soak",
        f"the broker at {kafka} does not answer",
        f"the Redis server at {redis} does not answer",
    ):
        assert words in str(refused.value)


def test_a_missing_server_stops_a_benchmark_before_it_reads_any_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESSERA_KAFKA", f"127.0.0.1:{closed_port()}")
    monkeypatch.delenv("TESSERA_REDIS", raising=False)
    ended = run("stream", "--out", str(tmp_path / "out"))
    assert isinstance(ended.exception, TesseraError)
    assert not (tmp_path / "out").exists()


def test_a_dataset_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text("time,label\n1,0\n2,1\n")
    (tmp_path / "bare.toml").write_text(
        'name = "bare"\n[events]\npath = "events.csv"\ntime = "time"\nlabel = { column = "label" }\n'
        '[split]\nby = "random"\ntrain = 0.8\nvalidation = 0.1\ntest = 0.1\n'
    )
    bare = load_dataset(tmp_path / "bare.toml")
    with pytest.raises(TesseraError, match=r"bare\.toml: bench serving needs \[items\] and the user"):
        check_datasets("serving", Needs(ranks=True), [bare])
    with pytest.raises(TesseraError, match=r"bare\.toml: bench filtered needs \[items\] with text"):
        check_datasets("filtered", Needs(content=True), [bare])
    check_datasets("stream", Needs(), [bare])
    made = load_dataset(write_synthetic(tmp_path / "made", users=50, items=100, events=1_000))
    check_datasets("growth", Needs(ranks=True, content=True), [made])


def test_a_peer_that_cannot_be_built_is_a_row_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(peer, "_OWN_UV", tmp_path / "uv")
    peers = build_peers(Needs(peers=(FEAST,)), tmp_path / "peers", QUIET)
    assert peers.python(FEAST) is None
    (row,) = peers.rows("part")
    assert row["part"] == "Feast"
    assert "install uv" in row["missing"]


def test_a_peer_that_is_built_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(peer, "_OWN_UV", tmp_path / "uv")
    environment = tmp_path / "peers" / "feast_requirements"
    (environment / "bin").mkdir(parents=True)
    (environment / "ready").write_text((peer.PEER_FOLDER / FEAST.pins).read_text())
    peers = build_peers(Needs(peers=(FEAST,)), tmp_path / "peers", QUIET)
    assert peers.python(FEAST) == environment / "bin" / "python"
    assert peers.rows("part") == []


def test_claims_about_a_missing_peer_are_not_made_and_the_others_are() -> None:
    model = {"seed": 0, "samples_per_second": 9.0, "test_auc": 0.7, "equal_time_auc": 0.7, "fit_gb": 0.1}
    rows = [model | {"model": name} for name in (training_speed.FLOOR, *training_speed.OURS)]
    assert len(training_speed.claims([*rows, *NO_PEERS.rows("model")])) == 2
    assert RQ.name not in semantic_ids.methods(None)
    assert RQ.name in semantic_ids.methods(Path("python"))
    timed = {"p50_ms": 1.0, "p99_ms": 2.0, "request_ms": 1.0}
    read = ("reads: Redis", "floor: Redis", "reads: mirror", "floor: mirror")
    parts: list[dict[str, Any]] = [{"part": part, "rows": n, **timed} for part in read for n in (500, 4_000)]
    parts += [{"part": part, **timed} for part in ("floor: rank", "rank: Redis", "rank: mirror")]
    parts.append({"part": "rank: sampled", "ratio": 1.0, **timed})
    parts += [{"part": "storage", "storage": kind, "bytes_per_row": 30.0} for kind in ("float16", "int8")]
    parts += [{"part": "bootstrap", "seconds": 0.5, "floor_seconds": 0.4}, *NO_PEERS.rows("part")]
    without = serving_reads._claims(parts)
    with_feast = serving_reads._claims([*parts, {"part": "reads: Feast", "p50_ms": 5.0}])
    (only,) = {claim.claim for claim in with_feast} - {claim.claim for claim in without}
    assert "times as fast as Feast" in only
    assert all(claim.holds for claim in without)


def test_every_row_is_on_disk_before_the_next_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    with keep_rows(path, {"bench": "x", "code": "c1"}) as kept:
        rows = measured_rows()
        rows.append({"part": "a", "value": 1.5})
        rows += [{"part": "b"}, {"part": "c"}]
        written = [json.loads(line) for line in path.read_text().splitlines()]
        assert written == [{"bench": "x", "code": "c1"}, {"part": "a", "value": 1.5}, {"part": "b"}, {"part": "c"}]
        assert kept.rows is rows
    with keep_rows(path, {"bench": "x", "code": "c2"}):
        pass
    assert len(path.read_text().splitlines()) == 5
    assert measured_rows() == []


@pytest.mark.parametrize("error", [RuntimeError("the disk is full"), KeyboardInterrupt()])
def test_a_benchmark_that_fails_prints_and_keeps_the_rows_it_measured(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **options: Any) -> BenchResult:
        measured_rows().append({"part": "first", "value": 42})
        raise error

    fails.__module__ = "tessera.bench.online.rollout_rates"

    def prepared(*args: Any) -> tuple[Callable[..., BenchResult], list[Any]]:
        return fails, []

    monkeypatch.setattr(Bench, "prepared", prepared)
    ended = run("rollout", "--json", "--out", str(tmp_path))
    result = json.loads(ended.stdout[ended.stdout.index("{") :])
    assert ended.exit_code == 1
    assert result["rows"] == [{"part": "first", "value": 42}]
    assert result["failed"] == f"{type(error).__name__}: {error}"
    header, row = (json.loads(line) for line in (tmp_path / "rollout-rows.jsonl").read_text().splitlines())
    assert set(header) == {"bench", "code", "seeds"}
    assert row == {"part": "first", "value": 42}


def test_a_benchmark_that_fails_before_its_first_row_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> BenchResult:
        raise TesseraError("nothing was measured")

    fails.__module__ = "tessera.bench.online.rollout_rates"
    monkeypatch.setattr(Bench, "prepared", lambda *args: (fails, []))
    ended = run("rollout", "--out", str(tmp_path))
    assert isinstance(ended.exception, TesseraError)


def test_the_needs_of_a_benchmark_are_those_that_it_uses() -> None:
    folder = peer.PEER_FOLDER.parent
    peers = {"FEAST": FEAST, "CTR": CTR, "RETRIEVAL": RETRIEVAL, "RQ": RQ}
    checked = set()
    for path in [
        *folder.glob("online/*.py"),
        *folder.glob("offline/*.py"),
        *folder.glob("encoder/*.py"),
        *folder.glob("shown/*.py"),
        *folder.glob("skew/*.py"),
        *folder.glob("several/*.py"),
        *folder.glob("rankers/*.py"),
        *folder.glob("retrieval/*.py"),
        *folder.glob("versions/*.py"),
    ]:
        text = path.read_text()
        for name, needs in ((name, bench.needs) for name, bench in BENCHES.items()):
            if f"def {name.replace('-', '_')}(" in text and "BenchResult" in text:
                checked.add(name)
                assert needs.servers == (f'servers("{name}")' in text), name
                used = {known for constant, known in peers.items() if f"python({constant})" in text}
                assert set(needs.peers) == used, name
    assert checked == set(BENCHES)


def test_rows_that_are_kept_in_a_file_are_in_the_json_too(tmp_path: Path) -> None:
    with keep_rows(tmp_path / "x-rows.jsonl", {"bench": "x"}):
        rows = measured_rows()
        rows.append({"part": "a", "ms": 1.5})
        result = BenchResult("x", "data", 1, rows, [])
    assert result.to_json()["rows"] == [{"part": "a", "ms": 1.5}]
    assert len((tmp_path / "x-rows.jsonl").read_text().splitlines()) == 2


def test_every_benchmark_is_found_and_takes_the_options_of_its_row() -> None:
    keywords = {"part": "parts", "held-out": "held_out"}
    for name, bench in BENCHES.items():
        parameters = inspect.signature(bench.load()).parameters
        assert {"seeds", "console"} <= set(parameters), name
        assert ("peers" in parameters) == bool(bench.needs.peers), name
        places = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
        assert len(places) == (1 if bench.reads == "nothing" else 2), name
        for option in ("part", "held-out", "model", "seconds"):
            assert (keywords.get(option, option) in parameters) == (option in bench.takes), (name, option)


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (("resize", "--part", "x"), "--part is for .*rankers.*, not for resize"),
        (("growth", "--seconds", "20"), "--seconds is for soak, swaps, not for growth"),
        (("growth", "--device", "cpu"), "--device is for training-speed, encoders, semantic-ids, not for growth"),
        (("encoders", "--device", "cpu", "--part", "x"), "--part: a measurement of a --device has no parts"),
        (("cold-start", "--users", "--held-out", "year > 1"), "--users is for cold-start without --held-out"),
        (("streaming",), "bench streaming needs --dataset"),
        (("none",), "benchmark 'none' is unknown; there are: main-job, "),
    ],
)
def test_options_that_a_benchmark_does_not_take_are_refused_by_name(
    words: tuple[str, ...], refused: str, tmp_path: Path
) -> None:
    ended = run(*words, "--out", str(tmp_path / "out"))
    assert isinstance(ended.exception, TesseraError)
    assert re.search(refused, str(ended.exception))
