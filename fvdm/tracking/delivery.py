"""Sends a journal to MLflow: finds or makes the run, and delivers event after event.

An event that the server refuses is skipped, with one warning, and kept in `refused.jsonl`. Every other error is raised:
the sender tries again later.
"""

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fvdm.tracking import description, pages
from fvdm.tracking.journal import ENDS, Journal
from fvdm.tracking.logged_model import LoggedModel, deliver
from fvdm.tracking.server import (
    ExperimentDeletedError,
    does_not_exist,
    experiment_deleted,
    find_experiment,
    open_client,
    refuses,
)

logger = logging.getLogger(__name__)

# MLflow sorts the sections of charts by the first part of a metric's name. A training run shows these groups under
# names whose order tells the story: loss, loss_validation, metrics, previews, samples, speed, training. The journal
# keeps the names that the code gives, and so does MLflow in a run that version 0.1 began.
SECTIONS = {
    "validation/": "loss_validation/",
    "fvd/": "metrics/fvd_",
    "kvd/": "metrics/kvd_",
    "fvd_floor/": "metrics/fvd_floor_",
    "generate/": "samples/",
    "optim/": "training/",
    "progress/": "training/",
    "checkpoint/": "training/checkpoint_",
}
SECTIONS_TAG = "fvdm.sections"
ATTEMPTS = 5  # of an event that fails while the server takes others


def shown_name(name: str) -> str:
    """The name under which MLflow shows a metric or a series of images of a training run."""
    for prefix, section in SECTIONS.items():
        if name.startswith(prefix):
            return section + name.removeprefix(prefix)
    return name


class Sender:
    """Sends one journal to its run; `send` continues where it stopped."""

    def __init__(self, journal: Journal, start: dict[str, Any], uri: str) -> None:
        """Prepare to send.

        Args:
            journal: of the run.
            start: what the run is made with if it does not exist: `name`, `experiment`, `params`, `tags`,
                `description`, and `run_id`, an existing run to report into, or empty.
            uri: address of the server or database.
        """
        self.journal, self.start, self.uri = journal, start, uri
        self.uploading = threading.Event()
        self.refused_model = False
        self._named: Callable[[str], str] = str
        self._checked = False
        self._warned = False
        self._failed: tuple[int, int] = (-1, 0)  # position of the batch that failed last, and how often it did

    def send(self) -> None:
        """Send all that the journal holds.

        Raises:
            Exception: whatever the server, the network or the disk raises; call again later.
        """
        client = open_client(self.uri)
        position = self._run(client)
        for events, end in self.journal.batches(position["sent"]):
            try:
                self._deliver(client, position, events)
            except Exception as error:
                if self._is_gone(client, position["run_id"]):
                    self._checked = False
                    self.send()  # to another run
                    return
                if not self._give_up(client, position, error):
                    raise
                for event in events:
                    self._deliver_or_skip(client, position, event)
            position["sent"] = end
            self.journal.save_position(position)

    def _give_up(self, client: Any, position: dict[str, Any], error: Exception) -> bool:
        """Whether a batch failed because of what is in it, and not because the server is away."""
        if refuses(error):
            return True
        before, count = self._failed
        self._failed = (position["sent"], count + 1 if before == position["sent"] else 1)
        if self._failed[1] < ATTEMPTS:
            return False
        client.set_tag(position["run_id"], "fvdm.last_contact", "")  # Raises while the server takes nothing at all.
        return True

    def _run(self, client: Any) -> dict[str, Any]:
        """The position in the journal, with the run that it goes to."""
        position = self.journal.position()
        if self._checked:
            return position
        guest = self.start.get("run_id", "")
        if "run_id" in position and self._is_gone(client, position["run_id"]):
            logger.warning(
                "the MLflow run %s is no longer at %s: all that the journal holds goes to a new run (to restore a "
                "deleted run, type: MLFLOW_TRACKING_URI=%s mlflow runs restore --run-id %s)",
                *(position["run_id"], self.uri, self.uri, position["run_id"]),
            )
            position, guest = {"sent": 0}, ""
        if "run_id" not in position:
            if guest and self._is_gone(client, guest):
                logger.warning("MLflow has no run %s here: the report gets a run of its own", guest)
                guest = ""
            position |= {"run_id": guest or self._create(client), "own": not guest}
        run = client.get_run(position["run_id"])
        position |= {"experiment_id": run.info.experiment_id, "uri": self.uri}
        position.setdefault("own", not guest)
        self._named = shown_name if SECTIONS_TAG in run.data.tags else str
        self.journal.save_position(position)
        self._checked = True
        return position

    def _is_gone(self, client: Any, run_id: str) -> bool:
        """Whether the run was deleted on the server.

        Raises:
            ExperimentDeletedError: if all of its experiment was.
        """
        from mlflow.exceptions import MlflowException

        try:
            info = client.get_run(run_id).info
        except MlflowException as error:
            if does_not_exist(error):
                return True
            raise
        if info.lifecycle_stage != "deleted":
            return False
        experiment = client.get_experiment(info.experiment_id)
        if experiment.lifecycle_stage == "deleted":
            raise ExperimentDeletedError(experiment_deleted(experiment.name, experiment.experiment_id, self.uri))
        return True

    def _create(self, client: Any) -> str:
        experiment = find_experiment(client, self.start["experiment"], self.uri)
        tags = dict(self.start.get("tags", {}))
        if tags.get("kind") == "train":
            tags[SECTIONS_TAG] = "1"
        # A late server makes the run after its end: it began with its first event.
        began = next((event["time"] for event in self.journal.events() if "time" in event), None)
        run = client.create_run(experiment, start_time=began, run_name=self.start["name"], tags=tags)
        return str(run.info.run_id)

    def _deliver(self, client: Any, position: dict[str, Any], events: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(self._named(key), value, event["time"], event["step"])
            for event in events
            for key, value in event.get("metrics", {}).items()
        ]
        for i in range(0, len(metrics), 1000):
            client.log_batch(position["run_id"], metrics=metrics[i : i + 1000])
        for event in events:
            if "metrics" not in event:
                self._deliver_one(client, position, event)

    def _deliver_or_skip(self, client: Any, position: dict[str, Any], event: dict[str, Any]) -> None:
        """Deliver an event, one metric at a time; skip what cannot be delivered."""
        values = event.get("metrics", {})
        parts = [event | {"metrics": {key: value}} for key, value in values.items()] if values else [event]
        for part in parts:
            try:
                self._deliver(client, position, [part])
            except Exception as error:
                if not self._give_up(client, position, error):
                    raise
                self._skip(part, error)

    def _deliver_one(self, client: Any, position: dict[str, Any], event: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        run_id, own = position["run_id"], position["own"]
        path = Path(event.get("artifact") or event.get("image") or "")
        if "start" in event:
            if own:
                self._begin(client, run_id, event["start"])
                self._describe(client, position)
        elif "status" in event:
            if own:  # The end of somebody else's run is not ours to report.
                client.set_terminated(run_id, event["status"], event["time"])
                self._describe(client, position)
        elif "dataset" in event:
            client.log_inputs(run_id, [_dataset(**event["dataset"])])
        elif "tags" in event:
            client.log_batch(run_id, tags=[RunTag(name, value) for name, value in event["tags"].items()])
        elif "figures" in event:
            if event.get("final", True):
                self._params(client, run_id, {name: f"{value:.6g}" for name, value in event["figures"].items()})
            self._describe(client, position)
        elif "adopt" in event:
            _set_parent(client, event["adopt"], run_id)
        elif "model" in event:
            model = LoggedModel.from_event(event["model"])
            self.refused_model |= not deliver(client, run_id, model, self.uploading, self.uri)
        elif path.is_file():  # Else its owner has removed it since.
            self._file(client, position, event, path)

    def _file(self, client: Any, position: dict[str, Any], event: dict[str, Any], path: Path) -> None:
        if "artifact" in event:
            client.log_artifact(position["run_id"], str(path), event["to"] or None)
            return
        from PIL import Image, UnidentifiedImageError

        try:
            image = Image.open(path)
        except UnidentifiedImageError as error:
            raise TypeError(f"{path} is not an image") from error
        client.log_image(position["run_id"], image, key=self._named(event["key"]), step=event["step"])
        if position["own"]:
            self._describe(client, position)

    def _begin(self, client: Any, run_id: str, start: dict[str, Any]) -> None:
        """Report that the run continues, and with which settings."""
        client.update_run(run_id, status="RUNNING")
        self._params(client, run_id, start.get("params", {}))

    def _params(self, client: Any, run_id: str, params: dict[str, str]) -> None:
        """Log parameters; one that has another value already becomes a tag, as parameters cannot change."""
        from mlflow.entities import Param, RunTag

        before = client.get_run(run_id).data.params
        params = {k: v[:6000] for k, v in params.items()}
        new = [Param(k, v) for k, v in params.items() if k not in before]
        changed = [RunTag(f"changed.{k}", v) for k, v in params.items() if before.get(k, v) != v]
        for i in range(0, len(new), 100):
            self._some_params(client, run_id, new[i : i + 100])
        if changed:
            client.log_batch(run_id, tags=changed)

    def _some_params(self, client: Any, run_id: str, params: list[Any]) -> None:
        """Log up to 100 parameters; one that the server refuses is skipped."""
        try:
            client.log_batch(run_id, params=params)
        except Exception as error:
            if not refuses(error):
                raise
            if len(params) == 1:
                self._skip({"params": {params[0].key: params[0].value}}, error)
                return
            for param in params:
                self._some_params(client, run_id, [param])

    def _skip(self, event: dict[str, Any], error: Exception) -> None:
        """Record an event that cannot be delivered; the first one is reported."""
        self.journal.record_refused(event, str(error))
        if not self._warned:
            logger.warning(
                "MLflow does not take an event of this run (%s); it is skipped, and kept in %s like all that follow",
                " ".join(str(error).split()),
                self.journal.folder / "refused.jsonl",
            )
        self._warned = True

    def _describe(self, client: Any, position: dict[str, Any]) -> None:
        """Bring the run's description up to date, unless somebody has edited it."""
        run = client.get_run(position["run_id"])
        now = run.data.tags.get(description.TAG, "")
        if now and description.digest(now) != position.get("described"):
            return
        link = pages.run_page("", position["experiment_id"], position["run_id"], "artifacts/")
        files = {name for folder in ("", "images") for name in _paths(client, position["run_id"], folder)}
        text = description.render(self.start, self.journal.events(), position["run_id"], link, files, self._named)
        if text != now:
            client.set_tag(position["run_id"], description.TAG, text)
            position["described"] = description.digest(text)
            self.journal.save_position(position)


def ended(journal: Journal) -> bool:
    """Whether the last event of a run is its end."""
    last: dict[str, Any] = {}
    for event in journal.events():
        last = event
    return last.get("status") in ENDS


def _paths(client: Any, run_id: str, folder: str) -> list[str]:
    return [file.path for file in client.list_artifacts(run_id, folder or None)]


def _set_parent(client: Any, child: str, parent: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.set_tag(child, "mlflow.parentRunId", parent)
    except MlflowException as error:
        if not does_not_exist(error):
            raise
        logger.warning("MLflow has no run %s here: it is not shown below %s", child, parent)


def _dataset(name: str, uri: str, digest: str, role: str, clips: int) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source, profile = json.dumps({"uri": uri}), json.dumps({"clips": clips})
    dataset = Dataset(name=name, digest=digest, source_type="local", source=source, profile=profile)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", role)])
