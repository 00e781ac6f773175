"""What a benchmark leaves in MLflow: a run with grouped metrics, tags that say what ran where, its data and files."""

import hashlib
import json
import logging
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fvdm.tracking import Tracker, TrackingConfig, tracking_uri

logger = logging.getLogger(__name__)

EXPERIMENT = "benchmarks"


@dataclass(frozen=True)
class Data:
    """A set of clips that went into a number, as MLflow lists it.

    Attributes:
        name: what it is called.
        path: where it lies.
        role: what it was used as, such as real or fake.
        clips: which clips of it were taken; hashed into its digest.
    """

    name: str
    path: str
    role: str
    clips: Sequence[Any] = ()


@dataclass(frozen=True)
class Report:
    """All that a benchmark has found.

    Attributes:
        kind: which benchmark, such as fvd; the tag `kind`, and the folder of its artifacts.
        name: the run's name in MLflow.
        metrics: `(step, {group/name: value})`.
        params: its settings.
        tags: more tags than `machine` gives.
        files: artifacts.
        images: pictures by name, shown as images of the run.
        data: what it was measured on.
    """

    kind: str
    name: str
    metrics: Sequence[tuple[int, Mapping[str, float]]] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[Path] = ()
    images: Mapping[str, Path] = field(default_factory=dict)
    data: Sequence[Data] = ()


def machine() -> dict[str, str]:
    """Tags that say where a number was made; the commit is the Tracker's own."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"host": platform.node(), "gpu": gpu, "torch": torch.__version__}


def send(report: Report, out: Path, *, into: str = "", parent: str = "", tracking: TrackingConfig | None = None) -> str:
    """Report a benchmark as an MLflow run of its own, or into the run of the model that was measured.

    Args:
        report: what was found.
        out: folder of the benchmark, where the journal of this report is kept.
        into: id of a training run that gets it all instead.
        parent: id of the run that this one is a child of.
        tracking: where to; the database of this folder when not given.

    Returns:
        The run's id; empty while the server does not answer (the journal keeps what was not sent).
    """
    tracking = tracking or TrackingConfig(experiment=EXPERIMENT, system_metrics=False)
    tags = {"kind": report.kind} | machine() | dict(report.tags)
    tags |= {"mlflow.parentRunId": parent} if parent else {}
    folder = out / ".tracking" / f"{report.kind}-{time.time_ns()}"
    if into and not _known(into, tracking):
        logger.warning("MLflow has no run %s here: the result gets a run of its own", into)
        into = ""
    tracker = Tracker(folder, tracking, report.name, dict(report.params), tags, into=into)
    for step, values in report.metrics:
        tracker.metrics(dict(values), step)
    for path in report.files:
        tracker.artifact(path, report.kind)
    for name, path in report.images.items():
        tracker.artifact(path, report.kind)
        tracker.image(path, f"{report.kind}/{name}", max((step for step, _ in report.metrics), default=0))
    tracker.close()
    run_id = tracker.run_id or ""
    if run_id and report.data:
        _log_data(report.data, run_id, tracking)
    return run_id


def _known(run_id: str, tracking: TrackingConfig) -> bool:
    """Whether the server has such a run; a server that does not answer is given the benefit of the doubt."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        MlflowClient(tracking_uri(tracking.uri)).get_run(run_id)
    except MlflowException as error:
        return error.error_code != "RESOURCE_DOES_NOT_EXIST"
    except OSError:
        pass
    return True


def _log_data(data: Sequence[Data], run_id: str, tracking: TrackingConfig) -> None:
    """List the data sets as inputs of the run; a server that is away costs this list, not the numbers."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.tracking import MlflowClient

    inputs = [
        DatasetInput(
            Dataset(
                name=entry.name,
                digest=hashlib.sha256(json.dumps([entry.path, entry.clips]).encode()).hexdigest()[:16],
                source_type="local",
                source=json.dumps({"uri": entry.path}),
                profile=json.dumps({"clips": len(entry.clips)}),
            ),
            [InputTag("mlflow.data.context", entry.role)],
        )
        for entry in data
    ]
    try:
        MlflowClient(tracking_uri(tracking.uri)).log_inputs(run_id, inputs)
    except Exception as error:  # As in the Tracker: no server's trouble ends a measurement.
        logger.warning("MLflow did not take the list of data sets: %s", error)


def adopt(children: Sequence[str], parent: str, tracking: TrackingConfig) -> None:
    """Show runs below another in MLflow's list, where they began on their own; they must be of one experiment."""
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient(tracking_uri(tracking.uri))
        for child in children:
            client.set_tag(child, "mlflow.parentRunId", parent)
    except Exception as error:  # As in the Tracker: no server's trouble ends a measurement.
        logger.warning("MLflow did not take the children of the run: %s", error)


def run_of(folder: str) -> str:
    """The MLflow run of a training run's folder; empty where there is none.

    A checkpoint's folder leads to its run's too.
    """
    for place in (Path(folder), Path(folder).parent.parent):
        try:
            return str(json.loads((place / "tracking.json").read_text())["run_id"])
        except (OSError, ValueError, KeyError):
            continue
    return ""
