"""Calls of MLflow for the registry. The calls log little, give up after seconds, and raise BundleError."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from features.errors import BundleError
from features.fault import explain

_MESSAGE_LENGTH = 300
_PAGE = 100


class Tracking:
    """Client of an MLflow tracking server or database.

    Entities of MLflow (model, version, run) are returned unchanged. Every method raises BundleError if MLflow, its
    server, its database or the disk fails.

    Attributes:
        uri: The tracking address.

    Args:
        uri: Tracking address, `sqlite:///…` for a file.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._client = _open(uri)

    # Models.

    def models(self) -> list[str]:
        """Returns the names of all registered models."""
        return [model.name for model in self._pages(self._client.search_registered_models)]

    def model(self, name: str) -> Any:
        """Returns a registered model with its aliases and tags."""
        with errors_named(self.uri):
            return self._client.get_registered_model(name)

    def create_model(self, name: str) -> None:
        """Registers a model; does nothing if it is registered."""
        from mlflow.exceptions import MlflowException

        with errors_named(self.uri):
            try:
                self._client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise

    def set_model_tag(self, name: str, tag: str, text: str) -> None:
        """Sets a tag of a model."""
        with errors_named(self.uri):
            self._client.set_registered_model_tag(name, tag, text)

    def aliases(self, model: str) -> dict[str, str]:
        """Returns the version of each alias of a model."""
        return {alias: str(version) for alias, version in self.model(model).aliases.items()}

    def set_alias(self, model: str, alias: str, version: str) -> None:
        """Moves an alias of a model to a version."""
        with errors_named(self.uri):
            self._client.set_registered_model_alias(model, alias, version)

    def delete_alias(self, model: str, alias: str) -> None:
        """Deletes an alias of a model."""
        with errors_named(self.uri):
            self._client.delete_registered_model_alias(model, alias)

    # Versions.

    def versions(self, model: str) -> list[Any]:
        """Returns all versions of a model, in no particular order."""
        quote = '"' if "'" in model else "'"
        return self._pages(self._client.search_model_versions, f"name = {quote}{model}{quote}")

    def version(self, model: str, number: str) -> Any:
        """Returns a version of a model."""
        with errors_named(self.uri):
            return self._client.get_model_version(model, number)

    def create_version(self, model: str, *, source: str, run_id: str, tags: Mapping[str, str]) -> Any:
        """Registers artifacts of a run as a new version of a model and returns the version."""
        with errors_named(self.uri):
            return self._client.create_model_version(model, source=source, run_id=run_id, tags=dict(tags))

    def set_version_tag(self, model: str, number: str, tag: str, text: str) -> None:
        """Sets a tag of a version."""
        with errors_named(self.uri):
            self._client.set_model_version_tag(model, number, tag, text)

    def delete_version_tag(self, model: str, number: str, tag: str) -> None:
        """Deletes a tag of a version."""
        with errors_named(self.uri):
            self._client.delete_model_version_tag(model, number, tag)

    def version_uri(self, model: str, number: str) -> str:
        """Returns the address of a version's artifacts."""
        with errors_named(self.uri):
            return str(self._client.get_model_version_download_uri(model, number))

    def fetch(self, uri: str, directory: Path) -> Path:
        """Downloads artifacts into a directory and returns their path."""
        from mlflow.artifacts import download_artifacts

        with errors_named(f"{uri} into {directory}"):
            return Path(download_artifacts(artifact_uri=uri, tracking_uri=self.uri, dst_path=str(directory)))

    # Runs.

    def create_run(self, model: str, *, name: str, tags: Mapping[str, str], location: str | None) -> Any:
        """Creates a run in the MLflow experiment of a model and returns the run.

        Args:
            model: Name of the model. Its MLflow experiment has the same name and is created if it is missing.
            name: Name of the run.
            tags: Tags of the run.
            location: Address of the artifacts of a new MLflow experiment. None: the server decides.
        """
        with errors_named(self.uri):
            experiment = self._client.get_experiment_by_name(model)
            if experiment is not None:
                experiment_id = experiment.experiment_id
            else:
                experiment_id = self._client.create_experiment(model, artifact_location=location)
            return self._client.create_run(str(experiment_id), tags=dict(tags), run_name=name)

    def run(self, run_id: str) -> Any:
        """Returns a run."""
        with errors_named(self.uri):
            return self._client.get_run(run_id)

    def runs(self, model: str) -> list[Any]:
        """Returns all runs of a model."""
        with errors_named(self.uri):
            experiment = self._client.get_experiment_by_name(model)
        return [] if experiment is None else self._pages(self._client.search_runs, [str(experiment.experiment_id)])

    def log(self, run_id: str, *, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Keeps parameters and metrics with a run."""
        with errors_named(self.uri):
            for name, value in params.items():
                self._client.log_param(run_id, name, value)
            for name, metric in metrics.items():
                self._client.log_metric(run_id, name, metric)

    def log_series(self, run_id: str, name: str, values: Sequence[float]) -> None:
        """Keeps the values of a metric with a run, by step from 0."""
        with errors_named(self.uri):
            for step, value in enumerate(values):
                self._client.log_metric(run_id, name, value, step=step)

    def set_run_tag(self, run_id: str, tag: str, text: str) -> None:
        """Sets a tag of a run."""
        with errors_named(self.uri):
            self._client.set_tag(run_id, tag, text)

    def finish(self, run_id: str) -> None:
        """Marks a run as finished."""
        with errors_named(self.uri):
            self._client.set_terminated(run_id)

    # Files of a run.

    def put_directory(self, run_id: str, directory: Path, name: str) -> None:
        """Keeps a directory with a run, under a name."""
        with errors_named(self.uri):
            self._client.log_artifacts(run_id, str(directory), name)

    def put_file(self, run_id: str, file: Path) -> None:
        """Keeps a file with a run, under its own name."""
        with errors_named(self.uri):
            self._client.log_artifact(run_id, str(file))

    def put_json(self, run_id: str, name: str, content: dict[str, Any]) -> None:
        """Keeps a JSON document with a run."""
        with errors_named(self.uri):
            self._client.log_dict(run_id, content, name)

    def put_text(self, run_id: str, name: str, text: str) -> None:
        """Keeps a text with a run."""
        with errors_named(self.uri):
            self._client.log_text(run_id, text, name)

    def files(self, run_id: str, directory: str | None = None) -> set[str]:
        """Returns the names of a run's files, in a directory of the run."""
        with errors_named(self.uri):
            return {file.path for file in self._client.list_artifacts(run_id, directory)}

    def fetch_file(self, run_id: str, name: str, directory: Path) -> Path:
        """Downloads a file of a run into a directory and returns its path."""
        with errors_named(self.uri):
            return Path(self._client.download_artifacts(run_id, name, str(directory)))

    def _pages(self, search: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Returns all results of a search, which MLflow returns in pages."""
        results: list[Any] = []
        token = None
        while True:
            with errors_named(self.uri):
                page = search(*arguments, max_results=_PAGE, page_token=token)
            results += page
            token = page.token
            if not token:
                return results


def _open(uri: str) -> Any:
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # The client prints the address of a run on a server, in front of a command's JSON.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    # The import of MLflow sets the levels of its loggers. Warnings would disturb the progress bars.
    for name in ("mlflow", "mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # With the client's defaults a command is silent for minutes if the server is unavailable.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    with errors_named(uri):
        return MlflowClient(uri, uri)


@contextlib.contextmanager
def errors_named(name: str) -> Iterator[None]:
    """Raises errors of MLflow, its database, its server or the disk in the body as BundleError.

    Args:
        name: Address or task that begins the message.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        fault = explain(error)
        if fault is not None:
            raise BundleError(f"registry {name}: {fault}") from error
        # The client repeats its message for each file and each try. The beginning is enough.
        message = " ".join(str(error).split())[:_MESSAGE_LENGTH]
        raise BundleError(f"registry {name}: {message}; see that it answers, and that the disk has room") from error
