"""Reads the bytes of a text file and prepares them for a csv or JSON lines reader.

A file that is not text is refused with the name of its format and the command that converts it: another compression,
a workbook, UTF-16, a pointer or a web page in place of the data. Gzip, a byte order mark and CR line ends are read.
"""

import gzip
import re
import zlib
from pathlib import Path

from features.errors import DatasetError

_GZIP = b"\x1f\x8b"
_UTF8_MARK = b"\xef\xbb\xbf"
_AS_PARQUET = 'set format = "parquet"'
_CONVERT = "export it as csv, JSON lines or parquet"

# First bytes → name of the format and remedy. If one mark begins with another, the longer comes first.
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive", "unpack it (unzip); only gzip is read as it is"),
    (b"PK\x05\x06", "an empty zip archive", "point path at the data"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it (zstd -d); only gzip is read as it is"),
    (b"BZh", "compressed with bzip2", "unpack it (bunzip2); only gzip is read as it is"),
    (b"\xfd7zXZ\x00", "compressed with xz", "unpack it (unxz); only gzip is read as it is"),
    (b"\x04\x22\x4d\x18", "compressed with lz4", "unpack it (lz4 -d); only gzip is read as it is"),
    (b"\xff\x06\x00\x00sNaPpY", "compressed with snappy", "unpack it; only gzip is read as it is"),
    (b"\x1f\x9d", "compressed with compress", "unpack it (uncompress); only gzip is read as it is"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it (7z x); only gzip is read as it is"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it (unrar x); only gzip is read as it is"),
    (b"\xff\xfe\x00\x00", "UTF-32", "save it as UTF-8 (iconv -f UTF-32 -t UTF-8)"),
    (b"\x00\x00\xfe\xff", "UTF-32", "save it as UTF-8 (iconv -f UTF-32 -t UTF-8)"),
    (b"\xff\xfe", "UTF-16", "save it as UTF-8 (iconv -f UTF-16 -t UTF-8; in Excel: CSV UTF-8)"),
    (b"\xfe\xff", "UTF-16", "save it as UTF-8 (iconv -f UTF-16 -t UTF-8; in Excel: CSV UTF-8)"),
    (b"PAR1", "a parquet file", _AS_PARQUET),
    (b"ARROW1", "an Arrow (feather) file", _CONVERT),
    (b"Obj\x01", "an Avro file", _CONVERT),
    (b"ORC", "an ORC file", _CONVERT),
    (b"\x89HDF\r\n", "an HDF5 file", _CONVERT),
    (b"\x93NUMPY", "a NumPy array", _CONVERT),
    (b"SQLite format 3\x00", "an SQLite database", _CONVERT),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Excel 97 workbook", "save it as CSV UTF-8"),
    (b"%PDF-", "a PDF", "point path at the data"),
    (b"version https://git-lfs.github.com/", "a Git LFS pointer, not the data", "fetch the data (git lfs pull)"),
)
_PAGES = (b"<!doctype html", b"<html", b"<?xml")


def read_plain(file: Path, where: str, *, latin_1: bool = False) -> bytes:
    """Returns the text of a file, unzipped, without byte order mark and trailing blank lines.

    Line ends are LF or CRLF. The bytes are UTF-8 if the file is UTF-8. Readers find the row of a byte that is not.

    Args:
        file: Existing file.
        where: First words of each error, e.g. "FILE: [items]".
        latin_1: True if the file is declared to be Latin-1.

    Raises:
        DatasetError: The file is empty, is cut short, or is not a readable text file.
    """
    try:
        data = file.read_bytes()
        while data.startswith(_GZIP):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{where} cannot be read ({error}); check the file") from error
    _refuse_other_formats(data, where)
    data = data.removeprefix(_UTF8_MARK).rstrip(b"\r\n")
    if not data:
        raise DatasetError(f"{where} is empty; point path at a file with data")
    if b"\n" not in data and b"\r" in data:
        data = data.replace(b"\r", b"\n")
    return data.decode("latin-1").encode() if latin_1 else data


def read_text(file: Path) -> str:
    """Returns the text of a small file that a person wrote, such as a descriptor, without byte order mark.

    Raises:
        OSError: The file cannot be read.
        DatasetError: The file is not UTF-8; names its format and the remedy.
    """
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        _refuse_other_formats(data, f"{file}")
        line = data.count(b"\n", 0, error.start) + 1
        raise DatasetError(
            f"{file}: line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from error


def _refuse_other_formats(data: bytes, where: str) -> None:
    if data.startswith(b"PK\x03\x04") and (b"[Content_Types].xml" in data[:4096] or b"xl/" in data[:4096]):
        raise DatasetError(f"{where} is an Excel workbook; save it as CSV UTF-8")
    for mark, name, remedy in _SIGNATURES:
        # A mark that consists of letters may also be the first word of a text.
        if data.startswith(mark) and (not mark.isalnum() or re.search(rb"[^\t\r\n -~]", data[:32])):
            raise DatasetError(f"{where} is {name}; {remedy}")
    if data[257:262] == b"ustar":
        raise DatasetError(f"{where} is a tar archive; unpack it (tar xf)")
    if data[:256].lstrip().lower().startswith(_PAGES):
        raise DatasetError(f"{where} is a web page or XML, not the data; fetch the data again")
    if (order := _utf_16_order(data[:4096])) is not None:
        raise DatasetError(f"{where} is UTF-16 without a byte order mark; save it as UTF-8 (iconv -f {order} -t UTF-8)")


def _utf_16_order(start: bytes) -> str | None:
    """Names the byte order of UTF-16 text: every other byte of mostly ASCII text is NUL there."""
    even, odd = start[0::2], start[1::2]
    for name, zeros, others in (("UTF-16LE", odd, even), ("UTF-16BE", even, odd)):
        if len(zeros) >= 4 and zeros.count(0) > 0.7 * len(zeros) and others.count(0) < 0.1 * len(others):
            return name
    return None
