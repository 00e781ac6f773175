"""Atomic writes, which are complete or absent and survive a power cut, and locks between processes."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # a file system that has no flock says one of these


def fsync_folder(folder: Path) -> None:
    """Make renames and new names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make the content of a file survive a power cut."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def atomic_write(path: Path, mark: str = "") -> Iterator[Path]:
    """A temporary name to write a file under, which becomes `path` when the block ends without an error.

    The file gets the permissions that the umask gives, whatever the library that wrote it chose.

    Args:
        path: the file to write; an existing one is replaced.
        mark: ends the temporary name; where several processes may write the same file, each needs its own.
    """
    temporary = path.with_name(f".tmp-{path.name}{mark}")
    temporary.unlink(missing_ok=True)
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)
        fsync_file(temporary)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text)


class LockHeldError(Exception):
    """Another process holds a lock."""


@contextmanager
def lock(path: Path, timeout: float = -1) -> Iterator[None]:
    """Hold a lock that only one process can hold, on this machine or on another that shares the file system.

    The system releases the lock of a process that ends in any way. Where the file system has no flock, a file
    `path.pid` with the host and the process id of the holder stands for the lock; one whose process on this host has
    ended counts for nothing.

    Args:
        path: the lock file, in a folder that exists; it stays there.
        timeout: seconds to wait for another holder; negative to wait without end.

    Raises:
        LockHeldError: another process still holds the lock after `timeout`.
        FileNotFoundError: there is no such folder.
    """
    from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

    if not path.parent.is_dir():  # which filelock would make
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    held: BaseFileLock = FileLock(path, timeout, fallback_to_soft=False)
    try:
        try:
            held.acquire()
        except OSError as error:
            if isinstance(error, Timeout) or error.errno not in NO_FLOCK:
                raise
            held = SoftFileLock(f"{path}.pid", timeout)
            held.acquire()
    except Timeout:
        raise LockHeldError(f"another process holds the lock {held.lock_file}") from None
    try:
        yield
    finally:
        held.release()
