"""Calls a function now and then, in a thread beside the work."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeatedly(function: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call `function` every so many seconds, first after that time, until the block ends.

    Args:
        function: its exceptions end the thread, not the block.
        seconds: between two calls, > 0.
    """
    over = threading.Event()

    def run() -> None:
        while not over.wait(seconds):
            function()

    thread = threading.Thread(target=run, name=f"repeatedly {function.__name__}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
