"""The requests that wait for the one model, in the order in which they came."""

import contextlib
import threading
from collections.abc import Iterator


class Turn:
    """A request's place among those that wait.

    Attributes:
        session: whose it is.
        cancelled: set once the session has cancelled it.
    """

    def __init__(self, session: str) -> None:
        self.session, self.cancelled = session, threading.Event()


class RequestQueue:
    """One request at a time; the others wait, and each can be cancelled while it waits and while it is served."""

    def __init__(self, max_waiting: int) -> None:
        """Make an empty queue.

        Args:
            max_waiting: requests that may wait beside the one that is served.
        """
        self.max_waiting = max_waiting
        self._turns: list[Turn] = []
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def enter(self, session: str) -> Iterator[Turn]:
        """Join the end of the queue; leave it with the `with` block.

        Raises:
            ValueError: if too many wait already.
        """
        turn = Turn(session)
        with self._changed:
            if len(self._turns) > self.max_waiting:
                raise ValueError(f"{self.max_waiting} requests wait already: try again in a while")
            self._turns.append(turn)
        try:
            yield turn
        finally:
            with self._changed:
                self._turns.remove(turn)
                self._changed.notify_all()

    def ahead(self, turn: Turn) -> int:
        """How many requests come before this one; 0 when it is served."""
        with self._changed:
            return self._turns.index(turn)

    def wait(self, turn: Turn, ahead: int) -> None:
        """Return when no longer `ahead` requests come before this one, or when it is cancelled."""
        with self._changed:
            self._changed.wait_for(lambda: turn.cancelled.is_set() or self._turns.index(turn) != ahead)

    def cancel(self, session: str) -> None:
        """Cancel every request of a session."""
        with self._changed:
            for turn in self._turns:
                if turn.session == session:
                    turn.cancelled.set()
            self._changed.notify_all()
