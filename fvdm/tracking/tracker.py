"""MLflow, behind a journal: what a run reports is first a line on disk, and reaches the server when it can.

Rank 0 alone makes a Tracker. Training never waits for a server: `events.jsonl` in the run's folder takes every event at
once, a thread sends them in order, and what could not be sent, because the server was away or the run was killed, is
sent by the next start of the same run or by `close_run`.
"""

import contextlib
import json
import logging
import queue
import re
import threading
import time
from pathlib import Path
from typing import Any

from fvdm.files import LockHeldError
from fvdm.tracking.config import TrackingConfig, check_uri, experiment_name, tracking_uri
from fvdm.tracking.delivery import Sender
from fvdm.tracking.description import duration
from fvdm.tracking.journal import Journal, sender_lock
from fvdm.tracking.logged_model import LoggedModel
from fvdm.tracking.pages import where_to_look
from fvdm.tracking.provenance import git_commit, source_tags
from fvdm.tracking.server import ExperimentDeletedError, prepare
from fvdm.tracking.system_metrics import SystemMetrics

logger = logging.getLogger(__name__)

TIMEOUT = 30.0  # seconds that the end of a run waits for a server that does not answer
# The same of a run that was stopped: Slurm leaves a cancelled job 30 seconds, and its launcher sends the rest.
STOPPED_TIMEOUT = 10.0
LONGEST_PAUSE = 30.0  # seconds between two attempts to reach a server that is away


class Tracker:
    """Reports one run to MLflow. Every method but `close` returns at once."""

    def __init__(
        self,
        folder: Path,
        config: TrackingConfig,
        name: str,
        params: dict[str, Any] | None = None,
        tags: dict[str, str] | None = None,
        run_id: str = "",
        description: str = "",
    ) -> None:
        """Begin, or continue, the run whose journal lies in `folder`.

        Args:
            folder: the run's folder; holds the journal. Reports into another run have theirs in a folder of its id.
            config: where to.
            name: the run's name in MLflow.
            params: settings; one that changed since it was first reported becomes a tag, as parameters cannot change.
            tags: tags of the run, such as its kind.
            run_id: id of an existing run to report into; its state and settings stay as they are. If the server has no
                such run, the report gets a run of its own.
            description: Markdown for the run's page; how it ended and its newest images are added.

        Raises:
            ValueError: if MLflow keeps no runs at the address.
        """
        uri = tracking_uri(config.uri)
        check_uri(uri)
        self.config, self.name, self.uri = config, name, uri
        self.folder = folder / run_id
        start = {
            "name": name,
            "experiment": experiment_name(config.experiment),
            "params": {k: str(v) for k, v in (params or {}).items()},
            "tags": source_tags() | {"git_commit": git_commit()} | (tags or {}),
            "description": description,
            "run_id": run_id,
            "uri": uri,
        }
        self._journal = Journal(self.folder)
        self._sender = Sender(self._journal, start, uri)
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._over = threading.Event()  # set when the end of the run no longer waits for the server
        self._step = 0
        self._write({"start": start})
        own = config.system_metrics and not run_id
        self._system_metrics = SystemMetrics(self._report_system) if own else None
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """The MLflow run, once the server has given it an id."""
        return self._journal.position().get("run_id")

    @property
    def refused(self) -> bool:
        """Whether a model could not be logged."""
        return self._sender.refused_model

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Report points of curves at a training step; characters that MLflow takes in no name are replaced."""
        self._step = max(self._step, step)
        self._write({"metrics": {_name(name): value for name, value in values.items()}, "step": step})

    def figures(self, values: dict[str, float], final: bool = True) -> None:
        """Report numbers that are not points of a curve: a table in the run's description.

        Args:
            values: by name; a later value replaces an earlier one.
            final: the numbers will not change: they are parameters of the run as well, by which runs are compared.
        """
        self._write({"figures": {_name(name): value for name, value in values.items()}, "final": final})

    def artifact(self, path: Path, to: str = "") -> None:
        """Report a file that stays on disk, under the artifact folder `to`."""
        self._write({"artifact": str(path.resolve()), "to": to})

    def image(self, path: Path, key: str, step: int) -> None:
        """Report an image file that stays on disk, as the `step`-th of the series `key`."""
        self._write({"image": str(path.resolve()), "key": key, "step": step})

    def dataset(self, name: str, uri: str, digest: str, role: str, clips: int) -> None:
        """Report a data set that went into the run: where it lies, what was taken of it, and as what, such as real."""
        self._write({"dataset": {"name": name, "uri": uri, "digest": digest, "role": role, "clips": clips}})

    def log_model(self, model: LoggedModel) -> None:
        """Report a trained model: log it to the run, and register it; a model that is there already is left alone."""
        self._write({"model": model.event()})

    def set_tags(self, tags: dict[str, str]) -> None:
        """Report tags of a run that began earlier; they replace those of the same name."""
        self._write({"tags": tags})

    def set_parent(self, run_id: str) -> None:
        """Make this run the parent of another run of the same experiment, which MLflow then shows below it."""
        self._write({"adopt": run_id})

    def close(self, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED, once everything is sent or the server has not answered in time."""
        if self._system_metrics:
            self._system_metrics.stop()
        self._write({"status": status})
        self._wake.put(False)
        self._thread.join(STOPPED_TIMEOUT if status == "KILLED" else TIMEOUT)
        while self._thread.is_alive() and self._sender.uploading.is_set():
            self._thread.join(1.0)  # A model of some gigabytes is on its way to a server that answers.
        self._over.set()  # The journal is the next sender's.
        self._wake.put(False)
        if self.unsent():
            logger.warning(
                "MLflow at %s has not taken everything; the rest is in %s and is sent when the run is started again",
                self.uri,
                self._journal.path,
            )
        self._journal.close()

    def unsent(self) -> bool:
        """Whether the journal holds events that the server has not taken."""
        return self._journal.unsent()

    def _write(self, event: dict[str, Any]) -> None:
        self._journal.append(event)
        self._wake.put(True)

    def _report_system(self, values: dict[str, float]) -> None:
        self._write({"metrics": values, "step": self._step})

    def _send_all(self) -> None:
        """The thread: send what the journal holds whenever something came, again and again while it fails."""
        prepare()
        with contextlib.ExitStack() as held:
            self._send_until_over(held)

    def _send_until_over(self, held: contextlib.ExitStack) -> None:
        outage = Outage(self.uri)
        going, locked, wait, shown = True, False, 0.0, False
        while going or (self.unsent() and not self._over.is_set()):
            with contextlib.suppress(queue.Empty):
                going = self._wake.get(timeout=wait or None) and going
                while True:
                    going = self._wake.get_nowait() and going
            if self._over.is_set():
                return
            try:
                if not locked:  # The process of an earlier start that was cut off may still be sending.
                    held.enter_context(sender_lock(self.folder))
                    locked = True
                self._sender.send()
                outage.over()
                wait = 0.0
                if not shown:
                    logger.info("MLflow: %s", where_to_look(self.folder))
                shown = True
            except Exception as error:  # Whatever the server or the network does, the run continues.
                outage.failed(error)
                wait = min(LONGEST_PAUSE, 2 * wait or 1.0)


class Outage:
    """Reports a server that does not answer: one warning at its beginning, and its length at its end."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._since = 0.0

    def failed(self, error: Exception) -> None:
        """Count a failure; the first of an outage is reported."""
        if self._since:
            return
        self._since = time.monotonic()
        if isinstance(error, ExperimentDeletedError):
            logger.warning("%s; the run continues and keeps its events until then", error)
        elif isinstance(error, LockHeldError):
            logger.warning("another process still sends the events of this run; it continues and keeps its own")
        else:
            reason = " ".join(str(error).split())
            logger.warning("MLflow at %s does not answer (%s); the run keeps its events meanwhile", self.uri, reason)

    def over(self) -> None:
        """Count a success; if an outage ends with it, its length is reported."""
        if self._since:
            length = duration(time.monotonic() - self._since)
            logger.warning("MLflow at %s answers again after %s; the events since then are sent", self.uri, length)
        self._since = 0.0


def _name(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name.replace("+", "p"))


def run_of(folder: Path) -> str:
    """The MLflow run of a training run's folder, or of the run that a checkpoint lies in; empty where there is none."""
    for place in (folder, folder.parent.parent):
        with contextlib.suppress(OSError, ValueError, KeyError):
            return str(json.loads((place / "tracking.json").read_text())["run_id"])
    return ""
