"""Fetches shards ahead of their use, in a thread beside the process that reads them."""

import logging
import threading
from collections.abc import Callable, Sequence

from fvdm.data.format import ClipShard
from fvdm.data.former import ShardInfo
from fvdm.data.location import CorruptShardError, Location

log = logging.getLogger(__name__)
LOOK_SECONDS = 1.0  # between two looks at what is needed, while nothing is fetched


class Prefetcher:
    """A window of the next shards, as large as the share of the cache that is this rank's.

    Args:
        location: where the shards are.
        shards: all shards, by number.
        ahead: the shards that are needed from a step on, as (distance, number), the nearest first; those that are being
            read have the distance 0.
        label: of the rank, for the cache.
        ranks: ranks of this node, >= 1. Those that have not started yet keep their share of the cache: what is fetched
            ahead into it would be removed when they start, and fetched again.
    """

    def __init__(
        self,
        location: Location,
        shards: Sequence[ClipShard | ShardInfo],
        ahead: Callable[[int], list[tuple[int, int]]],
        label: str,
        ranks: int = 1,
    ) -> None:
        """Starts nothing yet."""
        self.location, self.shards, self.ahead, self.label, self.ranks = location, shards, ahead, label, ranks
        self.window: frozenset[int] = frozenset()
        self._step = -1
        self._failed: set[int] = set()
        self._warned = False
        self._fetching = False
        self._choosing = threading.Lock()
        self._moved = threading.Event()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def advance(self, step: int) -> None:
        """Says which step is read now; starts the thread at the first call.

        While the thread waits for a server, the files that this step needs are pinned from here: they would else be
        removed and fetched again.
        """
        if step != self._step:
            self._step = step
            if self._fetching:
                self._choose()
            self._moved.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Ends the thread, after the shard that it fetches now, and pins no more."""
        self._stopped.set()
        self._moved.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(LOOK_SECONDS)
        self.location.cache.pin(self.label, [])

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._moved.clear()
            if not self._fetch_next(self._choose()):
                self._moved.wait(LOOK_SECONDS)

    def _choose(self) -> list[int]:
        """The next shards that fit into this rank's share of the cache; they are pinned there."""
        with self._choosing:
            return self._pin_window()

    def _pin_window(self) -> list[int]:
        cache = self.location.cache
        room = cache.limit / max(self.ranks, cache.ranks()) if cache.limit else float("inf")
        window: list[int] = []
        for distance, number in self.ahead(self._step):
            room -= self.shards[number].bytes
            if room < 0 and window:
                if distance == 0 and not self._warned:
                    self._warned = True
                    log.warning(
                        "data.cache_gb %g is too small for the shards that are read at the same time: some are fetched "
                        "more than once; raise it, or lower data.shuffle_window or data.lanes",
                        cache.limit / 1e9,
                    )
                break
            window.append(number)
        self.window = frozenset(window)
        if not self._stopped.is_set():
            cache.pin(self.label, [self.location.key(self.shards[k].name, self.shards[k].sha256) for k in window])
        return window

    def _fetch_next(self, window: list[int]) -> bool:
        """Fetches the first shard of the window that is missing; returns whether there was one."""
        for number in window:
            info = self.shards[number]
            if number in self._failed or self.location.cached(info.name, info.sha256):
                continue
            self._fetching = True
            try:
                if self.location.prefetch(info.name, info.sha256, info.bytes):
                    return True
            except CorruptShardError:  # the process that reads the shard reports it
                self._failed.add(number)
            except (OSError, ValueError) as error:
                log.debug("cannot fetch %s ahead: %s", info.name, error)
                return False
            finally:
                self._fetching = False
        return False
