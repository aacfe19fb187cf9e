"""API keys: created here, shown once, kept as hashes, checked at every request.

A key is 256 random bits, so one round of SHA-256 protects it as well as a slow hash would: it cannot be guessed. The
file is read again when it changes, so a removed key ends at once. If the file cannot be read, the keys that were read
before stay valid, and the log names the fault.
"""

import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import msgspec

from features.durable import make_directory, write_file
from features.errors import TesseraError
from features.lock import locked

Scope = Literal["read", "write", "console", "forget", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
_PREFIX = "tsr_"
_CHECK_EVERY_S = 1.0
_WAIT_S = 10.0
_LOGGER = logging.getLogger(__name__)


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Stored form of a key.

    Attributes:
        name: Owner of the key. Shown in logs and metrics.
        sha256: Hash of the key, in hexadecimal.
        scopes: Permissions of the key; `admin` may do everything.
        created: Seconds since 1970.
    """

    name: str
    sha256: str
    scopes: tuple[Scope, ...]
    created: int

    def may(self, scope: Scope) -> bool:
        """Returns whether the key has a scope."""
        return scope in self.scopes or "admin" in self.scopes


class KeyFile:
    """Keys in a file.

    Args:
        path: File of the keys; if it does not exist yet, there are no keys.

    Raises:
        TesseraError: The file is damaged or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._stamp: tuple[int, ...] | None = None
        self._logged = ""
        self._keys: dict[str, Key] = {}
        self._check_at = 0.0
        self._read()

    def keys(self) -> list[Key]:
        """Returns all keys, oldest first; raises TesseraError if the file is damaged or cannot be read."""
        self._read()
        return list(self._keys.values())

    def find(self, secret: str) -> Key | None:
        """Returns the stored key of a secret, or None. If the file is damaged, the keys read before are valid."""
        if time.monotonic() >= self._check_at:
            try:
                self._read()
                self._logged = ""
            except TesseraError as error:
                if str(error) != self._logged:
                    _LOGGER.error("%s; until then the %d keys read before are accepted", error, len(self._keys))
                    self._logged = str(error)
        return self._keys.get(_hashed(secret))

    def add(self, name: str, scopes: Sequence[Scope]) -> str:
        """Creates a key and returns its text, which cannot be read again later.

        Raises:
            TesseraError: The name is taken, or a scope is unknown.
        """
        wrong = [scope for scope in scopes if scope not in SCOPES]
        if wrong or not scopes:
            raise TesseraError(f"scope {', '.join(wrong) or 'missing'}: expected some of {', '.join(SCOPES)}")
        secret = _PREFIX + secrets.token_urlsafe(32)
        make_directory(self.path.parent)
        with locked(self.path, wait_s=_WAIT_S):
            if not name or any(key.name == name for key in self.keys()):
                raise TesseraError(f"key {name!r}: the name is taken, or empty; remove the key, or choose another name")
            self._write([*self._keys.values(), Key(name, _hashed(secret), tuple(scopes), int(time.time()))])
        return secret

    def remove(self, name: str) -> None:
        """Ends a key; raises TesseraError if no key has this name."""
        self._refuse_unknown(name)
        with locked(self.path, wait_s=_WAIT_S):
            self._refuse_unknown(name)
            self._write([key for key in self._keys.values() if key.name != name])

    def _refuse_unknown(self, name: str) -> None:
        known = [key.name for key in self.keys()]
        if name not in known:
            raise TesseraError(f"key {name!r}: no such key; known: {', '.join(known) or 'no keys'}")

    def _write(self, keys: Sequence[Key]) -> None:
        write_file(self.path, msgspec.json.format(msgspec.json.encode(list(keys)), indent=2) + b"\n", mode=0o600)
        self._read()

    def _read(self) -> None:
        with self._lock:
            self._check_at = time.monotonic() + _CHECK_EVERY_S
            try:
                status = self.path.stat()
            except FileNotFoundError:
                self._stamp, self._keys = None, {}
                return
            except OSError as error:
                raise TesseraError(f"{self.path}: cannot be read: {error.strerror}; see its permissions") from error
            stamp = (status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size)
            if stamp == self._stamp:
                return
            try:
                keys = msgspec.json.decode(self.path.read_bytes(), type=list[Key])
            except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
                raise TesseraError(f"{self.path}: {error}; repair the file, or remove it and make new keys") from error
            self._stamp, self._keys = stamp, {key.sha256: key for key in keys}


def _hashed(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()
