"""A trained model as MLflow keeps it: logged to the run that made it, and a version in the registry.

`fvdm.tracking.tracker` sends it; `fvdm.serving.registry` says what it is; fvdm/serving/pyfunc.py is what MLflow runs.
"""

import json
import logging
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

BUSY = (408, 429)  # answers of a server that will take it later


@dataclass(frozen=True)
class Model:
    """A trained model, as MLflow keeps it: a folder of weights, and the source file that answers with them.

    Attributes:
        folder: the weights; must stay on disk until they are sent.
        code: the file; MLflow runs a copy of it, so nothing is pickled.
        name: what the run calls it, such as step-00001000.
        registered: its name in the registry; each model that is reported becomes a version.
        step: training step.
        signature: columns that it takes and tensor that it returns, in MLflow's form.
        example: rows that it takes.
        requirements: packages with their versions, as pip has them.
        about: more that is known of it.
    """

    folder: str
    code: str
    name: str
    registered: str
    step: int
    signature: dict[str, list[dict[str, Any]]]
    example: list[dict[str, Any]]
    requirements: list[str]
    about: dict[str, Any]


def deliver(client: Any, run_id: str, model: Model, uploading: threading.Event) -> bool:
    """Log and register a model, from wherever an earlier try was cut short; what is there is left alone.

    A model that cannot be sent, because its folder is gone or the server refuses it, is told of and passed over: it
    holds up nothing that comes after it.

    Args:
        client: an MlflowClient.
        run_id: the run that made it.
        model: what to send.
        uploading: set while the weights are on their way.

    Returns:
        Whether it is there now.
    """
    from mlflow.exceptions import MlflowException

    if not Path(model.folder).is_dir():
        logger.warning("the model in %s is gone: it is not logged to MLflow", model.folder)
        return False
    try:
        _register(client, run_id, _log(client, run_id, model, uploading), model.registered)
    except MlflowException as error:
        if not 400 <= error.get_http_status_code() < 500 or error.get_http_status_code() in BUSY:
            raise
        logger.warning(
            "MLflow refuses the model in %s (%s); mend it, and log it with fvdm register",
            model.folder,
            error,
        )
        return False
    return True


def _log(client: Any, run_id: str, model: Model, uploading: threading.Event) -> str:
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


def _upload(client: Any, run_id: str, model_id: str, model: Model) -> None:
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
            metadata=model.about,
            mlflow_model=models.Model(run_id=run_id, model_uuid=model_id, model_id=model_id),
        )
        client.log_model_artifacts(model_id, place)
    client.log_outputs(run_id, [LoggedModelOutput(model_id, model.step)])
    client.finalize_logged_model(model_id, "READY")


def _register(client: Any, run_id: str, model_id: str, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"models:/{model_id}"
    if all(version.source != source for version in client.search_model_versions(f"name = '{name}'")):
        client.create_model_version(name, source, run_id, model_id=model_id)
