"""Ends runs that could not report their own end, such as those that Slurm or a signal killed."""

import json
import time
from pathlib import Path
from typing import Any

from fvdm.files import LockHeldError
from fvdm.tracking.config import experiment_name, tracking_uri
from fvdm.tracking.delivery import Sender, ended
from fvdm.tracking.journal import ENDS, Journal
from fvdm.tracking.server import prepare
from fvdm.tracking.tracker import TIMEOUT, Outage


def close_run(folder: Path, status: str, timeout: float = TIMEOUT) -> bool:
    """Send what the journal of a run still holds, and end the run in MLflow; launchers call it when a job is over.

    A run that has reported its own end keeps that status. A run whose process still sends is left alone.

    Args:
        folder: the run's folder, such as `runs/demo`.
        status: FINISHED, FAILED or KILLED.
        timeout: seconds to wait for a server that does not answer.

    Returns:
        Whether MLflow has everything now.

    Raises:
        ValueError: if the status is none of the three.
    """
    if status not in ENDS:
        raise ValueError(f"{status} is not the status of a run that has ended; choose one of {', '.join(ENDS)}")
    if not (folder / "events.jsonl").exists():
        return True
    journal = Journal(folder)
    try:
        with journal.sender_lock():
            if not ended(journal):
                journal.append({"status": status})
            return _send(journal, timeout)
    except LockHeldError:
        return False
    finally:
        journal.close()


def _send(journal: Journal, timeout: float) -> bool:
    if not journal.unsent():
        return True
    prepare()
    start = last_start(journal)
    sender, outage = Sender(journal, start, start["uri"]), Outage(start["uri"])
    deadline, pause = time.monotonic() + timeout, 1.0
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
