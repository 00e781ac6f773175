"""Ctrl-C, `kill`, a container's stop and a closed terminal as one exception."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal asks the program to end.

    Attributes:
        name: of the signal, such as SIGTERM.
        exit_status: what the program ends with, 128 and the signal's number.
    """

    def __init__(self, number: int) -> None:
        """Takes the signal's number."""
        super().__init__()
        self.name, self.exit_status = signal.Signals(number).name, 128 + number


@contextmanager
def interrupts() -> Iterator[None]:
    """Raise `Interrupted` in the block at the first SIGINT, SIGTERM or SIGHUP; later ones wait until the block ends.

    A signal that is ignored, as SIGHUP is under nohup, stays so. Outside the main thread, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(number)

    before = {number: signal.getsignal(number) for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
