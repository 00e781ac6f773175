"""A trained model as MLflow keeps it: logged to the run that made it, and a version in the registry.

`fvdm.tracking.delivery` sends it; `fvdm.serving.registry` describes it; MLflow executes fvdm/serving/pyfunc.py.
"""

import json
import logging
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvdm.tracking.server import global_uri, refuses

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoggedModel:
    """A trained model, as MLflow keeps it: a folder of weights, and the source file that predicts with them.

    Attributes:
        folder: the weights; must stay on disk until they are sent.
        code: the file; MLflow runs a copy of it, so nothing is pickled.
        name: what the run calls it, such as step-00001000.
        registered: its name in the registry; each model that is reported becomes a version.
        step: training step.
        signature: columns that it takes and tensor that it returns, in MLflow's form.
        example: rows that it takes.
        requirements: packages with their versions, as pip has them.
        metadata: more that is known of it.
    """

    folder: str
    code: str
    name: str
    registered: str
    step: int
    signature: dict[str, list[dict[str, Any]]]
    example: list[dict[str, Any]]
    requirements: list[str]
    metadata: dict[str, Any]

    def event(self) -> dict[str, Any]:
        """The model as an event of a journal."""
        return dict(vars(self))

    @classmethod
    def from_event(cls, event: dict[str, Any]) -> "LoggedModel":
        """The model of an event; version 0.1 called the metadata `about`."""
        values = dict(event)
        if "about" in values:
            values["metadata"] = values.pop("about")
        return cls(**values)


def deliver(client: Any, run_id: str, model: LoggedModel, uploading: threading.Event, uri: str) -> bool:
    """Log and register a model, from wherever an earlier attempt was cut short; what is there is left alone.

    A model that cannot be sent, because its folder is gone or the server refuses it, is skipped with a warning: it does
    not hold up the events that follow.

    Args:
        client: an MlflowClient.
        run_id: the run that made it.
        model: what to send.
        uploading: set while the weights are on their way.
        uri: the client's address.

    Returns:
        Whether it is there now.
    """
    from mlflow.exceptions import MlflowException

    if not Path(model.folder).is_dir():
        logger.warning("the model in %s is gone: it is not logged to MLflow", model.folder)
        return False
    try:
        _register(client, run_id, _log(client, run_id, model, uploading), model.registered, uri)
    except MlflowException as error:
        if not refuses(error):
            raise
        logger.warning(
            "MLflow refuses the model in %s (%s); fix this, and log it with: fvdm register",
            model.folder,
            error,
        )
        return False
    return True


def _log(client: Any, run_id: str, model: LoggedModel, uploading: threading.Event) -> str:
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models([experiment], f"source_run_id = '{run_id}' AND name = '{model.name}'")
    logged = found[0] if found else client.create_logged_model(experiment, model.name, run_id)
    if logged.status != "READY":
        uploading.set()
        try:
            _upload(client, run_id, logged.model_id, model)
        finally:
            uploading.clear()
    return str(logged.model_id)


def _upload(client: Any, run_id: str, model_id: str, model: LoggedModel) -> None:
    from mlflow import models, pyfunc
    from mlflow.entities import LoggedModelOutput
    from pandas import DataFrame

    signature = {key: json.dumps(value) for key, value in model.signature.items()}
    with tempfile.TemporaryDirectory() as folder:
        place = str(Path(folder) / "model")
        pyfunc.save_model(
            place,
            python_model=model.code,
            artifacts={"model": model.folder},
            signature=models.ModelSignature.from_dict(signature),
            input_example=DataFrame(model.example),
            pip_requirements=model.requirements,
            metadata=model.metadata,
            mlflow_model=models.Model(run_id=run_id, model_uuid=model_id, model_id=model_id),
        )
        client.log_model_artifacts(model_id, place)
    client.log_outputs(run_id, [LoggedModelOutput(model_id, model.step)])
    client.finalize_logged_model(model_id, "READY")


def _register(client: Any, run_id: str, model_id: str, name: str, uri: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"models:/{model_id}"
    if all(version.source != source for version in client.search_model_versions(f"name = '{name}'")):
        with global_uri(uri):  # A database's registry looks for the model at the global address.
            client.create_model_version(name, source, run_id, model_id=model_id)
