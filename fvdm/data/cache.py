"""A folder of fetched files that the processes of a node share, of bounded size.

A file is named after its SHA-256, so a file that is there is the right one. The bound holds for shards (`.tar`); the
tables are few and stay. A process that reads ahead says by `pin` which shards it needs now and next; the others may be
removed, the least recently used first. Where even the pinned ones leave no room for a shard that is needed at once, the
least recently used of them is removed: it is fetched again later, and nothing is lost. It does no harm to remove a file
that another process has open.
"""

import os
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from pathlib import Path

from fvdm.files import LockHeldError, atomic_write, lock, write_text

PIN_SECONDS = 120.0  # a list of pinned files counts for so long after it was last renewed
STALE_SECONDS = 3600.0  # leftovers of processes that were killed are removed after this time
PINS = "pins-"


class _NoRoomError(Exception):
    """There is no room for a shard that is not needed yet."""


@dataclass
class ReadCounters:
    """What one process read through a cache.

    Attributes:
        bytes_fetched: bytes that were fetched.
        fetches: files that were fetched.
        hits: times that a shard was in the cache when it was needed.
        misses: times that it was not.
        seconds_waited: time that reading waited for a shard.
    """

    bytes_fetched: float = 0.0
    fetches: float = 0.0
    hits: float = 0.0
    misses: float = 0.0
    seconds_waited: float = 0.0

    def take(self) -> "ReadCounters":
        """What was counted since the last call."""
        taken = ReadCounters(**vars(self))
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) - getattr(taken, field.name))
        return taken

    def add(self, other: "ReadCounters") -> None:
        """Adds what another process counted."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


class ShardCache:
    """Files by their checksums.

    Args:
        folder: where they are; on a disk of this node, or shared.
        limit: most bytes of shards; 0 for no bound.
    """

    def __init__(self, folder: Path, limit: int = 0) -> None:
        """Makes no folder yet."""
        self.folder, self.limit = folder, limit
        self.counters = ReadCounters()
        self._pins: tuple[Path, frozenset[str]] | None = None

    def get(self, key: str, size: int, fetch: Callable[[Path], int]) -> Path:
        """Path of a file, which is fetched if it is not there; waits for another process that fetches it.

        Args:
            key: file name, from the checksum.
            size: bytes, for which room is made; 0 where it is not known.
            fetch: writes the file to a path that exists, and returns its size.
        """
        path = self.folder / key
        if self._touch(path):
            self.counters.hits += 1
            return path
        began = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock(self.folder / f"{key}.lock"):
            if not path.exists():
                self._fetch(path, size, fetch, needed=True)
        self.counters.misses += 1
        self.counters.seconds_waited += time.monotonic() - began
        return path

    def prefetch(self, key: str, size: int, fetch: Callable[[Path], int]) -> bool:
        """As `get`, but only if there is room and no other process fetches the file; returns whether it is there."""
        path = self.folder / key
        if path.exists():
            return True
        self.folder.mkdir(parents=True, exist_ok=True)
        with suppress(LockHeldError, _NoRoomError), lock(self.folder / f"{key}.lock", timeout=0):
            if not path.exists():
                self._fetch(path, size, fetch, needed=False)
            return True
        return False

    def _fetch(self, path: Path, size: int, fetch: Callable[[Path], int], *, needed: bool) -> None:
        with ExitStack() as stack, atomic_write(path, mark=f".{os.getpid()}-{secrets.token_hex(4)}") as partial:
            if self.limit:
                self._make_room(size, partial, needed=needed)
            count = fetch(partial)
            # It gets its name while nobody counts the files: a listing may miss one that is renamed meanwhile.
            stack.enter_context(lock(self.folder / ".room.lock"))
        self.counters.bytes_fetched += count
        self.counters.fetches += 1

    def _make_room(self, size: int, partial: Path, *, needed: bool) -> None:
        """Removes what is least needed, and reserves the room by the size of the partial file.

        Raises:
            _NoRoomError: the shard is not needed yet, and all others are.
        """
        with lock(self.folder / ".room.lock"):
            pinned = set().union(*self._fresh_pins().values())
            used, shards = 0, []
            for entry in os.scandir(self.folder):
                with suppress(FileNotFoundError):
                    stat = entry.stat()
                    if entry.name.endswith(".tar"):
                        shards.append((entry.name in pinned, stat.st_mtime_ns, stat.st_size, entry.path))
                    elif entry.name.startswith(".tmp-") and time.time() - stat.st_mtime > STALE_SECONDS:
                        os.unlink(entry.path)
                        continue
                    elif not entry.name.startswith(".tmp-") or ".tar." not in entry.name:
                        continue
                    used += stat.st_size
            removable = [shard for shard in sorted(shards) if needed or not shard[0]]
            if not needed and used - sum(shard[2] for shard in removable) + size > self.limit:
                raise _NoRoomError
            for _, _, freed, path in removable:
                if used + size <= self.limit:
                    break
                with suppress(FileNotFoundError):
                    os.unlink(path)
                used -= freed
            os.truncate(partial, size)

    def pin(self, label: str, keys: list[str]) -> None:
        """Says which files this process needs now and next; replaces what it said before. Renew it now and then.

        Args:
            label: of the rank; its processes share what is due to one rank of the cache.
            keys: names of files; none to end.
        """
        if not self.limit:
            return
        if self._pins is None or not self._pins[0].exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._pins = (self.folder / f"{PINS}{label}-{os.getpid()}-{secrets.token_hex(4)}", frozenset())
        path, before = self._pins
        if not keys:
            path.unlink(missing_ok=True)
            self._pins = None
        elif frozenset(keys) == before:
            os.utime(path)
        else:
            write_text(path, "\n".join(keys))
            self._pins = (path, frozenset(keys))

    def ranks(self) -> int:
        """How many ranks share the cache now, by what they pin; at least 1."""
        return max(1, len({name.removeprefix(PINS).partition("-")[0] for name in self._fresh_pins()}))

    def _fresh_pins(self) -> dict[str, set[str]]:
        """What the processes of this cache need, by the names of their lists."""
        found = {}
        for path in self.folder.glob(f"{PINS}*"):
            with suppress(FileNotFoundError):
                age = time.time() - path.stat().st_mtime
                if age > STALE_SECONDS:
                    path.unlink()
                elif age < PIN_SECONDS:
                    found[path.name] = set(path.read_text().split())
        return found

    @staticmethod
    def _touch(path: Path) -> bool:
        """Marks a file as used now; returns whether it is there."""
        try:
            os.utime(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True
