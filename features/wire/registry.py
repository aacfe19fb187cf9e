"""Client of a schema registry, by its REST API: Confluent's, and those of Karapace, Apicurio and Redpanda."""

import base64
import json
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from features.errors import RegistryError, TesseraError

_TIMEOUT_S = 5.0
_MOST_BYTES = 4 << 20
_JSON = "application/vnd.schemaregistry.v1+json"


@dataclass(frozen=True)
class RegisteredSchema:
    """Schema of a registry.

    Attributes:
        kind: `AVRO`, `PROTOBUF` or `JSON`, or another kind that this release does not read.
        text: The schema: JSON of Avro, the text of a .proto file, or a JSON schema.
        references: Name and text of each schema that this schema uses, those that are used first.
    """

    kind: str
    text: str
    references: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class SchemaRegistry:
    """Reads and registers schemas.

    Attributes:
        address: `http://…` or `https://…`, with or without a path.
        user, password: Basic authentication. Empty: none.
    """

    address: str
    user: str = ""
    password: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise TesseraError(f"TESSERA_SCHEMA_REGISTRY={self.address}: expected http://HOST:PORT or https://HOST")
        if parts.username or parts.password:
            raise TesseraError(
                "TESSERA_SCHEMA_REGISTRY holds a user or a password; set TESSERA_SCHEMA_REGISTRY_USER and "
                "TESSERA_SCHEMA_REGISTRY_PASSWORD instead"
            )

    def schema(self, number: int) -> RegisteredSchema | None:
        """Returns the schema of an id, or None if the registry has no such id.

        Raises:
            RegistryError: The registry does not answer, or refuses.
        """
        found = self._ask(f"/schemas/ids/{number}")
        if found is None:
            return None
        references: dict[str, str] = {}
        self._resolve(found, references)
        return RegisteredSchema(str(found.get("schemaType", "AVRO")), str(found["schema"]), tuple(references.items()))

    def register(self, subject: str, schema: RegisteredSchema) -> int:
        """Registers a schema under a subject and returns its id. A schema that is registered keeps its id.

        Raises:
            RegistryError: The registry does not answer, or refuses the schema.
        """
        body = {"schema": schema.text, "schemaType": schema.kind}
        found = self._ask(f"/subjects/{urllib.parse.quote(subject, safe='')}/versions", body)
        if found is None or not isinstance(found.get("id"), int):
            raise self._error(f"gave no id for subject {subject!r}")
        return int(found["id"])

    def _resolve(self, found: dict[str, Any], known: dict[str, str]) -> None:
        for reference in found.get("references") or ():
            name, subject = str(reference["name"]), urllib.parse.quote(str(reference["subject"]), safe="")
            if name in known:
                continue
            used = self._ask(f"/subjects/{subject}/versions/{reference['version']}")
            if used is None:
                raise self._error(f"has no schema of the reference {name!r}")
            self._resolve(used, known)
            known[name] = str(used["schema"])

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """Returns the answer of the registry, None if there is no such thing."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.address.rstrip("/") + path, data, {"Accept": _JSON, "Content-Type": _JSON}
        )
        if self.user or self.password:
            token = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
            # A redirect to another host does not get the password.
            request.add_unredirected_header("Authorization", f"Basic {token}")
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
                found = json.loads(answer.read(_MOST_BYTES))
        except urllib.error.HTTPError as error:
            with error:
                text = error.read(2_000).decode(errors="replace").strip()
            if error.code == 404 and body is None and _is_unknown(text):
                return None
            remedy = "; set TESSERA_SCHEMA_REGISTRY_USER and _PASSWORD" if error.code in (401, 403) else ""
            raise self._error(f"answers {error.code} to {path}: {text}{remedy}") from error
        except (OSError, ValueError) as error:
            raise self._error(f"does not answer {path}: {error}; start it, or fix the address") from error
        if not isinstance(found, dict) or ("schema" not in found and body is None):
            raise self._error(f"answers {path} with no schema; is the address that of a registry?")
        return found

    def _error(self, problem: str) -> RegistryError:
        return RegistryError(f"schema registry {self.address} {problem}")


def _is_unknown(text: str) -> bool:
    """Returns whether a 404 is the registry's own, which has a code, and not of another server at the address."""
    try:
        return int(json.loads(text)["error_code"]) in (40401, 40402, 40403)
    except (ValueError, KeyError, TypeError):
        return False
