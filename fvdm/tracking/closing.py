"""Ends runs that could not report their own end, such as those that Slurm or a signal killed."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fvdm.files import LockHeldError
from fvdm.tracking.config import experiment_name, tracking_uri
from fvdm.tracking.delivery import Sender, ended
from fvdm.tracking.journal import ENDS, Journal, sender_lock
from fvdm.tracking.server import prepare
from fvdm.tracking.tracker import TIMEOUT, Outage

REQUEST_TIMEOUT = 30  # seconds; MLflow's own 120 are too long for a job that is being cancelled


def close_run(folder: Path, status: str, timeout: float = TIMEOUT) -> bool:
    """Send what the journal of a run still holds, and end the run in MLflow; launchers call it when a job is over.

    A run that has reported its own end keeps that status. A process of the run that is about to end may still send, and
    is waited for; one that goes on is left alone.

    Args:
        folder: the run's folder, such as `runs/demo`.
        status: FINISHED, FAILED or KILLED.
        timeout: seconds to wait for such a process, and for a server that does not answer.

    Returns:
        Whether MLflow has everything now.

    Raises:
        ValueError: if the status is none of the three.
    """
    if status not in ENDS:
        raise ValueError(f"{status} is not the status of a run that has ended; choose one of {', '.join(ENDS)}")
    if not (folder / "events.jsonl").exists():
        return True
    deadline = time.monotonic() + timeout
    try:
        with sender_lock(folder, timeout), contextlib.closing(Journal(folder)) as journal, _request_timeout():
            if not ended(journal):
                journal.append({"status": status})
            return _send(journal, deadline)
    except LockHeldError:
        return False


def _send(journal: Journal, deadline: float) -> bool:
    if not journal.unsent():
        return True
    prepare()
    start = last_start(journal)
    sender, outage = Sender(journal, start, start["uri"]), Outage(start["uri"])
    pause = 1.0
    while True:
        try:
            sender.send()
            outage.over()
            return True
        except Exception as error:  # Whatever the server or the network does, the launcher continues.
            outage.failed(error)
            if time.monotonic() + pause > deadline:
                return False
            time.sleep(pause)
            pause *= 2


@contextlib.contextmanager
def _request_timeout() -> Iterator[None]:
    """A server that takes requests and never answers holds nobody up for long; the user's own setting counts."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    own = name in os.environ
    os.environ.setdefault(name, str(REQUEST_TIMEOUT))
    try:
        yield
    finally:
        if not own:
            os.environ.pop(name, None)


def last_start(journal: Journal) -> dict[str, Any]:
    """What a run was started with; of a journal by version 0.1, what can be known of it."""
    found: dict[str, Any] = {}
    for event in journal.events():
        found = event.get("start", found)
    return found or _former_start(journal.folder)


def _former_start(folder: Path) -> dict[str, Any]:
    import yaml

    settings = folder / "config.yaml"
    values = yaml.safe_load(settings.read_text()) if settings.exists() else {}
    tracking = values.get("tracking", {})
    position = json.loads((folder / "tracking.json").read_text()) if (folder / "tracking.json").exists() else {}
    return {
        "name": values.get("name", folder.name),
        "experiment": experiment_name(tracking.get("experiment", "")),
        "uri": position.get("uri") or tracking_uri(tracking.get("uri", "")),
        "tags": {"kind": "train"} if settings.exists() else {},
    }
