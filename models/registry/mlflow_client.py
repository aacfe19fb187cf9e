"""MLflow's client as the registry uses it: quiet, impatient, and with failures that are errors of ours."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from features.errors import BundleError
from features.fault import explain

_SAID = 300


def open_client(uri: str) -> Any:
    """A client of a tracking address; every call raises BundleError where MLflow, its server or the disk fail."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # Of a run on a server its client prints the address, in front of a command's JSON.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    # Importing MLflow sets its loggers; anything but its errors would drown the progress bars.
    for name in ("mlflow", "mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # The client's defaults leave a command silent for minutes where the server is away.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    with told(uri):
        return _Told(MlflowClient(uri, uri), uri)


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """What MLflow, its database, its server or the disk raise in the body, as an error of ours."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        if getattr(error, "error_code", "") == "RESOURCE_ALREADY_EXISTS":
            raise
        fault = explain(error)
        if fault is not None:
            raise BundleError(f"registry {what}: {fault}") from error
        # The client repeats itself for each file and each try; the first says enough.
        said = " ".join(str(error).split())[:_SAID]
        raise BundleError(f"registry {what}: {said}; see that it answers, and that the disk has room") from error


class _Told:
    """MLflow's client, whose failures are errors of ours."""

    def __init__(self, client: Any, uri: str) -> None:
        self._client = client
        self._uri = uri

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        if not callable(found):
            return found

        def asked(*arguments: Any, **named: Any) -> Any:
            with told(self._uri):
                return found(*arguments, **named)

        return asked
