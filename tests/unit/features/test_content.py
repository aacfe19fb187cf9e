"""An item's content: a text that carries its fields, the same by file, by message and over HTTP."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import polars as pl
import pytest

from features.content import lsa
from features.content.chain import Chain
from features.content.content import Content, FieldReader, contents, fields_of, joined_fields, refuse_without_fields
from features.content.kinds import check_options, fit_encoder, load_encoder, named_fields
from features.dataset.descriptor import Dataset
from features.dataset.tables import read_items
from features.errors import BundleError, DatasetError
from features.jobs.encode import encode_shard
from features.message import Rows, item_rows
from features.wire.decoder import item_decoder
from serving.api.ingest import Intake

FIELDS = ("title", "tags", "plot")
FILMS: dict[str, list[Any]] = {
    "id": ["1", "2", "3", "4"],
    "title": ["Alien ship", None, "Brazil ship", ""],
    "tags": [["space", "horror"], ["office"], None, []],
    "plot": ["A crew meets horror", "An office of paper", "Paper in an office", None],
}


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    pl.DataFrame(FILMS).write_parquet(tmp_path / "films.parquet")
    described = {
        "name": "films",
        "source": tmp_path / "films.toml",
        "items": {"path": "films.parquet", "id": "id", "text": list(FIELDS)},
        "events": {"path": "e.csv", "item": "i", "label": {"implicit": True}},
        "split": {"by": "order"},
    }
    return Dataset.model_validate(described)


def from_file(dataset: Dataset, fields: tuple[str, ...]) -> list[str]:
    items = read_items(dataset, fields=fields)
    assert items is not None
    return contents(items)


def over_http(dataset: Dataset) -> list[bytes]:
    """Messages that the server appends for the films."""
    sent: list[bytes] = []
    sink = SimpleNamespace(append=lambda topic, pairs: sent.extend(message for _, message in pairs))
    bundle = cast("Any", SimpleNamespace(dataset=dataset, canonical=2))
    Intake(cast("Any", sink)).items(bundle, {}, pl.DataFrame(FILMS).to_dicts())
    return sent


def from_messages(dataset: Dataset, messages: list[bytes], fields: tuple[str, ...]) -> list[str]:
    assert dataset.items is not None
    decode = item_decoder(dataset.items)
    rows = Rows(decode.columns, [decode(message).row for message in messages])
    frame, bad = item_rows(rows, dataset.items, {}, fields=fields)
    assert not bad
    return contents(frame)


@pytest.mark.parametrize("fields", [(), ("title",), ("plot", "tags"), FIELDS])
def test_a_file_a_message_and_a_request_give_the_same_content_and_bits(
    dataset: Dataset, fields: tuple[str, ...]
) -> None:
    batch = from_file(dataset, fields)
    messages = [msgspec.json.encode(row) for row in pl.DataFrame(FILMS).to_dicts()]
    others = (from_messages(dataset, messages, fields), from_messages(dataset, over_http(dataset), fields))
    base = lsa.fit(batch, dim=4, seed=0)
    encoder = FieldReader(base, fields) if fields else base
    for other in others:
        assert other == batch
        assert [getattr(one, "fields", None) for one in other] == [getattr(one, "fields", None) for one in batch]
        assert encoder.encode(other).tobytes() == encoder.encode(batch).tobytes()


def test_all_fields_in_their_order_are_the_text(dataset: Dataset) -> None:
    batch = from_file(dataset, FIELDS)
    assert joined_fields(batch, FIELDS) == batch == from_file(dataset, ())
    assert joined_fields(batch, ("tags",)) == ["space, horror", "office", "", ""]


def test_an_encoder_of_fields_reads_only_them_and_reads_a_plain_text_whole(dataset: Dataset) -> None:
    batch = from_file(dataset, FIELDS)
    encoder = fit_encoder("lsa", batch, dim=4, seed=0, model=None, options={"lsa": {"fields": ["title"]}})
    titles = [title or "" for title in FILMS["title"]]
    alone = lsa.fit(titles, dim=4, seed=0)
    assert fields_of(encoder) == ("title",)
    assert encoder.encode(batch).tobytes() == alone.encode(titles).tobytes()
    assert encoder.encode(["alien ship"]).tobytes() == alone.encode(["alien ship"]).tobytes()
    # An encoder of whole texts takes a content as any text.
    whole = lsa.fit(batch, dim=4, seed=0)
    assert whole.encode(batch).tobytes() == whole.encode([str(text) for text in batch]).tobytes()


def test_a_chain_of_readers_survives_a_save_and_its_id_names_the_fields(dataset: Dataset, tmp_path: Path) -> None:
    batch = from_file(dataset, FIELDS)
    base = lsa.fit(batch, dim=4, seed=0)
    chain = Chain([FieldReader(base, ["title"]), FieldReader(base, ["plot", "title"])])
    assert fields_of(chain) == ("title", "plot")
    (tmp_path / "saved").mkdir()
    chain.save(tmp_path / "saved")
    loaded = load_encoder(tmp_path / "saved")
    assert (loaded.id, fields_of(loaded)) == (chain.id, fields_of(chain))
    assert loaded.encode(batch).tobytes() == chain.encode(batch).tobytes()
    ids = {FieldReader(base, names).id for names in (["title"], ["plot"], ["title", "plot"], ["plot", "title"])}
    assert len({*ids, base.id}) == 5
    path = tmp_path / "saved" / "base-0" / "encoder.json"
    path.write_text(path.read_text().replace('"title"', '"plot"'))
    with pytest.raises(BundleError, match="expected fields-"):
        load_encoder(tmp_path / "saved")


def test_texts_without_the_fields_of_the_encoder_are_refused_by_the_job(dataset: Dataset, tmp_path: Path) -> None:
    batch = from_file(dataset, FIELDS)
    encoder = FieldReader(lsa.fit(batch, dim=4, seed=0), ["title"])
    encoder.save(tmp_path)
    shard = pl.DataFrame({"item_id": ["1"], "text": ["Alien"]})
    with pytest.raises(DatasetError, match="reads the fields title, but the catalogue has texts without fields"):
        encode_shard(shard, encoder=str(tmp_path))
    refuse_without_fields(encoder.base, shard, source="x")
    with pytest.raises(DatasetError, match=r"field 'titel': .* the nearest is 'title'"):
        joined_fields([Content("a", {"title": "a"})], ["titel"])
    with pytest.raises(DatasetError, match=r"field 'titel' of the encoder .* the nearest is 'title'"):
        read_items(dataset, fields=("titel",))


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"static": {"fields": ["title"]}}, "'static' is no part of the encoder 'lsa'"),
        ({"lsa": {"pool": "mean"}}, "lsa: no option 'pool'; .*there are: fields"),
        ({"lsa": {"fields": []}}, "lsa.fields: expected a list of different columns"),
        ({"lsa": {"fields": ["a", "a"]}}, "lsa.fields: expected a list of different columns"),
        ({"lsa": 3}, "lsa: expected a table of options, got 3"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused_by_name(options: Any, fault: str) -> None:
    with pytest.raises(DatasetError, match=fault):
        check_options("lsa", options)


def test_options_of_a_transformer_are_checked_before_it_is_opened() -> None:
    kind = "sentence-transformers"
    check_options(f"lsa+{kind}", {kind: {"pool": "cls", "layer": 4, "chunks": 64, "fields": "title, plot"}})
    assert named_fields({kind: {"fields": "title, plot"}, "lsa": {"fields": ["plot"]}}) == ("title", "plot")
    for own, fault in (
        ({"pool": "sum"}, "pool: expected one of mean, cls, last, max, latent, got 'sum'"),
        ({"layer": -1}, "layer: expected a whole number of 0 or more, got -1"),
        ({"chunks": 0}, "chunks: expected a whole number of 1 or more, got 0"),
        ({"chunks": "many"}, "chunks: expected a whole number of 1 or more, got 'many'"),
    ):
        with pytest.raises(DatasetError, match=f"{kind}.{fault}"):
            check_options(kind, {kind: own})
