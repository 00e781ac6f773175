"""Where latent shards lie: local folders, shared file systems, and URLs as WebDataset takes them."""

import hashlib
import logging
import os
import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

from fvdm.files import atomic_write, lock

log = logging.getLogger(__name__)
T = TypeVar("T")
RETRY_DELAYS = (1.0, 4.0, 16.0)  # seconds between tries
NOT_FOUND = 22  # exit status of curl where a server answers that it does not have a file, or does not give it


class CorruptShardError(ValueError):
    """A shard whose bytes are not those that were written; the message names the shard."""


class MissingError(ValueError):
    """A file that is not there, or may not be read; the message is the reason."""


class UnreachableError(OSError):
    """A file that cannot be read for a reason that may pass (a disk, a network, a server), after several tries."""


def retry(read: Callable[[], T], what: str, missing: int | None = None) -> T:
    """Reads, and where that fails for a reason that may pass, tries again after a while.

    Args:
        read: what to do; begins anew when called again.
        what: name of the file, for the message.
        missing: exit status by which a command says that there is no such file.

    Raises:
        MissingError: at once, if the file is not there.
        UnreachableError: the last try has failed too.
    """
    for wait in (*RETRY_DELAYS, None):
        try:
            return read()
        except UnreachableError:
            raise
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
            raise MissingError((error.strerror or str(error)).lower()) from None
        except OSError as error:
            status = re.search(r": exit (-?\d+) \(read\)", str(error))  # of a pipe of webdataset's
            if status and int(status[1]) == missing:
                raise MissingError("the server does not have it, or refuses it") from None
            reason = f"its command ended with exit status {status[1]}" if status else error.strerror or str(error)
            if wait is None:
                raise UnreachableError(
                    f"Cannot read {what!r} ({reason}), in {len(RETRY_DELAYS) + 1} tries over {sum(RETRY_DELAYS):g} s: "
                    "see to the disk, the network or the server, and start again."
                ) from None
        log.warning("cannot read %r (%s), trying again in %.0f s", what, reason, wait)
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")


class Location:
    """Where shards lie: a folder, a URL of a folder, or URLs of tars with braces
    (`.../train-{000000..000007}.tar`).

    A remote file is fetched once into a cache folder, under the name of its checksum; local ones are used in
    place.

    Args:
        path: folder or URL; `pipe:COMMAND` names the tar in the command.
        cache: folder for fetched files.
    """

    def __init__(self, path: str, cache: str | None = None) -> None:
        """Fetches nothing yet."""
        self.path = os.fspath(path)
        self.cache = Path(cache or os.environ.get("FVDM_CACHE") or Path.home() / ".cache" / "fvdm" / "shards")
        self.template, self.names = self._parse()
        self.remote = re.match(r"^(pipe:|[a-z0-9]+://)", self.template) is not None
        if self.template.startswith("file:"):
            self.template, self.remote = re.sub(r"^file:(//)?", "", self.template), False

    def _parse(self) -> tuple[str, set[str] | None]:
        """The URL with `\\0` in place of the file's name, and the names asked for (None: all)."""
        if not re.search(r"\.tar\b", self.path):
            if self.path.startswith("pipe:"):
                raise ValueError(f"{self.path!r} names no .tar: write the command for one shard, or {{0..9}} for many.")
            return self.path.rstrip("/") + "/\0", None
        from webdataset.shardlists import expand_urls

        pattern = r"[^/\s'\"=]+\.tar\b"
        urls = expand_urls(self.path)
        names = {re.findall(pattern, url)[-1] for url in urls}
        templates = {"\0".join(url.rsplit(re.findall(pattern, url)[-1], 1)) for url in urls}
        if len(templates) != 1:
            raise ValueError(
                f"{self.path!r}: the shards must lie in one folder; encode into one, or merge the folders."
            )
        return templates.pop(), names

    def url(self, name: str) -> str:
        """Path or URL of a file beside the shards."""
        return self.template.replace("\0", name)

    def read(self, name: str) -> bytes:
        """The bytes of a small file.

        Raises:
            ValueError: it is not there.
            UnreachableError: it cannot be read for another reason.
        """

        def read() -> bytes:
            with self._open(name) as stream:
                return stream.read()

        try:
            return retry(read, self.url(name), NOT_FOUND)
        except MissingError as error:
            raise ValueError(
                f"Cannot read {self.url(name)!r} ({error}): is {self.path!r} a folder that "
                "encode_latents.py wrote to the end?"
            ) from None

    def local(self, name: str, sha256: str) -> Path:
        """Path of a file on this machine, fetched if it is remote. Safe to call from many processes at once.

        Raises:
            CorruptShardError: what arrived is not what the manifest promises.
            ValueError: it is not there.
            UnreachableError: it cannot be fetched for another reason.
        """
        if not self.remote:
            return Path(self.url(name))
        kept = self.cache / (sha256 + os.path.splitext(name)[1])
        if kept.exists():
            return kept
        self.cache.mkdir(parents=True, exist_ok=True)
        with lock(Path(f"{kept}.lock")):
            if not kept.exists():
                self._fetch(name, sha256, kept)
        return kept

    def _fetch(self, name: str, sha256: str, kept: Path) -> None:
        def fetch() -> str:
            digest = hashlib.sha256()
            with self._open(name) as stream, partial.open("wb") as file:
                while block := stream.read(1 << 20):
                    digest.update(block)
                    file.write(block)
            return digest.hexdigest()

        with atomic_write(kept) as partial:
            try:
                found = retry(fetch, self.url(name))
            except MissingError as error:
                raise ValueError(f"Cannot fetch {self.url(name)!r} to {str(self.cache)!r}: {error}.") from None
            if found != sha256:
                raise CorruptShardError(f"{self.url(name)!r} is not the file that the manifest lists: copy it again.")

    def _open(self, name: str) -> BinaryIO:
        if not self.remote:
            return open(self.url(name), "rb")
        from webdataset.gopen import gopen

        url = self.url(name)
        if url.startswith("s3://"):
            url = f"pipe:aws s3 cp {shlex.quote(url)} -"
        return gopen(url)
