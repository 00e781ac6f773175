"""Clients of MLflow, and what its errors mean."""

import contextlib
import logging
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fvdm.files import atomic_write, lock
from fvdm.tracking.config import SQLITE, check_uri, database_file, is_server, tracking_uri

logger = logging.getLogger(__name__)

BUSY = (401, 403, 408, 429)  # answers of a server that may take the same request later
PROBE = 5.0  # seconds that a server has to say who it is
_global_uri = threading.Lock()
_import = threading.Lock()


def prepare() -> None:
    """Import mlflow, with the settings of a run that must not wait for a server; the user's own settings count."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    with _import:  # Two threads that import it at once would each find the other's half.
        import mlflow.system_metrics.system_metrics_monitor
        import mlflow.tracking  # noqa: F401
    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # One outage is one warning, and that is ours.


def open_client(uri: str) -> Any:
    """A client. A database is made by one process alone, under another name: two at once, or a kill, would spoil it."""
    from mlflow.tracking import MlflowClient

    database = database_file(uri)
    if database is None:
        return MlflowClient(uri)
    with lock(database.with_name(f".{database.name}.lock")):
        if not database.exists():
            with atomic_write(database) as temporary:
                MlflowClient(f"{SQLITE}{temporary}")
        return MlflowClient(uri)


@contextlib.contextmanager
def global_uri(uri: str) -> Iterator[None]:
    """Point mlflow's own calls, some of which ignore the client's address, at `uri` while the block runs."""
    from mlflow.tracking._tracking_service.utils import _use_tracking_uri

    before = os.environ.get("MLFLOW_TRACKING_URI")
    with _global_uri:
        try:
            with _use_tracking_uri(uri):
                yield
        finally:
            if before is None:
                os.environ.pop("MLFLOW_TRACKING_URI", None)
            else:
                os.environ["MLFLOW_TRACKING_URI"] = before


def check(uri: str = "") -> None:
    """Find, before a run begins, a tracking address that can never work. A server that is away is not an error.

    Args:
        uri: as in `TrackingConfig`; empty takes what applies.

    Raises:
        ValueError: see `check_uri`; or something else than MLflow answers at the address.
    """
    uri = tracking_uri(uri)
    check_uri(uri)
    if is_server(uri):
        try:
            with urllib.request.urlopen(f"{uri.rstrip('/')}/version", timeout=PROBE) as response:
                found = response.read(100).strip()
            if not found[:1].isdigit():
                raise ValueError(f"the tracking address {uri} cannot be used: what answers there is not MLflow")
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise ValueError(f"the tracking address {uri} cannot be used: what answers is not MLflow") from None
        except OSError:
            return  # The run continues without a server, and says so.


def refuses(error: Exception) -> bool:
    """Whether an error means that the server, or mlflow itself, will never take what was sent."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        status = int(error.get_http_status_code())
        return 400 <= status < 500 and status not in BUSY
    return isinstance(error, TypeError | KeyError | AttributeError)


def does_not_exist(error: Exception) -> bool:
    """Whether an error means that there is no such run or experiment."""
    return getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST"


class ExperimentDeletedError(Exception):
    """The experiment was deleted on the server; nothing can be sent until it is restored."""


def find_experiment(client: Any, name: str, uri: str) -> str:
    """The id of an experiment, which is made if there is none.

    Raises:
        ExperimentDeletedError: if it was deleted; says how to restore it.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        # A relative artifact folder would move with whoever opens the database.
        place = Path("mlartifacts").resolve().as_uri() if database_file(uri) else None
        tags = {"mlflow.experimentKind": "custom_model_development", "mlflow.note.content": experiment_note(name)}
        try:
            return str(client.create_experiment(name, artifact_location=place, tags=tags))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # Another run made it meanwhile.
    if found.lifecycle_stage == "deleted":
        raise ExperimentDeletedError(experiment_deleted(name, found.experiment_id, uri))
    for key, value in (
        ("mlflow.experimentKind", "custom_model_development"),
        ("mlflow.note.content", experiment_note(name)),
    ):
        if key not in found.tags:
            client.set_experiment_tag(found.experiment_id, key, value)
    return str(found.experiment_id)


def experiment_deleted(name: str, experiment_id: str, uri: str) -> str:
    """What to do about an experiment that was deleted."""
    return (
        f"the experiment {name} was deleted; restore it with: MLFLOW_TRACKING_URI={uri} mlflow experiments restore "
        f"--experiment-id {experiment_id}"
    )


def experiment_note(name: str) -> str:
    """The description of an experiment that this project makes."""
    return (
        f"**{name}**: video diffusion transformers with one timestep per frame (FVDM). A run's *Overview* says what "
        "was trained or measured and what to type next; *Model metrics* has its curves and previews; runs of one study "
        "stand under their parent. Select several runs and press *Compare* to see them side by side."
    )


def newest_experiment(client: Any) -> str:
    """The id of the experiment with the newest run; empty where there are no runs."""
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(ids, max_results=1, order_by=["attributes.start_time DESC"]) if ids else []
    return str(runs[0].info.experiment_id) if runs else ""
