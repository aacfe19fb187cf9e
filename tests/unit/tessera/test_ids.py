"""Reports of Semantic IDs: counts and purity by hand, the tree, the words, the commands."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from features.errors import DatasetError, TesseraError
from features.jobs.shard import write_shards
from models.semantic_id.codebook import residual_kmeans
from models.semantic_id.codebook.residual_kmeans import ResidualKMeansConfig
from models.semantic_id.report.quality import id_quality
from models.semantic_id.report.tree import Tree
from tessera.cli.ids_report import advise
from tessera.cli.main import app
from tessera.pages.coded_items import load_coded

CODES = np.array([[0, 1], [0, 1], [0, 2], [3, 1]], dtype=np.uint16)
VECTORS = np.array([[1, 0], [0, 1], [1, 0], [0, 2]], dtype=np.float32)
TEXTS = ["red apple fruit", "red cherry fruit", "red rose flower", "blue sky weather"]


def test_sharing_branching_and_sizes_are_counted() -> None:
    found = id_quality(CODES, VECTORS)
    assert (found.items, found.unique, found.sharing, found.largest_group) == (4, 0.75, 2, 2)
    first, second = found.depths
    assert (first.used, first.nodes, second.used, second.nodes) == (2, 2, 2, 3)
    assert first.shared == 0.75
    assert second.shared == 0.5
    assert first.sizes == (2.5, 3.0, 3.0)
    assert first.branching == pytest.approx(first.perplexity)
    # H(second | first): three quarters of the items are under 0, a third of which goes another way.
    assert second.branching == pytest.approx(np.exp(-0.75 * (2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3))))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=2, max_size=12), st.integers(0, 99))
def test_purity_is_the_mean_cosine_of_pairs_counted_one_by_one(codes: list[tuple[int, int]], seed: int) -> None:
    vectors = np.random.default_rng(seed).normal(size=(len(codes), 4)).astype(np.float32)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    found = id_quality(np.array(codes), vectors)
    for depth in (0, 1, 2):
        pairs = [
            float(unit[i] @ unit[j])
            for i in range(len(codes))
            for j in range(i)
            if codes[i][:depth] == codes[j][:depth]
        ]
        measured = found.cosine if depth == 0 else found.depths[depth - 1].purity
        if pairs:
            assert measured == pytest.approx(np.mean(pairs), abs=1e-5)
        else:
            assert measured is None


def test_codes_without_items_or_vectors_are_refused() -> None:
    with pytest.raises(DatasetError, match="the 4 items"):
        id_quality(CODES[:3], VECTORS)
    with pytest.raises(DatasetError, match="got 0"):
        id_quality(CODES[:0], VECTORS[:0])


def test_the_tree_holds_every_item_once_at_every_depth() -> None:
    tree = Tree(CODES, TEXTS)
    first = tree.children(tree.root)
    assert [(node.path, sorted(tree.items(node).tolist())) for node in first] == [((0,), [0, 1, 2]), ((3,), [3])]
    second = tree.children(first[0])
    assert [(node.path, sorted(tree.items(node).tolist())) for node in second] == [((0, 1), [0, 1]), ((0, 2), [2])]
    assert tree.children(second[0]) == []
    assert tree.find([0, 2]) == second[1]


def test_words_tell_a_node_from_its_siblings() -> None:
    tree = Tree(CODES, TEXTS)
    red, blue = tree.children(tree.root)
    assert tree.words(red, tree.root)[0] == "red"
    assert set(tree.words(blue, tree.root)) == {"blue", "sky", "weather"}
    fruit, flower = tree.children(red)
    # All three are red: that tells nothing here.
    assert tree.words(fruit, red)[0] == "fruit"
    assert "red" not in tree.words(flower, red)
    assert tree.words(tree.root, tree.root) == []


def test_texts_without_a_word_have_a_tree_without_words() -> None:
    tree = Tree(CODES, ["", "1 2", "!", ""])
    assert tree.words(tree.children(tree.root)[0], tree.root) == []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the output of the stages `encode` and `assign`, for sixty items."""
    directory = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 4, 60)
    vectors = (np.eye(4)[kinds] + 0.2 * rng.normal(size=(60, 4))).astype(np.float32)
    book = residual_kmeans.fit(vectors, ResidualKMeansConfig(levels=2, codes=4))
    codes = book.encode(vectors)
    ids = [f"i{row}" for row in range(60)]
    words = ["apple", "bread", "cheese", "<b>dates</b>"]
    texts = pl.DataFrame({"item_id": ids, "text": [f"{words[kind]} number {row}" for row, kind in enumerate(kinds)]})
    coded = pl.DataFrame({"item_id": ids}).with_columns(
        vector=pl.Series(vectors, dtype=pl.Array(pl.Float32, 4)), codes=pl.Series(codes, dtype=pl.Array(pl.UInt16, 2))
    )
    for stage in ("encode", "assign"):
        (directory / stage).mkdir()
        (directory / stage / "stage.json").write_text("{}")
    write_shards(texts, directory / "encode" / "texts")
    write_shards(coded, directory / "assign" / "codes")
    (directory / "assign" / "codebook").mkdir()
    book.save(directory / "assign" / "codebook")
    health = {"codes": 4, "perplexity": [0.9, 0.3], "collapsed": [2], "error": {"fitted": 0.1, "held_out": 0.5}}
    (directory / "assign" / "report.json").write_text(json.dumps(health))
    return directory


def invoke(*arguments: str) -> str:
    found = CliRunner().invoke(app, ["ids", *arguments])
    if found.exception:
        raise found.exception
    return found.stdout


def test_a_report_says_what_was_measured_and_what_to_change(run: Path) -> None:
    found = json.loads(invoke("report", str(run), "--json"))
    coded = load_coded(run)
    assert found["quality"]["ours"] == json.loads(json.dumps(asdict(id_quality(coded.codes, coded.vectors))))
    advice = " ".join(found["advice"])
    assert "level 2 spreads as if over 30%" in advice
    assert "level 2 collapsed" in advice
    assert "held out are coded worse" in advice
    healthy = {"codes": 4, "perplexity": [0.9], "error": {"fitted": 0.1, "held_out": 0.11}}
    assert advise(healthy, {"sharing": 0, "items": 9}, (2, 4)) == ["no advice"]


def test_published_ids_are_measured_on_our_vectors(run: Path, tmp_path: Path) -> None:
    published = tmp_path / "theirs.json"
    published.write_text(json.dumps({f"i{row}": [f"<a_{row % 3}>", f"<b_{row}>"] for row in range(50)}))
    found = json.loads(invoke("report", str(run), "--json", "--against", str(published)))["quality"]["theirs"]
    assert (found["items"], found["unique"], found["depths"][0]["nodes"]) == (50, 1.0, 3)
    in_order = {str(row): [f"<a_{row % 3}>", f"<b_{row}>"] for row in range(60)}
    for written in (in_order, list(in_order.values())):
        published.write_text(json.dumps(written))
        found = json.loads(invoke("report", str(run), "--json", "--against", str(published)))["quality"]["theirs"]
        coded = load_coded(run)
        expected = id_quality(np.stack([np.arange(60) % 3, np.arange(60)], axis=1), coded.vectors)
        assert found == json.loads(json.dumps(asdict(expected)))
    published.write_text(json.dumps({"nobody": ["a"]}))
    with pytest.raises(TesseraError, match="none of its 1 ids is an item"):
        invoke("report", str(run), "--against", str(published))
    published.write_text("{")
    with pytest.raises(TesseraError, match="expected JSON of item id"):
        invoke("report", str(run), "--against", str(published))


def test_the_page_holds_every_item_escaped(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "pages" / "ids.html"
    invoke("report", str(run), "--html", str(page))
    text = page.read_text(encoding="utf-8")
    assert "&lt;b&gt;dates" in text
    assert "<b>dates" not in text
    assert "<script" not in text
    assert (
        text.count("<details")
        == text.count("</details>")
        == sum(one["nodes"] for one in json.loads(invoke("report", str(run), "--json"))["quality"]["ours"]["depths"])
    )


def test_an_item_is_shown_with_its_path_and_its_nearest(run: Path) -> None:
    found = json.loads(invoke("show", str(run), "i7", "--json"))
    coded = load_coded(run)
    assert found["semantic_id"] == coded.codes[7].tolist()
    assert [step["prefix"] for step in found["path"]] == [coded.codes[7, :1].tolist(), coded.codes[7].tolist()]
    assert found["path"][0]["items"] == int((coded.codes[:, 0] == coded.codes[7, 0]).sum())
    distances = [one["distance"] for one in found["path"][0]["neighbours"]]
    assert distances == sorted(distances)
    assert "i7" not in {one["item"] for step in found["path"] for one in step["neighbours"]}
    assert "i7" in invoke("show", str(run), "i7")
    with pytest.raises(TesseraError, match=r"'i77' is not among the 60 coded items; near ones: i7"):
        invoke("show", str(run), "i77")


def test_a_run_compared_with_itself_is_unchanged(run: Path) -> None:
    found = json.loads(invoke("compare", str(run), str(run), "--json"))
    for one in found.values():
        assert one["unchanged"] == [1.0, 1.0]
        assert one["pairs_kept"] == 1.0
    assert "60 items in both" in invoke("compare", str(run), str(run))


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TesseraError, match="encode is missing; give the --out"):
        invoke("report", str(tmp_path))
