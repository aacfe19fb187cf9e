"""Locations: paths on disk, and addresses at an object store such as `s3://bucket/events/clicks.parquet`.

fsspec opens an address. Its package for the store (s3fs, gcsfs, adlfs) reads the credentials from the environment, and
no credentials pass through Tessera. Code that may meet an address takes a `Location`. It uses the methods that `Path`
and `Remote` share, and the functions of `features.storage`.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from features.errors import StorageError, TesseraError
from features.storage.patience import TRIES, patience

_LOCAL = ("file", "local")


@dataclass(frozen=True, order=True)
class Remote:
    """Address of a file or folder at a store, with the methods of `Path` that Tessera uses.

    Attributes:
        address: Protocol and path, without a slash at the end.

    Raises:
        TesseraError: The address holds a password or several protocols, or the package of its protocol is not
            installed; names the package.
    """

    address: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "address", self.address.rstrip("/"))
        refuse_password(self.address)
        if "::" in self.address:
            raise TesseraError(f"{self.address}: expected one protocol; unpack the archive, and name its files")
        _check_package(self.protocol, self.address)

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, part: str | Path) -> "Remote":
        return Remote(f"{self.address}/{part}")

    @property
    def protocol(self) -> str:
        """Part before `://`."""
        return self.address.partition("://")[0]

    @property
    def name(self) -> str:
        """Last part of the address."""
        return self.address.rpartition("/")[2]

    @property
    def parent(self) -> "Remote":
        """Folder that holds the file or folder."""
        return Remote(self.address.rpartition("/")[0])

    @contextmanager
    def opened(self, *, bucket: bool = False) -> Iterator[tuple[Any, str]]:
        """Yields fsspec's file system and the path in it.

        Args:
            bucket: True for work that needs no file at the address, so that only the bucket can be missing.

        Raises:
            StorageError: The store failed; names the address, whatever class of error the store's package raised.
            FileNotFoundError: There is no such file.
        """
        from fsspec.config import conf
        from fsspec.core import url_to_fs

        try:
            store, path = url_to_fs(self.address, **patience(self.protocol, conf.get(self.protocol, {})))
            if hasattr(store, "retries"):
                store.retries = min(store.retries, TRIES)
            # Another process may have written since this process listed a folder.
            store.invalidate_cache()
            yield store, path
        except FileNotFoundError as error:
            if bucket or _lacks_bucket(error):
                name = self.address.partition("://")[2].partition("/")[0]
                raise StorageError(
                    f"{self.address}: the store has no bucket {name!r}; make it, or fix the address"
                ) from error
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.address) from None
        except TesseraError:
            raise
        except Exception as error:
            words = (str(error) or type(error).__name__).splitlines()[0]
            raise StorageError(f"{self.address}: the store failed ({words}); {_remedy(error)}") from error

    def below(self, store: Any, path: str) -> "Remote":
        """Returns the address of a path that the store names below this folder."""
        base = store._strip_protocol(self.address).rstrip("/")
        return Remote(self.address + path[len(base) :])

    def exists(self) -> bool:
        """Returns whether the store has the file, or files below the folder."""
        return self._type() is not None

    def is_file(self) -> bool:
        """Returns whether the address is that of a file."""
        return self._type() == "file"

    def is_dir(self) -> bool:
        """Returns whether there are files below the address."""
        return self._type() == "directory"

    def _type(self) -> str | None:
        """Returns `file` or `directory`, or None if there is neither. A store that fails raises StorageError."""
        # fsspec's own questions answer no if a store does not answer.
        with self.opened() as (store, path):
            try:
                found: str = store.info(path)["type"]
            except FileNotFoundError:
                return None
            return found

    def read_bytes(self) -> bytes:
        """Reads the whole file."""
        with self.opened() as (store, path):
            found: bytes = store.cat_file(path)
            return found


Location = Path | Remote
"""File or folder on disk, or at a store."""


def locate(text: str | Path, directory: Path = Path()) -> Location:
    """Returns the location of an address, or of a path relative to a directory."""
    if isinstance(text, Path):
        return directory / text
    protocol, mark, rest = text.partition("://")
    if not mark:
        return directory / text
    return Path(rest) if protocol in _LOCAL else Remote(text)


def absolute(location: Location) -> Location:
    """Returns the location as a process with another working directory must name it."""
    return Path(os.path.abspath(location)) if isinstance(location, Path) else location


def refuse_password(address: str) -> None:
    """Refuses an address with a password, which would stand in descriptors and logs.

    Raises:
        TesseraError: The address holds a password; does not repeat it.
    """
    protocol, _, rest = address.partition("://")
    user, at, _ = rest.partition("/")[0].rpartition("@")
    if at and ":" in user:
        raise TesseraError(
            f"{protocol}://…@{rest.rpartition('@')[2]}: an address must not hold a password; put credentials into "
            "the environment, where the package of the protocol reads them"
        )


def refuse_address(path: Path, remedy: str) -> None:
    """Refuses an address where only a directory of a file system will do; `Path` has shortened its slashes.

    Raises:
        TesseraError: The path was an address.
    """
    protocol, mark, rest = str(path).partition(":/")
    if mark and protocol.isalnum() and len(protocol) > 1:
        raise TesseraError(f"{protocol}://{rest.lstrip('/')}: expected a directory of a file system; {remedy}")


def _lacks_bucket(error: BaseException) -> bool:
    """Returns whether a store says that the bucket is missing, and not a file in it."""
    response = getattr(error.__cause__, "response", None) or {}
    return bool(response.get("Error", {}).get("Code") == "NoSuchBucket")


def _remedy(error: BaseException) -> str:
    words = f"{type(error).__name__} {error}".lower()
    if isinstance(error, TimeoutError) or "timeout" in words or "timed out" in words:
        return "it answers too slowly; check the network and the store, or allow more time by FSSPEC_S3 and the like"
    if "connect" in words:
        return "check the address, the network, and AWS_ENDPOINT_URL if it is set"
    return "check the address, and the credentials in the environment"


def _check_package(protocol: str, address: str) -> None:
    """Refuses a protocol that fsspec does not know, or whose package is not installed."""
    import fsspec
    from fsspec.registry import known_implementations

    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError:
        raise TesseraError(
            f"{address}: protocol {protocol!r} is unknown; use a path, or an address such as s3://, gs:// or abfs://"
        ) from None
    except ImportError as error:
        known = known_implementations[protocol]
        package = known["class"].partition(".")[0]
        remedy = known.get("err", str(error)) if package == "fsspec" else f"pip install {package}"
        raise TesseraError(f"{address}: the package for {protocol}:// is not installed; {remedy}") from error
