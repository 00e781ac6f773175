"""Files that stand under their names whole or not at all, and survive a power cut once they do."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def fsync_folder(folder: Path) -> None:
    """Make renames and new names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make what a file holds survive a power cut."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def whole(path: Path, mark: str = "") -> Iterator[Path]:
    """A name beside `path` to write a file under, which becomes `path` when the block ends without an error.

    Args:
        path: the file to make; one that is there already is replaced.
        mark: ends the other name; where several processes may write the same file, each needs one of its own.
    """
    temporary = path.with_name(f".tmp-{path.name}{mark}")
    try:
        yield temporary
        fsync_file(temporary)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text)
