"""Makes the golden bundles and the answers beside them. Run once for a format; the results are frozen.

    python tests/golden/bundles/make.py NAME ...

`placed` (format 4) has a position path and fields of the request and of the candidates. `corrected` (format 5) has a
correction of new items. `ranges` (format 6) is `corrected` with its rows in two files. `kind` (format 7) has a network
of another kind than the default. `tasks` (format 8) has three tasks, one of them often unknown. `towers`
(format 9) has the two towers of retrieval.
The data are drawn, so no data set stands in the repository.
"""

import io
import json
import random
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import msgspec
import numpy as np
import polars as pl
from rich.console import Console
from safetensors.torch import load_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[2]))

from features.dataset.descriptor import load_dataset  # noqa: E402
from models.bundle.bundle import Bundle, load_bundle, write_manifest  # noqa: E402
from models.table.row_files import ONE_FILE, write_rows  # noqa: E402
from models.towers.towers import Towers, Visits  # noqa: E402
from tessera.pipeline.options import load_options  # noqa: E402
from tessera.pipeline.run import run  # noqa: E402
from tests.build import corrected_bundle  # noqa: E402

EXAMINED = (0.9, 0.5, 0.2)
COLOURS = ("red", "blue", "green")
RUN = """
[split]
by = "time"
[run]
aggregates = "off"
encoder_dim = 8
quantizer = "residual-kmeans"
levels = 2
codes = 4
correct = "off"
placement = "always"
reads = [{reads}]
[run.table]
dim = 4
budget = "8KB"
[run.training]
max_epochs = 2
[run.ranker]
hidden = [8]
cross_layers = 1
cross_rank = 4
content = 4
"""
PLACED = """
name = "placed"
[items]
path = "items.jsonl"
id = "sku"
categorical = ["colour"]
[events]
path = "events.jsonl"
user = "user"
item = "sku"
time = { column = "at" }
label = { column = "clicked" }
[events.placement]
position = "position"
categorical = ["surface"]
[events.request]
device = { type = "category", default = "web" }
[events.candidate]
price_now = { type = "number" }
""" + RUN.format(reads='"id", "metadata"')
CORRECTED = """
name = "corrected"
[items]
path = "items.jsonl"
id = "sku"
text = ["title"]
categorical = ["colour"]
[events]
path = "events.jsonl"
user = "user"
item = "sku"
time = { column = "at" }
label = { column = "clicked" }
""" + RUN.format(reads='"id", "content"')
KIND = (
    CORRECTED.replace('name = "corrected"', 'name = "kind"')
    + """kind = "self-attention"
options = { inner = 4, hidden = [8] }
"""
)
TASKS = (
    CORRECTED.replace('name = "corrected"', 'name = "tasks"').replace(
        'label = { column = "clicked" }',
        """score = "clicked * red ** 0.5 + 0.1 * top"
judge = "clicked"
[events.labels]
top = { column = "position", positive = "<= 1", weight = 0.5 }
clicked = { column = "clicked" }
red = { column = "bought" }
""",
    )
    + """kind = "mmoe"
uncertainty = true
options = { experts = 2, expert = [8, 4], tower = [4] }
"""
)
TOWERS = CORRECTED.replace('name = "corrected"', 'name = "towers"').replace(
    "[run]",
    """[run]
retrieval = "towers"
history_length = 6
towers = { width = 8, blocks = 1, batch = 16, max_epochs = 2 }
""",
)
USERS = ("u0", "u1", "u13", "nobody")
ITEMS = [f"S-{number:02}" for number in range(0, 24, 3)] + ["unknown"]


def write_data(directory: Path) -> None:
    """Writes items and events; even users like red items."""
    draw = random.Random(0)
    items = [
        {"sku": f"S-{n:02}", "title": f"a {COLOURS[n % 3]} cup {n % 5}", "colour": COLOURS[n % 3]} for n in range(24)
    ]
    events = []
    for visit in range(700):
        user, device = draw.randrange(20), draw.choice(["web", "phone", None])
        for position, number in enumerate(draw.sample(range(24), 3)):
            likes = 0.8 if (number % 3 == 0) == (user % 2 == 0) else 0.2
            row = {"user": f"u{user}", "sku": f"S-{number:02}", "at": 1_700_000_000 + 60 * visit, "device": device}
            row |= {"clicked": int(draw.random() < likes * EXAMINED[position]), "position": position + 1}
            # Whether a visit ended with a purchase is unknown for every other visit.
            row |= {"bought": None if visit % 2 else int(row["clicked"] and number % 3 == 0)}
            events.append(row | {"surface": draw.choice(["home", "cart"]), "price_now": draw.choice([1.5, 2.5, None])})
    for name, rows in (("items", items), ("events", events)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def ask(bundle: Bundle) -> dict[str, object]:
    """Returns scores, embeddings and Semantic IDs of a bundle, as JSON holds them."""
    found: dict[str, object] = {"id": bundle.id, "format": bundle.manifest.format}
    found["rank"] = {user: bundle.rank(user, ITEMS).tolist() for user in USERS}
    found["item_id"] = np.asarray(bundle.embed("item_id", ITEMS)).tolist()
    if bundle.schema.placement:
        fields = [{"item_id": item, "price_now": 2.5} for item in ITEMS]
        found["fields"] = bundle.rank("u1", fields, context={"device": "phone", "surface": "home"}).tolist()
        path = bundle.network().placement
        found["path"] = {"constant": float(path.reference), "curves": path.curves()}
    else:
        found["codes"] = bundle.semantic_ids(["a red cup 3", "a green cup 1"]).tolist()
    if bundle.towers is not None:
        found["towers"] = ask_towers(bundle, bundle.towers)
    return found


def ask_towers(bundle: Bundle, towers: Towers) -> dict[str, object]:
    """Returns vectors of items and of users with three visits."""
    rows = bundle.rows()
    vectors = towers.item_vectors(rows.__getitem__, bundle.items[:4])
    users = pl.DataFrame({"user_id": ["u1", "nobody"]})
    visits = Visits(
        vectors[[0, 1, 2, 3]], np.array([0, 60, 90, 60]) * 1_000_000, np.array([3, 1]), np.array([100, 100]) * 1_000_000
    )
    own = towers.user_vectors(rows.__getitem__, users, visits)
    return {"id": towers.id, "items": vectors.tolist(), "users": own.tolist()}


def pack(bundle: Bundle, path: Path) -> None:
    """Writes a bundle as an archive, without times and owners."""
    with tarfile.open(path, "w:xz", preset=9) as archive:
        for file in sorted(bundle.directory.rglob("*")):
            if file.is_file():
                entry = tarfile.TarInfo(str(file.relative_to(bundle.directory)))
                entry.size = file.stat().st_size
                archive.addfile(entry, io.BytesIO(file.read_bytes()))


def in_ranges(bundle: Bundle, destination: Path) -> Bundle:
    """Returns the bundle with its rows in two files."""
    shutil.copytree(bundle.directory, destination)
    rows = load_file(destination / ONE_FILE)
    (destination / ONE_FILE).unlink()
    write_rows(destination, rows["weight"], rows["accumulator"], ranges=2)
    write_manifest(destination, msgspec.structs.replace(bundle.manifest, format=6))
    return load_bundle(destination)


def made(name: str, place: Path) -> Bundle:
    """Trains a bundle below a directory, or changes a frozen one."""
    if name == "ranges":
        with tarfile.open(HERE / "corrected.tar.xz") as archive:
            archive.extractall(place / "corrected", filter="data")
        return in_ranges(load_bundle(place / "corrected"), place / name)
    write_data(place)
    descriptors = {"placed": PLACED, "corrected": CORRECTED, "kind": KIND, "tasks": TASKS, "towers": TOWERS}
    (place / f"{name}.toml").write_text(descriptors[name])
    dataset = load_dataset(place / f"{name}.toml")
    found = run(dataset, place / name, load_options(dataset), console=Console(), registry=None, until="publish")
    assert found.bundle is not None
    return corrected_bundle(found.bundle, place / "bundle") if name == "corrected" else found.bundle


def main(names: list[str]) -> None:
    """Makes the named bundles, and writes archives and answers."""
    path = HERE / "answers.json"
    answers = json.loads(path.read_text(encoding="utf-8"))
    for name in names:
        with tempfile.TemporaryDirectory() as place:
            bundle = made(name, Path(place))
            pack(bundle, HERE / f"{name}.tar.xz")
            answers[name] = ask(load_bundle(bundle.directory))
    path.write_text(json.dumps(answers, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
