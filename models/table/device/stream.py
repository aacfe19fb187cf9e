"""Blocks on their way to a device: the next one is read and copied while the device trains on the one before."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.device import Device
from features.device.staging import Staged
from models.table.admission import Admission
from models.table.device.block import DeviceBlock, OnDevice
from models.table.device.columns import Dimensions, hashed, not_admitted, scaled
from models.table.device.packed import PackedBlock, open_packed, unpacked_labels
from models.table.device.source import SourceRows
from models.table.schema import Schema

_Unknown = dict[str, NDArray[np.bool_] | None]


class BlockStream:
    """Packed blocks of one part. A block is packed when it is first asked for.

    Close the stream after use. Blocks must be asked for in the order in which they are taken.

    Args:
        dimensions: Users and items.
        admission: Rule that decides which values read rows.
        directory: Directory of the packed blocks; it is made.
        pack: Function that writes the block of a number into a file.
        device: Device.
    """

    def __init__(
        self,
        dimensions: Dimensions,
        admission: Admission,
        directory: Path,
        pack: Callable[[int, Path], None],
        device: Device,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._dimensions = dimensions
        self._admission = admission
        self._directory = directory
        self._pack = pack
        self._device = device
        self._staging = device.staging()
        self._reader = ThreadPoolExecutor(1)
        self._asked: dict[int, Future[tuple[PackedBlock, Staged, _Unknown]]] = {}

    def ask(self, number: int) -> None:
        """Begins to read a block, in a thread of its own."""
        if number not in self._asked:
            self._asked[number] = self._reader.submit(self._sent, number)

    def take(self, number: int) -> DeviceBlock:
        """Returns a block that was asked for. The device waits for its copy, the calling thread for its file alone.

        Raises:
            DatasetError: The file is damaged.
        """
        self.ask(number)
        packed, staged, unknown = self._asked.pop(number).result()
        return device_block(packed, staged.ready(), unknown, self._dimensions, self._device)

    def close(self) -> None:
        """Stops reading."""
        self._reader.shutdown(cancel_futures=True)

    def _sent(self, number: int) -> tuple[PackedBlock, Staged, _Unknown]:
        path = self._directory / f"{number:05d}.safetensors"
        if not path.exists():
            self._pack(number, path)
        packed = open_packed(path)
        features = self._dimensions.schema.columns("event")
        unknown: _Unknown = dict.fromkeys(features)
        if self._admission.threshold:
            unknown = {name: not_admitted(self._admission, one, packed.prints(name)) for name, one in features.items()}
        return packed, self._staging.put(packed.size, packed.read), unknown


def device_block(
    packed: PackedBlock, held: Tensor, unknown: _Unknown, dimensions: Dimensions, device: Device
) -> DeviceBlock:
    """Returns the examples of a packed block whose bytes lie on a device. Does not wait for the device.

    Args:
        packed: Description of the block.
        held: (size,) uint8 bytes of the file.
        unknown: For each column (m,) True for the distinct values that are not admitted, or None.
        dimensions: Users and items.
        device: Device of the bytes.
    """
    schema, parts, height = dimensions.schema, packed.tensors(held), packed.height
    columns = {
        name: hashed(
            schema,
            feature,
            parts[f"codes.{name}"],
            parts.get(f"lengths.{name}"),
            parts[f"prints.{name}"],
            most=packed.most[name],
            unknown=unknown[name],
        )
        for name, feature in schema.columns("event").items()
    }
    own = [(number, one, columns[one.column]) for number, one in enumerate(schema.features) if one.of == "event"]
    user, item = parts["user"].long(), parts["item"].long()
    visits, history = parts.get("visits"), None
    if visits is not None:
        visits = visits.long()
    if dimensions.past is not None and visits is not None:
        history = _padded(parts["history"].long(), visits, max(schema.history_length, 1))
    found = OnDevice(
        user=user,
        item=item,
        visits=visits if history is not None else None,
        history=history,
        numeric=_numeric(schema, dimensions, parts, {"user": user, "item": item}, visits),
        labels=unpacked_labels(parts["label"]),
        placement=parts.get("placement"),
    )
    return DeviceBlock(dimensions, SourceRows(height, own, device.torch), found, device)


def _padded(values: Tensor, lengths: Tensor, most: int) -> Tensor:
    """Returns lists of values (V,), given list after list with lengths (E,), as (E, most), 0 after the last."""
    size = len(lengths)
    owner = torch.repeat_interleave(torch.arange(size, device=values.device), lengths, output_size=len(values))
    place = torch.arange(len(values), device=values.device) - (lengths.cumsum(0) - lengths)[owner]
    found = values.new_zeros((size, most))
    found[owner, place] = values
    return found


def _numeric(
    schema: Schema, dimensions: Dimensions, parts: dict[str, Tensor], index: dict[str, Tensor], visits: Tensor | None
) -> Tensor:
    """Returns the numeric features (E, n) float32 of a block's examples in the order of the schema."""
    found = []
    for one in schema.numeric:
        if one.of == "event":
            found.append(scaled(parts[f"numeric.{one.column}"], one, logarithm=True))
        elif one.of == "aggregate":
            found.append(scaled(parts[f"aggregate.{one.column}"], one, logarithm=False))
        elif one.of == "history":
            assert visits is not None
            found.append((visits.double().log1p().float() - one.mean) / one.std)
        else:
            found.append(dimensions.numeric[one.name][index[one.of]])
    return torch.stack(found, dim=1) if found else parts["user"].new_zeros((len(parts["user"]), 0)).float()
