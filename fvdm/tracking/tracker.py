"""MLflow, behind a journal: what a run reports is first a line on disk, and reaches the server when it can.

The package `fvdm.tracking` alone speaks to mlflow while a run goes on; rank 0 alone makes a Tracker. Training
never waits for a server: `events.jsonl` beside the run takes every event at once, a thread sends them in order, and
what could not be sent, because the server was away or the run was killed, is sent by the next start of the same run.
"""

import contextlib
import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fvdm.files import atomic_write, lock, write_text
from fvdm.tracking.config import TrackingConfig
from fvdm.tracking.logged_model import Model, deliver
from fvdm.tracking.provenance import git_commit

logger = logging.getLogger(__name__)

SQLITE = "sqlite:///"
PATIENCE = 30.0  # seconds that the end of a run waits for a server that does not answer


def tracking_uri(uri: str = "") -> str:
    """The tracking address that applies: the given one, the environment's, or a database in this folder."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{Path('mlflow.db').resolve()}"


def _open(uri: str) -> Any:
    """A client. A database is made by one process alone, under another name: two at once, or a kill, would spoil it."""
    from mlflow.tracking import MlflowClient

    if not uri.startswith(SQLITE):
        return MlflowClient(uri)
    database = Path(uri.removeprefix(SQLITE).partition("?")[0])
    with lock(database.with_name(f".{database.name}.lock")):
        if not database.exists():
            with atomic_write(database) as temporary:
                MlflowClient(f"{SQLITE}{temporary}")
        return MlflowClient(uri)


class Tracker:
    """Reports one run to MLflow. Every method returns at once."""

    def __init__(
        self,
        folder: Path,
        config: TrackingConfig,
        name: str,
        params: dict[str, Any] | None = None,
        tags: dict[str, str] | None = None,
        into: str = "",
    ) -> None:
        """Begin, or continue, the run whose journal lies in `folder`.

        Args:
            folder: the run's folder; holds `events.jsonl` and `tracking.json` (run id, bytes sent), below `into`.
            config: where to.
            name: the run's name in MLflow.
            params: settings; one that changed since it was first reported becomes a tag, as parameters cannot change.
            tags: tags of the run, such as its kind.
            into: id of a run of somebody else's to report into; its state and settings stay as they are. If the server
                has no such run, the report gets one of its own.
        """
        folder = folder / into  # A journal is of one run: what comes for another one has its own.
        self.folder, self.config, self.name = folder, config, name
        self.params = {k: str(v) for k, v in (params or {}).items()}
        self.into = into
        self.tags = {"git_commit": git_commit()} | (tags or {})
        folder.mkdir(parents=True, exist_ok=True)
        self._journal = (folder / "events.jsonl").open("ab+", buffering=0)
        self._pending = b""
        self._mend()
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._warned = False
        self._monitor: Any = None
        self._uploading = threading.Event()
        self._over = threading.Event()  # the patience with a server that does not answer
        self.refused = False  # whether a model could not be logged
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        self._thread.start()
        self._wake.put(True)

    def _mend(self) -> None:
        """End a line that a kill cut short, so that the next event begins one of its own."""
        if self._journal.tell():
            self._journal.seek(-1, os.SEEK_END)
            if self._journal.read(1) != b"\n":
                self._pending = b"\n"

    @property
    def run_id(self) -> str | None:
        """The MLflow run, once the server has given it a name."""
        return self._position().get("run_id")

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Report numbers of a training step; what MLflow takes in no name, such as a plus or a comma, is replaced."""
        named = {re.sub(r"[^\w\-. :/]", "_", name.replace("+", "p")): value for name, value in values.items()}
        self._write({"metrics": named, "step": step})

    def artifact(self, path: Path, to: str = "") -> None:
        """Report a file that stays on disk, under the artifact folder `to`."""
        self._write({"artifact": str(path.resolve()), "to": to})

    def image(self, path: Path, key: str, step: int) -> None:
        """Report an image file that stays on disk, as the `step`-th of the series `key`."""
        self._write({"image": str(path.resolve()), "key": key, "step": step})

    def dataset(self, name: str, uri: str, digest: str, role: str, clips: int) -> None:
        """Report a data set that went into the run: where it lies, what was taken of it, and as what, such as real."""
        self._write({"dataset": {"name": name, "uri": uri, "digest": digest, "role": role, "clips": clips}})

    def model(self, model: Model) -> None:
        """Report a trained model: log it to the run, and register it; a model that is there already is left alone."""
        self._write({"model": vars(model)})

    def retag(self, tags: dict[str, str]) -> None:
        """Report tags of a run that began earlier; they take the place of those of that name."""
        self._write({"tags": tags})

    def adopt(self, run_id: str) -> None:
        """Show another run, of the same experiment, below this one."""
        self._write({"adopt": run_id})

    def _write(self, event: dict[str, Any]) -> None:
        line = json.dumps(event | {"time": int(time.time() * 1000)})
        self._pending += line.encode() + b"\n"
        try:
            while self._pending:
                self._pending = self._pending[self._journal.write(self._pending) :]
        except OSError as error:  # A full disk ends no training; what could not be written waits for the next event.
            logger.warning("%s cannot be written (%s); keeping its events for later", self._journal.name, error)
        self._wake.put(True)

    def close(self, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED, once everything is sent or the server's patience is over."""
        self._write({"status": status})
        self._wake.put(False)
        self._thread.join(PATIENCE)
        while self._thread.is_alive() and self._uploading.is_set():
            self._thread.join(1.0)  # A model of some gigabytes is on its way to a server that answers.
        self._over.set()  # The journal is the next start's.
        if self._monitor:
            self._monitor.finish()
        self._journal.close()
        if self.unsent():
            logger.warning(
                "MLflow at %s took not everything; the rest is in %s and is sent when the run is started again",
                tracking_uri(self.config.uri),
                self.folder / "events.jsonl",
            )

    def _position(self) -> dict[str, Any]:
        path = self.folder / "tracking.json"
        return json.loads(path.read_text()) if path.exists() else {"sent": 0}

    def unsent(self) -> bool:
        """Whether the journal holds what the server has not taken."""
        return self._position()["sent"] < (self.folder / "events.jsonl").stat().st_size

    def _send_all(self) -> None:
        """The thread: send what the journal holds whenever something came, again and again while it fails."""
        going, wait = True, 0.0
        while going or (self.unsent() and not self._over.is_set()):
            with contextlib.suppress(queue.Empty):
                going = self._wake.get(timeout=wait or None) and going
                while True:
                    going = self._wake.get_nowait() and going
            if self._over.is_set():
                return
            try:
                self._send()
                wait = 0.0
            except Exception as error:  # Whatever the server or the network does, the run goes on.
                if not self._warned:
                    logger.warning("MLflow does not answer (%s); the run goes on and keeps its events", error)
                self._warned, wait = True, min(30.0, 2 * wait or 1.0)

    def _send(self) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        logging.getLogger("alembic").setLevel(logging.WARNING)
        client = _open(tracking_uri(self.config.uri))
        position = self._position()
        if "run_id" not in position:
            found = self._find(client)
            position |= {"run_id": found or self._create(client), "own": not found}
            position["experiment_id"] = client.get_run(position["run_id"]).info.experiment_id
            write_text(self.folder / "tracking.json", json.dumps(position))
        own = position.get("own", not self.into)
        if self._monitor is None and own:
            self._begin(client, position["run_id"])
        with (self.folder / "events.jsonl").open("rb") as journal:
            journal.seek(position["sent"])
            for events, end in _batches(journal):
                self._deliver(client, position["run_id"], events, own)
                position["sent"] = end
                write_text(self.folder / "tracking.json", json.dumps(position))

    def _find(self, client: Any) -> str:
        """The run to report into; empty when it is to be made."""
        from mlflow.exceptions import MlflowException

        try:
            return client.get_run(self.into).info.run_id if self.into else ""
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            logger.warning("MLflow has no run %s here: the report gets a run of its own", self.into)
            return ""

    def _create(self, client: Any) -> str:
        found = client.get_experiment_by_name(self.config.experiment)
        if found is None:
            local = tracking_uri(self.config.uri).startswith("sqlite")
            # A relative artifact folder would move with whoever opens the database.
            place = Path("mlartifacts").resolve().as_uri() if local else None
            experiment = client.create_experiment(self.config.experiment, artifact_location=place)
        else:
            experiment = found.experiment_id
        return client.create_run(experiment, run_name=self.name, tags=self.tags).info.run_id

    def _begin(self, client: Any, run_id: str) -> None:
        """Say that the run is going, and with which settings."""
        from mlflow.entities import Param, RunTag

        client.update_run(run_id, status="RUNNING")
        before = client.get_run(run_id).data.params
        params = {k: v[:6000] for k, v in self.params.items()}
        new = [Param(k, v) for k, v in params.items() if k not in before]
        changed = [RunTag(f"changed.{k}", v) for k, v in params.items() if before.get(k, v) != v]
        for i in range(0, len(new), 100):
            client.log_batch(run_id, params=new[i : i + 100])
        if changed:
            client.log_batch(run_id, tags=changed)
        self._monitor = False
        if self.config.system_metrics:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(
                run_id, resume_logging=bool(before), tracking_uri=tracking_uri(self.config.uri)
            )
            self._monitor.start()

    def _deliver(self, client: Any, run_id: str, events: list[dict[str, Any]], own: bool) -> None:
        from mlflow.entities import Metric, RunTag

        metrics = [
            Metric(key, value, event["time"], event["step"])
            for event in events
            for key, value in event.get("metrics", {}).items()
        ]
        for i in range(0, len(metrics), 1000):
            client.log_batch(run_id, metrics=metrics[i : i + 1000])
        for event in events:
            path = Path(event.get("artifact") or event.get("image") or "")
            if "status" in event:
                if own:  # The end of somebody else's run is not ours to tell.
                    client.set_terminated(run_id, event["status"])
            elif "dataset" in event:
                client.log_inputs(run_id, [_dataset(**event["dataset"])])
            elif "tags" in event:
                client.log_batch(run_id, tags=[RunTag(name, value) for name, value in event["tags"].items()])
            elif "adopt" in event:
                _adopt(client, event["adopt"], run_id)
            elif "model" in event:
                self.refused |= not deliver(client, run_id, Model(**event["model"]), self._uploading)
            elif not path.is_file():
                continue  # Metrics, or a file that its owner has since removed.
            elif "artifact" in event:
                client.log_artifact(run_id, str(path), event["to"] or None)
            else:
                from PIL import Image

                client.log_image(run_id, Image.open(path), key=event["key"], step=event["step"])


def run_of(folder: Path) -> str:
    """The MLflow run of a training run's folder, or of the run that a checkpoint lies in; empty where there is none."""
    for place in (folder, folder.parent.parent):
        with contextlib.suppress(OSError, ValueError, KeyError):
            return str(json.loads((place / "tracking.json").read_text())["run_id"])
    return ""


def _adopt(client: Any, child: str, parent: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.set_tag(child, "mlflow.parentRunId", parent)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        logger.warning("MLflow has no run %s here: it is not shown below %s", child, parent)


def _dataset(name: str, uri: str, digest: str, role: str, clips: int) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source, profile = json.dumps({"uri": uri}), json.dumps({"clips": clips})
    dataset = Dataset(name=name, digest=digest, source_type="local", source=source, profile=profile)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", role)])


def _batches(journal: Any, size: int = 200) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Whole lines of the journal from its position on, with the position after them."""
    events: list[dict[str, Any]] = []
    begin = end = journal.tell()
    for line in journal:
        if not line.endswith(b"\n"):
            break  # A kill cut it short; or it is being written now.
        end += len(line)
        with contextlib.suppress(json.JSONDecodeError):
            events.append(json.loads(line))
        if len(events) == size:
            yield events, end
            events = []
    if end > begin:
        yield events, end
