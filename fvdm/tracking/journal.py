"""The journal of a run: one event per line in `events.jsonl`, and in `tracking.json` how far the server has them."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fvdm.files import lock, write_text

logger = logging.getLogger(__name__)

ENDS = ("FINISHED", "FAILED", "KILLED")  # the states of a run that has ended


def sender_lock(folder: Path, timeout: float = 0) -> AbstractContextManager[None]:
    """The lock of who sends the journal in `folder`; raises LockHeldError while another one sends, after `timeout`."""
    return lock(folder / ".sender.lock", timeout)


class Journal:
    """Events of one run, in the order in which they happened. One process writes; one process at a time sends.

    Attributes:
        folder: holds `events.jsonl`, `tracking.json` and, where the server refused events, `refused.jsonl`.
    """

    def __init__(self, folder: Path) -> None:
        """Open the journal in `folder`, which is made if it does not exist."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / "events.jsonl"
        self._file = self.path.open("ab+", buffering=0)
        self._pending = b""
        if self._file.tell():
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":  # A kill cut the last line short: the next event begins a line of its own.
                self._pending = b"\n"

    def append(self, event: dict[str, Any]) -> None:
        """Write an event with the time of now; on a full disk it is kept in memory until the next one."""
        line = json.dumps(event | {"time": int(time.time() * 1000)})
        self._pending += line.encode() + b"\n"
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:  # A full disk must not end a training run.
            logger.warning("%s cannot be written (%s); keeping its events for later", self.path, error)

    def position(self) -> dict[str, Any]:
        """How far the journal is sent: `sent` bytes; with the run also `run_id`, `experiment_id`, `own` and `uri`."""
        path = self.folder / "tracking.json"
        return json.loads(path.read_text()) if path.exists() else {"sent": 0}

    def save_position(self, position: dict[str, Any]) -> None:
        """Write down how far the journal is sent."""
        write_text(self.folder / "tracking.json", json.dumps(position))

    def unsent(self) -> bool:
        """Whether the journal holds events that the server has not taken."""
        return bool(self.position()["sent"] < self.path.stat().st_size)

    def events(self) -> Iterator[dict[str, Any]]:
        """All events from the first on."""
        for events, _ in self.batches(0):
            yield from events

    def batches(self, start: int, size: int = 200) -> Iterator[tuple[list[dict[str, Any]], int]]:
        """Complete lines from byte `start` on, up to `size` at a time, with the position after them."""
        events: list[dict[str, Any]] = []
        end = start
        with self.path.open("rb") as file:
            file.seek(start)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # A kill cut it short, or it is being written now.
                end += len(line)
                with contextlib.suppress(json.JSONDecodeError):
                    events.append(json.loads(line))
                if len(events) == size:
                    yield events, end
                    events, start = [], end
        if end > start:
            yield events, end

    def record_refused(self, event: dict[str, Any], reason: str) -> None:
        """Keep an event that the server refused, with the reason, in `refused.jsonl`."""
        with contextlib.suppress(OSError), (self.folder / "refused.jsonl").open("a") as file:
            file.write(json.dumps({"reason": reason, "event": event}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()
