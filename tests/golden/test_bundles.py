"""Bundles of earlier releases: opened from their frozen bytes, they answer as when they were made.

`tests/golden/bundles/make.py` made them, once for a format.
"""

import importlib.util
import json
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from features.errors import BundleError
from models.bundle.bundle import FORMAT, Bundle, load_bundle

HERE = Path(__file__).parent / "bundles"
ANSWERS: dict[str, dict[str, Any]] = json.loads((HERE / "answers.json").read_text(encoding="utf-8"))
NAMES = sorted(ANSWERS)


def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_bundles", HERE / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def opened(name: str, place: Path) -> Bundle:
    with tarfile.open(HERE / f"{name}.tar.xz") as archive:
        archive.extractall(place / name, filter="data")
    return load_bundle(place / name)


@pytest.mark.parametrize("name", NAMES)
def test_a_bundle_answers_as_when_it_was_made(name: str, tmp_path: Path) -> None:
    same(maker().ask(opened(name, tmp_path)), ANSWERS[name], name)


def test_the_newest_format_is_among_them(tmp_path: Path) -> None:
    formats = {name: opened(name, tmp_path).manifest.format for name in NAMES}
    assert max(formats.values()) == FORMAT
    assert {name: answers["format"] for name, answers in ANSWERS.items()} == formats
    assert ANSWERS["placed"]["path"]["constant"] != 0
    assert any(row["column"] == "surface" for row in ANSWERS["placed"]["path"]["curves"])


def test_rows_in_files_of_ranges_answer_as_rows_in_one_file() -> None:
    one, ranges = ({**ANSWERS[name], "format": 0, "id": ""} for name in ("corrected", "ranges"))
    assert one == ranges


def test_a_changed_byte_is_refused(tmp_path: Path) -> None:
    opened("placed", tmp_path)
    network = tmp_path / "placed" / "network.safetensors"
    network.write_bytes(network.read_bytes()[:-1] + b"\1")
    with pytest.raises(BundleError, match=r"network.safetensors .*was altered"):
        load_bundle(tmp_path / "placed")


def same(found: Any, expected: Any, place: str) -> None:
    """Equal, but for the order in which another processor adds float32 numbers."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key, value in expected.items():
            same(found[key], value, f"{place}/{key}")
    elif isinstance(expected, list) and expected and isinstance(expected[0], float | list):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5, err_msg=place)
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            same(one, other, f"{place}/{number}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=2e-5, abs=2e-5), place
    else:
        assert found == expected, place
