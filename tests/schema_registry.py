"""A schema registry on this machine that keeps schemas in memory and speaks Confluent's REST API."""

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from features.wire.registry import SchemaRegistry


class StubRegistry:
    """State of the registry.

    Attributes:
        address: Where it listens.
        schemas: Registered bodies by id.
        paths: Paths that were asked for.
        password: Password of the user `team`. None: no authentication.
        broken: True answers every request with 503.
    """

    def __init__(self) -> None:
        self.schemas: dict[int, dict[str, Any]] = {}
        self.subjects: dict[str, list[int]] = {}
        self.paths: list[str] = []
        self.password: str | None = None
        self.broken = False
        self.address = ""

    @property
    def client(self) -> SchemaRegistry:
        return SchemaRegistry(self.address, "team" if self.password else "", self.password or "")

    def register(self, subject: str, body: dict[str, Any]) -> int:
        number = next((n for n, known in self.schemas.items() if known == body), len(self.schemas) + 1)
        self.schemas[number] = body
        versions = self.subjects.setdefault(subject, [])
        if number not in versions:
            versions.append(number)
        return number

    def answer(self, path: str, body: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
        parts = path.strip("/").split("/")
        if body is not None:
            return 200, {"id": self.register(parts[1], body)}
        if parts[:2] == ["schemas", "ids"] and int(parts[2]) in self.schemas:
            return 200, self.schemas[int(parts[2])]
        if parts[0] == "subjects" and len(self.subjects.get(parts[1], [])) >= int(parts[3]):
            number = self.subjects[parts[1]][int(parts[3]) - 1]
            return 200, self.schemas[number] | {"id": number, "subject": parts[1], "version": int(parts[3])}
        return 404, {"error_code": 40403, "message": "Schema not found"}


@contextlib.contextmanager
def schema_registry() -> Iterator[StubRegistry]:
    """Runs a registry while the body runs."""
    state = StubRegistry()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(None)

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body: dict[str, Any] | None) -> None:
            state.paths.append(self.path)
            wanted = base64.b64encode(f"team:{state.password}".encode()).decode()
            if state.broken:
                code, answer = 503, {"error_code": 50301, "message": "no leader"}
            elif state.password and self.headers.get("Authorization") != f"Basic {wanted}":
                code, answer = 401, {"error_code": 401, "message": "Unauthorized"}
            else:
                code, answer = state.answer(self.path, body)
            data = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
