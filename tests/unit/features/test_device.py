"""Devices: faults of a card get names, and a description survives its way into a lineage."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from features.device import CPU, DeviceError, label_of, missing_part, named_faults, resolve
from features.device import card as device_card


def raising(error: Exception) -> Callable[[], None]:
    def act() -> None:
        with named_faults():
            raise error

    return act


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), r"no memory left.*row_precision"),
        (RuntimeError("CUDA error: an illegal memory access\nmore"), "the card failed.*illegal.*checkpoint"),
        (torch.AcceleratorError("unspecified launch failure", 719), "the card failed.*checkpoint"),
    ],
)
def test_a_fault_of_a_card_is_named(error: Exception, named: str) -> None:
    with pytest.raises(DeviceError, match=named) as found:
        raising(error)()
    assert "\n" not in str(found.value)


def test_other_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="a bug of ours") as found:
        raising(RuntimeError("a bug of ours"))()
    assert not isinstance(found.value, DeviceError)


def test_the_part_that_a_gpu_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "torch has no CUDA" in str(missing_part())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"torch finds no card.*driver"):
        resolve("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "fbgemm_gpu", None)
    with pytest.raises(DeviceError, match="fbgemm_gpu does not load"):
        resolve("cuda")
    assert missing_part(fused=False) is None
    assert resolve("auto") == CPU


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(DeviceError, match="expected auto, cpu or cuda, got 'tpu'"):
        resolve("tpu")  # type: ignore[arg-type]


def test_a_card_is_named_with_its_driver_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CPU.label == label_of({}) == "cpu"
    card: dict[str, Any] = {"device": "cuda", "card": "H100", "driver": "580.1", "cuda": "13.0", "torch": "2.11"}
    assert label_of(card) == "H100, driver 580.1, cuda 13.0, torch 2.11"
    monkeypatch.setattr(device_card.shutil, "which", lambda name: None)
    assert device_card._driver() == "unknown"


def test_a_processor_stages_without_a_copy_and_runs_a_captured_step_at_once() -> None:
    tensor = torch.arange(3)
    assert CPU.put(tensor) is tensor
    done: list[int] = []
    CPU.captured(lambda: done.append(1))()
    assert done == [1]
