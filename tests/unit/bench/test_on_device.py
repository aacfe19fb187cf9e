"""The option `--device` of benchmarks: refused where it means nothing, and a missing card is named first."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from features.device import DeviceError
from features.errors import TesseraError
from tessera.cli.main import app


def failure(name: str, device: str, out: Path) -> BaseException | None:
    return CliRunner().invoke(app, ["bench", name, "--device", device, "--out", str(out)]).exception


def test_a_benchmark_without_a_device_refuses_the_option(tmp_path: Path) -> None:
    found = failure("resize", "cpu", tmp_path)
    assert isinstance(found, TesseraError)
    assert "--device is for training-speed, encoders, semantic-ids, not for resize" in str(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a card")
@pytest.mark.parametrize("name", ["training-speed", "semantic-ids", "encoders"])
def test_a_missing_card_is_named_before_anything_is_measured(name: str, tmp_path: Path) -> None:
    found = failure(name, "cuda", tmp_path)
    assert isinstance(found, DeviceError)
    assert 'device = "cuda"' in str(found)
    assert not list(tmp_path.rglob("*rows.jsonl"))
