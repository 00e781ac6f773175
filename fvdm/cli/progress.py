"""Progress bars for large files: on a terminal a bar, in a log a line now and then."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fvdm.background import repeatedly

if TYPE_CHECKING:
    from tqdm import tqdm

LARGE = 200_000_000  # bytes; smaller files get no lines in a log
LOG_EVERY = 30.0  # seconds between two lines in a log
POLL_EVERY = 0.2  # seconds between two looks at a file that is written


def bytes_bar(text: str, total: int) -> "tqdm[Any]":
    """A bar of `total` bytes; `text` says what is done with them."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(
        desc=text,
        total=total,
        unit="B",
        unit_scale=True,
        leave=False,
        mininterval=0.1 if terminal else LOG_EVERY,
        disable=not terminal and total < LARGE,
    )


@contextmanager
def reading(path: Path) -> Iterator[Callable[[int], Any]]:
    """A bar for a file that is read: call what comes with the number of bytes of each piece."""
    with bytes_bar(f"reading {path.name}", path.stat().st_size if path.is_file() else 0) as bar:
        yield bar.update


@contextmanager
def writing(folder: Path, total: int, name: str = "") -> Iterator[None]:
    """A bar for files that a library writes into a new folder in one call: a thread looks at their size.

    Args:
        folder: where they are written.
        total: bytes that they will have.
        name: what the bar calls the folder; its own name by default.
    """
    with bytes_bar(f"writing {name or folder.name}", total) as bar:

        def watch() -> None:
            written = sum(path.stat().st_size for path in folder.glob("*") if path.is_file())
            bar.update(min(written, total) - bar.n)

        with repeatedly(watch, POLL_EVERY):
            yield
