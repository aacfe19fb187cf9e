"""The content of an item: its text, with the named fields that the text was joined from.

An encoder takes texts. A content is a text that also carries its fields, so every encoder takes it, and an encoder
that reads certain fields finds them there. A text without fields, such as a query, is read whole.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from features.config import nearest
from features.content.encoder import DESCRIPTION, Encoder, content_id
from features.errors import BundleError, DatasetError

if TYPE_CHECKING:
    from collections.abc import Callable

    import polars as pl

FIELDS = "content_fields"
"""Column of a frame with the fields of each item, a struct of texts. A frame without it holds texts alone."""
KIND = "fields"


class Content(str):
    """Text of an item, with its fields.

    Attributes:
        fields: Text of each field by its name, the column of the catalogue; "" where the item has none.
    """

    fields: Mapping[str, str]

    def __new__(cls, text: str, fields: Mapping[str, str] | None = None) -> Self:
        made = super().__new__(cls, text)
        made.fields = dict(fields or {})
        return made


def contents(frame: "pl.DataFrame") -> list[str]:
    """Returns the content of each row: the column `text`, with the fields if the frame has them.

    Args:
        frame: (N, ...) with `text`, String, and possibly `FIELDS`, Struct of String.
    """
    texts: list[str] = frame["text"].to_list()
    if FIELDS not in frame.columns:
        return texts
    return [Content(text, fields) for text, fields in zip(texts, frame[FIELDS].to_list(), strict=True)]


def text_key(text: str) -> bytes:
    """Returns a hash, 16 bytes, of a text and its fields: all that an encoder reads of an item."""
    fields = text.fields if isinstance(text, Content) else {}
    return hashlib.blake2b(msgspec.msgpack.encode([str(text), dict(fields)]), digest_size=16).digest()


def refuse_without_fields(encoder: Encoder, frame: "pl.DataFrame", *, source: str) -> None:
    """Raises DatasetError if an encoder reads fields that a frame of texts does not have.

    Args:
        encoder: The encoder.
        frame: Texts that are to be encoded.
        source: Name of the frame, for the error.
    """
    names = fields_of(encoder)
    if names and FIELDS not in frame.columns:
        raise DatasetError(
            f"encoder {encoder.id} reads the fields {', '.join(names)}, but {source} has texts without fields; "
            "run its stage `encode` again with this encoder"
        )


def fields_of(encoder: Encoder | None) -> tuple[str, ...]:
    """Returns the names of all fields that an encoder reads; none if it reads the whole text."""
    names: tuple[str, ...] = getattr(encoder, "fields", ())
    return names


class FieldReader:
    """Encoder that gives a base some fields of a content, joined by a line feed; empty fields are left out.

    Args:
        base: Encoder of the joined fields.
        fields: Names of the fields, in order, one at least.

    Raises:
        DatasetError: No field is named, or a field is named twice.
    """

    def __init__(self, base: Encoder, fields: Sequence[str]) -> None:
        if not fields or len(set(fields)) < len(fields):
            raise DatasetError(f"fields: expected different names, one at least, got {', '.join(fields) or 'none'}")
        self.base, self.fields = base, tuple(fields)

    @cached_property
    def id(self) -> str:
        return content_id(KIND, self.base.id.encode(), *(name.encode() for name in self.fields))

    @property
    def dim(self) -> int:
        return self.base.dim

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self.base.encode(joined_fields(texts, self.fields))

    def save(self, directory: Path) -> None:
        (directory / "base").mkdir()
        self.base.save(directory / "base")
        self.describe(directory)

    def describe(self, directory: Path) -> None:
        """Writes the description alone; the base lies in `base` beside it."""
        described: dict[str, Any] = {"kind": KIND, "id": self.id, "fields": self.fields}
        (directory / DESCRIPTION).write_bytes(msgspec.json.encode(described))


def load_reader(directory: Path, load_base: "Callable[[Path], Encoder]") -> FieldReader:
    """Loads an encoder that `FieldReader.save` wrote; `load_base` loads an encoder from its directory."""
    description = msgspec.json.decode((directory / DESCRIPTION).read_bytes())
    found = FieldReader(load_base(directory / "base"), description["fields"])
    if found.id != description["id"]:
        raise BundleError(f"{directory}: holds encoder {found.id}, expected {description['id']}; fetch or fit it again")
    return found


def joined_fields(texts: Sequence[str], fields: Sequence[str]) -> list[str]:
    """Returns the chosen fields of each content, joined by a line feed; a text without fields stays as it is.

    Raises:
        DatasetError: A content has no field of a name.
    """
    found = []
    for text in texts:
        own = text.fields if isinstance(text, Content) else {}
        for name in fields if own else ():
            if name not in own:
                raise DatasetError(
                    f"field {name!r}: the content of an item has no such field; the nearest is "
                    f"{nearest(name, own)!r} (there are: {', '.join(own)})"
                )
        found.append("\n".join(own[name] for name in fields if own[name]) if own else str(text))
    return found
