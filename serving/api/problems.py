"""Errors as RFC 9457 problem documents: fault, field, remedy."""

import contextlib
import logging
from collections.abc import Iterator

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from features.errors import AnswerError, BundleError, EventError, LogError, StoreError, TesseraError
from serving.api.bodies import Problem
from serving.api.refusal import PROBLEM

# Characters of a field's name beside letters and digits.
_JOINTS = str.maketrans("", "", "._- ")
_A_VALUE = "expected text of at most 1,024 characters, a finite number, a truth value, or a list of them"
_log = logging.getLogger(__name__)


def problem(status: int, title: str, detail: str, *, field: str | None = None) -> JSONResponse:
    """Returns an RFC 9457 problem document; `field` names what is at fault."""
    document = Problem(title=title, status=status, detail=detail, field=field)
    headers = {"retry-after": "1"} if status == 503 else None
    return JSONResponse(document.model_dump(exclude_none=True), status_code=status, media_type=PROBLEM, headers=headers)


def _named(parts: list[str]) -> list[str]:
    """Returns the path of a field, without the types that its value could have had."""
    if parts[:1] == ["context"]:
        return parts[:2]
    # A candidate is an id, or an object with fields.
    return [*parts[:2], *parts[3:4]] if parts[:1] == ["candidates"] and len(parts) > 2 else parts


@contextlib.contextmanager
def blamed(name: str) -> Iterator[None]:
    """Blames a field for faulty input inside the body, unless the message begins with another field's name."""
    try:
        yield
    except EventError as error:
        first, colon, _ = str(error).partition(":")
        named = first if colon and first.translate(_JOINTS).isalnum() else name
        raise _WrongInput(named, str(error)) from error


class _WrongInput(TesseraError):
    def __init__(self, field: str, detail: str) -> None:
        super().__init__(detail)
        self.field = field


def add_problem_handlers(app: FastAPI) -> None:
    """Makes an app answer every error with a problem document."""

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        parts = [str(part) for part in first["loc"] if part != "body"]
        field = ".".join(_named(parts)) or "body"
        if first["type"] == "json_invalid":
            field = "body"
        # The first type of several says little about the value.
        message = _A_VALUE if parts[:1] == ["context"] and len(parts) > 2 else first["msg"]
        return problem(422, "Wrong input", f"{field}: {message}", field=field)

    @app.exception_handler(_WrongInput)
    def wrong(_: Request, error: _WrongInput) -> JSONResponse:
        return problem(422, "Wrong input", str(error), field=error.field)

    @app.exception_handler(HTTPException)
    def refused(_: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, "Refused", str(error.detail))

    @app.exception_handler(StoreError)
    def unavailable(_: Request, error: StoreError) -> JSONResponse:
        return problem(503, "Online store unavailable", str(error))

    @app.exception_handler(AnswerError)
    def no_answer(_: Request, error: AnswerError) -> JSONResponse:
        return problem(503, "No ranking", str(error))

    @app.exception_handler(LogError)
    def no_log(_: Request, error: LogError) -> JSONResponse:
        return problem(503, "Event log unavailable", str(error))

    @app.exception_handler(BundleError)
    def disagrees(_: Request, error: BundleError) -> JSONResponse:
        return problem(503, "Store and bundle disagree", str(error))

    @app.exception_handler(Exception)
    def failed(request: Request, error: Exception) -> JSONResponse:
        _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return problem(500, "Internal error", "the request failed; the server's log has the cause")
